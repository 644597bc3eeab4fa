"""Files of torch read without trust: what `lib.files.checkpoint` looks at before it loads one.

Such a file is a pickle, a small program that rebuilds objects, and the bytes of its storages: in a zip
archive, or in one stream (the legacy format of torch before 1.6, which the published files have).
`scan` runs the program with records in place of tensors: nothing is imported, nothing big is allocated,
and every size that it names is compared with the bytes that are there. Only a file that passes goes on
to `torch.load`. That holds for `weights_only=True` too, which runs no code but does as it is told. Tried
on torch 2.14: a megabyte of colliding keys keeps it busy for minutes, 200 kB of nested tuples as one key
end the process by a stack overflow, 350 kB fill all memory with copies of one list, and in a few bytes a
tensor of 10**11 numbers stands on a storage of four.

The published checkpoints hold pickled modules, which `weights_only=True` refuses. For them this module is
the `pickle_module` of `torch.load`: its `Unpickler` knows a few names by heart, gives inert stand-ins for
the classes of the original, and looks up nothing.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

MAX_PICKLE = 16 * 2**20  # bytes; the pickle of a network has some 100 per tensor
MAX_OPERATIONS = 500_000  # a few dozen per tensor, and COST for every object made
COST = 8
MAX_DEPTH = 64  # of dicts in lists in dicts ...
MAX_ITEMS = 200_000  # counted without regard to sharing: ten lists of ten lists of ... are many
MAX_DIMS = 64
MAX_DIRECTORY = 2 * 2**20  # bytes of a zip archive's table of contents, some 70 per storage
MAX_KEY = 2**60  # larger integers can be made to collide in a hash table

ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80\x02"
# A TorchScript archive has other members (`constants.pkl`, `code/`) and would be run by torch.load.
MEMBER = re.compile(r"[^/]+/(data\.pkl|version|byteorder|\.[a-z_/]+|data/\d+)", re.ASCII)

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
STAND_INS = (
    "lib.LinearAverage.LinearAverage",
    "lib.NCEAverage.NCEAverage",
    "lib.alias_multinomial.AliasMethod",
    "torch.nn.backends.thnn._get_thnn_function_backend",
)
REASONS = {
    "torch._utils._rebuild_sparse_tensor": "it holds a sparse tensor; they must be dense tensors",
    "torch._utils._rebuild_qtensor": "it holds a quantized tensor; save it dequantized",
    "torch._utils._rebuild_nested_tensor": "it holds a nested tensor; they must be dense tensors",
}


class Refused(pickle.UnpicklingError):
    """What a file asks for and must not get; the message says so after "was refused: "."""


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A storage that the pickle declares: `numel` elements under the name `key`."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What stands for a tensor in a scanned file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Maker:
    """What stands for a class or function of the table; the pickle can do nothing but call it."""

    name: str
    make: Callable[..., Any]


_LEAVES = frozenset((bool, int, float, str, bytes, TensorRecord))


class StandIn:
    """An object of one of the classes `STAND_INS`: its attributes, none of its methods."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}


@dataclass(frozen=True)
class Contents:
    """A scanned file.

    Attributes:
        kind: of container.
        tree: plain values, with a `TensorRecord` for each tensor.
        stand_ins: names of the classes whose objects became plain dicts.
    """

    kind: str
    tree: Any
    stand_ins: tuple[str, ...]


def shown(text: object) -> str:
    """Text of an untrusted file as part of a message: short, on one line, no control characters."""
    return ascii(str(text)[:100])[1:-1]


def _check_keys(keys: Iterable[Any]) -> None:
    """Keys of dicts and members of sets: hashing a tuple recurses, and some numbers collide."""
    for key in keys:
        if type(key) not in (str, bytes, bool) and not (type(key) is int and abs(key) < MAX_KEY):
            raise Refused("it has a key that is neither text nor a small number")


def _sequence(values: Any, what: str) -> Any:
    if type(values) not in (list, tuple):
        raise Refused(f"it makes {what} out of a {type(values).__name__}")
    return values


def _ordered_dict(pairs: Any = ()) -> OrderedDict:
    pairs = [(key, value) for key, value in _sequence(pairs, "a dict")]
    _check_keys(key for key, _ in pairs)
    return OrderedDict(pairs)


def _counter(counts: Any) -> Counter:
    if type(counts) is not dict:
        raise Refused("it makes a Counter out of something else than counts")
    return Counter(counts)


def _set(values: Any = ()) -> set:
    _check_keys(_sequence(values, "a set"))
    return set(values)


def _bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Refused("it encodes text in another way than bytes are written")
    return text.encode("latin1")


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = ()) -> Any:
    if not isinstance(data, Tensor | TensorRecord) or hooks:
        raise Refused("it makes a parameter out of something else than a tensor")
    return data


