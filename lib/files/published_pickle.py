"""Read the stream format of the files that were published in 2019, without running anything in them.

Torch before 1.6 wrote such streams. The published ones hold pickled modules (the memory bank and its
sampler), which `torch.load(weights_only=True)` refuses. A stream consists of five pickles: a magic number, a
protocol number, facts about the machine, the object itself and the keys of its storages. The bytes of each
storage follow. Pickles are small programs, so the `Unpickler` here knows only the operations and the names
that such files need, and reserves no more memory than the file fills. Objects of the published classes
become a `PickledModule`, which keeps their attributes and none of their methods.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

PICKLE_START = b"\x80\x02"  # protocol 2, the only one that torch wrote
MAX_PICKLE = 16 * 2**20  # bytes; the pickle of a network has some 100 for each tensor

DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
PUBLISHED_CLASSES = (
    "lib.LinearAverage.LinearAverage",
    "lib.NCEAverage.NCEAverage",
    "lib.alias_multinomial.AliasMethod",
    "torch.nn.backends.thnn._get_thnn_function_backend",
)
OPERATIONS = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE),
    *(pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
    *(pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BINPERSID),
)


class RefusedError(pickle.UnpicklingError):
    """A file asks for something that it must not get."""


def printable(text: object) -> str:
    """Return text from an untrusted file for a message: short, on one line, without control characters."""
    return ascii(str(text)[:100])[1:-1]


class PickledModule:
    """The attributes of an object whose class was published, as the file stores them."""

    attributes: dict[str, Any]

    def __new__(cls) -> "PickledModule":  # pickles do not call __init__
        self = super().__new__(cls)
        self.attributes = {}
        return self

    def entries(self) -> dict[str, Any]:
        """Return its parameters, buffers, submodules and public attributes."""
        entries = {
            name: value
            for name, value in self.attributes.items()
            if not name.startswith("_") and name != "training"
        }
        for group in ("_parameters", "_buffers", "_modules"):
            members = dict(self.attributes.get(group, {}))
            entries |= {name: value for name, value in members.items() if value is not None}
        return entries


def _rebuild_tensor(flat: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) > flat.numel():
        raise RefusedError(f"a tensor of size {printable(list(size))} is larger than its storage")
    return flat.as_strided(size, stride, offset)  # refuses places outside of the storage


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    **DTYPES,
    **dict.fromkeys(PUBLISHED_CLASSES, PickledModule),
}


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise RefusedError(f"its pickle uses the operation {code:#x}, which tensors do not need")


class Unpickler(pickle._Unpickler):
    """The unpickler of the standard library, limited to `OPERATIONS` and to the names in `KNOWN`.

    A pickle can only call what `find_class` returns, because nothing else that it can make is callable.
    The variant in Python is used: the one in C reserves memory for any number that the file names.
    """

    dispatch: ClassVar = _Dispatch(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPERATIONS}
    )

    def __init__(self, file: BinaryIO, unclaimed: int = 0) -> None:
        # Text of Python 2 does not declare an encoding; in the published files it is ASCII.
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, Tensor] = {}  # flat, by their key; filled after the pickle
        self.unclaimed = unclaimed  # bytes of the file that no storage has claimed yet

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in KNOWN:
            raise RefusedError(
                "it holds more than tensors and plain values, which could run code when opened "
                f"({printable(full_name)})"
            )
        return KNOWN[full_name]

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is PickledModule and type(state) is dict:
            target.attributes.update(state)
        elif type(target) is not OrderedDict:  # its attribute `_metadata` is not needed
            raise RefusedError(f"its pickle sets attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, saved_id: tuple[Any, ...]) -> Any:
        """Return the class of a module, or the flat tensor that stands for a storage."""
        if saved_id[0] == "module":  # followed by the class, its file and its source
            return saved_id[1]
        _, dtype, key, _, numel, view = saved_id
        if key not in self.storages:
            self.unclaimed -= numel * dtype.itemsize
            if numel < 0 or self.unclaimed < 0:
                raise RefusedError(f"its storage of {numel} numbers is larger than the file")
            self.storages[key] = torch.empty(numel, dtype=dtype)
        flat = self.storages[key]
        if view is not None or (flat.dtype, flat.numel()) != (dtype, numel):
            raise RefusedError(f"it declares the storage {printable(key)} in an unknown way")
        return flat


def read(file: BinaryIO) -> Any:
    """Read a stream of torch as plain values, tensors and `PickledModule` objects.

    Raises:
        RefusedError: if it asks for more, or claims more bytes than the file has.
        Exception: of any other kind, if it is damaged or not a stream of torch.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE))
    if head.getbuffer()[:2] != PICKLE_START:
        raise ValueError("it does not start as files of torch do")
    if Unpickler(head).load() != MAGIC_NUMBER or Unpickler(head).load() != PROTOCOL_VERSION:
        raise ValueError("it is a pickle, but not one that torch wrote")
    Unpickler(head).load()  # facts about the machine, which torch ignores as well
    unpickler = Unpickler(head, num_bytes)
    loaded = unpickler.load()
    keys = Unpickler(head).load()
    file.seek(head.tell())
    for key in keys:
        flat = unpickler.storages.pop(key)
        contents, numel = flat.view(torch.uint8).numpy(), int.from_bytes(file.read(8), "little")
        if numel != flat.numel() or file.readinto(contents) != len(contents):
            raise ValueError("the contents of a tensor are cut off or of another size")
    if unpickler.storages:
        raise ValueError("it lacks the contents of some tensors")
    return loaded