def _stand_in(*arguments: Any) -> StandIn:
    if arguments:
        raise Refused("it calls a class of the published scripts with arguments")
    return StandIn()


TABLE = {
    name: Maker(name, make)
    for name, make in {
        "collections.OrderedDict": _ordered_dict,
        "collections.Counter": _counter,
        "builtins.set": _set,
        "__builtin__.set": _set,
        "_codecs.encode": _bytes,
        "torch.Size": lambda sizes: tuple(_sequence(sizes, "a size")),
        "torch._utils._rebuild_parameter": _parameter,
        "torch.nn.parameter.Parameter": _parameter,
        **dict.fromkeys(STAND_INS, _stand_in),
    }.items()
}


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _record(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = (),
    metadata: Any = None,
) -> TensorRecord:
    """The record of a tensor that stays within its storage and is no larger than it.

    A stride of 0 makes a tensor of any size out of one number; whoever copies it allocates all of it.
    """
    if not isinstance(storage, StorageRecord) or hooks or metadata:
        raise Refused("it holds a tensor with hooks or marks")
    numbers = (
        offset,
        *_sequence(size, "a size")[:MAX_DIMS],
        *_sequence(stride, "strides")[:MAX_DIMS],
    )
    if (
        any(type(n) is not int or n < 0 for n in numbers)
        or not len(size) == len(stride) <= MAX_DIMS
    ):
        raise Refused("it holds a tensor whose sizes and strides are no small natural numbers")
    numel, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        numel *= length
        last += (length - 1) * step
    if offset > storage.numel or (numel and not max(numel - 1, last) < storage.numel):
        raise Refused(
            f"a tensor of size {shown(list(size))} does not fit into its storage of {storage.numel} numbers"
        )
    return TensorRecord(tuple(size), storage.dtype)


class _Operations:
    """The operations of a pickle by their code, counted as they are looked up."""

    def __init__(self, known: dict[int, Callable[[Any], None]]) -> None:
        self._known = known
        self._left = MAX_OPERATIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.spend(1)
        if code not in self._known:
            known = pickletools.code2op.get(chr(code))
            name = known.name if known else f"{code:#x}"
            raise Refused(f"it uses the pickle operation {name}, which tensors do not need")
        return self._known[code]

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise Refused("its pickle does far more than a checkpoint's")


class Unpickler(pickle._Unpickler):
    """Unpickles tensors, plain values and stand-ins; everything else ends in `Refused`.

    The standard library's unpickler in Python with part of its operations, those that call or change
    objects replaced. In that of `scan`, `rebuild` and `persistent_load` give records.
    """

    rebuild = staticmethod(_rebuild)

    def __init__(self, file: BinaryIO, *, encoding: str = "utf-8") -> None:
        # text of Python 2 has no known encoding; in the published files all of it is ASCII
        super().__init__(file, encoding=encoding, errors="replace")
        self.dispatch = _Operations(OPERATIONS)
        self.stand_ins: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in REBUILD:
            return Maker(full, self.rebuild)
        if full in STAND_INS:
            self.stand_ins[full] = None
        if full in TABLE:
            return TABLE[full]
        raise Refused(
            REASONS.get(full)
            or f"it holds more than tensors and plain values, which could run code when opened "
            f"({shown(full)})"
        )

    def load_proto(self) -> None:
        if self.read(1) != b"\x02":
            raise Refused("its pickle protocol is not 2, the one that torch writes")

    def load_reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack[-1]
        if type(maker) is not Maker or type(arguments) is not tuple:
            raise Refused(f"it calls a {type(maker).__name__}")
        sized = (list, tuple, dict, str)
        self.dispatch.spend(COST + sum(len(a) for a in arguments if isinstance(a, sized)))
        self.stack[-1] = maker.make(*arguments)

    def load_newobj(self) -> None:
        arguments, maker = self.stack.pop(), self.stack[-1]
        if type(maker) is not Maker or maker.name not in STAND_INS or arguments != ():
            raise Refused(f"it makes an object of a {type(maker).__name__}")
        self.dispatch.spend(COST)
        self.stack[-1] = maker.make()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise Refused("it gives an object a state that is no dict of attributes")
        self.dispatch.spend(len(state))
        if type(target) is StandIn:
            target.state.update(state)
        elif type(target) is not OrderedDict:  # a state dict's attribute `_metadata`: not needed
            raise Refused("it sets attributes of something that has none")

    def load_binpersid(self) -> None:
        saved_id = self.stack.pop()
        if type(saved_id) is not tuple or not saved_id:
            raise Refused("it refers to something that is no storage")
        self.dispatch.spend(COST)
        if saved_id[0] == "module":  # ("module", class, file, source): the class of the next object
            self.append(saved_id[1])
        else:
            self.append(self.persistent_load(saved_id))

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter):
            raise Refused(f"it sets items of a {type(target).__name__}")
        _check_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())


_UNCHANGED = (
    *(pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GLOBAL),
)
OPERATIONS: dict[int, Callable[[Any], None]] = {
    **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _UNCHANGED},
    pickle.PROTO[0]: Unpickler.load_proto,
    pickle.REDUCE[0]: Unpickler.load_reduce,
    pickle.NEWOBJ[0]: Unpickler.load_newobj,
    pickle.BUILD[0]: Unpickler.load_build,
    pickle.BINPERSID[0]: Unpickler.load_binpersid,
    pickle.APPEND[0]: Unpickler.load_append,
    pickle.APPENDS[0]: Unpickler.load_appends,
    pickle.SETITEM[0]: Unpickler.load_setitem,
    pickle.SETITEMS[0]: Unpickler.load_setitems,
}


def load(file: BinaryIO, *, encoding: str = "utf-8") -> Any:
    """One pickle of a file, as `torch.load` asks its `pickle_module` for it."""
    return Unpickler(file, encoding=encoding).load()


class _Scanner(Unpickler):
    """Rebuilds a file's tree with records in place of tensors and storages."""

    rebuild = staticmethod(_record)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return super().find_class(module, name)

    def persistent_load(self, saved_id: tuple[Any, ...]) -> StorageRecord:
        kind, dtype, key, location, numel, *views = saved_id
        types = (type(dtype), type(key), type(location), type(numel))
        if kind != "storage" or types != (torch.dtype, str, str, int) or numel < 0 or any(views):
            raise Refused("it declares a storage in an unknown way")
        record = StorageRecord(key, dtype, numel)
        if self.storages.setdefault(key, record) != record:
            raise Refused("it declares one storage twice, with two sizes")
        return record


class _Plain:
    """Turns what an unpickler gives into dicts, lists, numbers, text and tensors without history."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int, int] | None] = {}  # None: being converted

    def convert(self, value: Any, depth: int = 0) -> tuple[Any, int, int]:
        """The plain value, how deep it is nested and how many items it has."""
        if value is None or type(value) in _LEAVES:
            return value, 0, 1
        if isinstance(value, Tensor):
            return value.detach(), 0, 1
        if id(value) not in self._done:
            if depth > MAX_DEPTH or len(self._done) > MAX_ITEMS:
                raise Refused(f"it has more than {MAX_ITEMS} parts, or {MAX_DEPTH} levels of them")
            self._done[id(value)] = None
            self._done[id(value)] = self._container(value, depth + 1)
        done = self._done[id(value)]
        if done is None:
            raise Refused("it contains itself")
        return done

    def _container(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, StandIn):
            value = _entries(value.state)
        is_dict = isinstance(value, dict)
        kind = next((kind for kind in (dict, list, tuple, set) if isinstance(value, kind)), None)
        if kind is None:
            raise Refused("it holds a class, a function or a bare storage where a value belongs")
        members, height, size = [], 0, 1
        for member in value.values() if is_dict else value:
            plain, below, items = self.convert(member, depth)
            members.append(plain)
            height, size = max(height, below), size + items
        if height >= MAX_DEPTH or size > MAX_ITEMS:
            raise Refused(f"it has more than {MAX_ITEMS} parts, or {MAX_DEPTH} levels of them")
        if is_dict:
            return dict(zip(map(_text, value), members, strict=True)), height + 1, size
        return kind(members), height + 1, size


def _text(key: Any) -> Any:
    """A key; text that Python 2 wrote as bytes becomes text."""
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else key


def _entries(state: dict[str, Any]) -> dict[str, Any]:
    """The data of a pickled module: parameters, buffers, submodules and public attributes."""
    entries = {k: v for k, v in state.items() if not k.startswith("_") and k != "training"}
    for group in ("_parameters", "_buffers", "_modules"):
        members = state.get(group, {})
        if not isinstance(members, dict):
            raise Refused(f"its module has {group} that are no dict")
        entries |= {name: value for name, value in members.items() if value is not None}
    return entries


def plain(value: Any) -> Any:
    """Plain values and tensors for everything that an unpickler gives.

    Raises:
        Refused: for values that are none, contain themselves, or are nested absurdly.
    """
    return _Plain().convert(value)[0]


def _one_directory(file: BinaryIO, num_bytes: int) -> int:
    """Where the only table of contents of a zip archive begins.

    It must stand at the very end, without a comment: an archive with two of them shows one reader
    other members than the next.
    """
    file.seek(max(0, num_bytes - 98))
    tail = file.read(98)
    end, locator, record = tail[-22:], tail[-42:-22], tail[-98:-42]
    start, *_, size, offset, comment = struct.unpack("<4s4H2LH", end)
    at, sound = num_bytes - 22, start == b"PK\x05\x06" and not comment
    if locator.startswith(b"PK\x06\x07"):
        at -= 76
        size, offset = struct.unpack_from("<2Q", record, 40)
        sound &= record.startswith(b"PK\x06\x06") and struct.unpack_from("<Q", locator, 8) == (at,)
    if not sound or offset + size != at:
        raise ValueError("its zip archive does not end as torch writes it; the file may be cut off")
    if size > MAX_DIRECTORY:
        raise Refused("its zip archive has more members than any checkpoint")
    return offset


def _members(file: BinaryIO, num_bytes: int) -> dict[str, tuple[int, int]]:
    """First byte and size of each member of a zip archive, by its name below the top folder.

    Raises:
        Refused: for members that are compressed, larger than the file, or no part of a checkpoint.
    """
    directory, members, folders = _one_directory(file, num_bytes), {}, set()
    for info in zipfile.ZipFile(file).infolist():
        name = info.orig_filename
        if not MEMBER.fullmatch(name):
            raise Refused(f"its member {shown(name)} is no part of a checkpoint")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Refused(f"its member {shown(name)} is compressed; torch writes them as they are")
        file.seek(info.header_offset)
        local = file.read(30)
        if not local.startswith(ZIP_START) or info.flag_bits & 1:
            raise ValueError(f"its member {shown(name)} is damaged or encrypted")
        begin = info.header_offset + 30 + sum(struct.unpack_from("<2H", local, 26))
        if begin + info.file_size > directory:
            raise Refused(f"its member {shown(name)} is larger than the file")
        folder, inner = name.split("/", 1)
        folders.add(folder)
        if inner in members or len(folders) > 1:
            raise Refused(f"it has two members for {shown(inner)}, or two folders")
        members[inner] = begin, info.file_size
    if sum(size for _, size in members.values()) > num_bytes:
        raise Refused("its members together are larger than the file")
    return members


def _scan_zip(file: BinaryIO, num_bytes: int) -> tuple[Any, _Scanner]:
    members = _members(file, num_bytes)
    if "data.pkl" not in members:
        raise ValueError("it is a zip archive without a checkpoint")
    begin, size = members["data.pkl"]
    if size > MAX_PICKLE:
        raise Refused(f"its pickle has {size} bytes, more than any checkpoint's")
    file.seek(begin)
    scanner = _Scanner(io.BytesIO(file.read(size)))
    tree = scanner.load()
    for storage in scanner.storages.values():
        _, held = members.get(f"data/{storage.key}", (0, None))
        if held != storage.nbytes:
            raise Refused(
                f"its storage {shown(storage.key)} declares {storage.nbytes} bytes and "
                f"{'is missing' if held is None else f'has {held}'}"
            )
    return tree, scanner


def _scan_stream(file: BinaryIO, num_bytes: int) -> tuple[Any, _Scanner]:
    head = io.BytesIO(file.read(MAX_PICKLE))
    if _Scanner(head).load() != MAGIC_NUMBER or _Scanner(head).load() != PROTOCOL_VERSION:
        raise ValueError("it is a pickle, but not one of torch")
    _Scanner(head).load()  # byte order and sizes of the machine; torch does not look at them either
    scanner = _Scanner(head)
    tree = scanner.load()
    keys = _Scanner(head).load()
    if type(keys) is not list or sorted(keys) != sorted(scanner.storages):
        raise Refused("the storages that it declares are not those that it lists")
    position = head.tell()
    for key in keys:
        storage = scanner.storages[key]
        file.seek(position)
        numel = int.from_bytes(file.read(8), "little", signed=True)
        position += 8 + storage.nbytes
        if numel != storage.numel or position > num_bytes:
            raise Refused(
                f"its storage {shown(key)} declares {storage.nbytes} bytes, which the file does not hold"
            )
    return tree, scanner


def scan(file: BinaryIO) -> Contents:
    """What a file of torch holds, and the proof that loading it takes no more than its own size.

    Args:
        file: open for reading; is at its start again afterwards.

    Raises:
        Refused: if it asks for more than tensors, plain values and stand-ins, or claims sizes that it
            does not have.
        Exception: any other, where it is damaged or no file of torch.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if start == ZIP_START:
        kind, (tree, scanner) = "zip archive", _scan_zip(file, num_bytes)
    elif start.startswith(PICKLE_START):
        kind, (tree, scanner) = "legacy stream", _scan_stream(file, num_bytes)
    else:
        raise ValueError("it does not start as files of torch do")
    file.seek(0)
    return Contents(kind, plain(tree), tuple(scanner.stand_ins))
