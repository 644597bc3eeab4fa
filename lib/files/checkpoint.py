"""Save files of tensors all at once or not at all, and load them without running anything in them."""

import contextlib
import io
import itertools
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lib.files import published_pickle
from lib.files.atomic import write_whole
from lib.files.published_pickle import PickledModule, RefusedError, printable
from lib.files.schema import Schema, require
from lib.runtime import distributed

ZIP_START = b"PK\x03\x04"
MAX_PARTS = 200_000  # values of a file, counted without regard to sharing
EMPTY: Schema = {}


def save(state: Any, path: str | Path, *, legacy: bool = False, flush: bool = True) -> None:
    """Write a dict, or one bare tensor, so that `path` holds either the old file or the new one.

    `legacy` writes the stream that torch before 1.6 reads instead of a zip archive; `flush` is that of
    `write_whole`. A folder that cannot be written to, and a full disk, are a ValueError; the old file stays.
    """
    buffer = io.BytesIO()
    state = dict(state) if isinstance(state, Mapping) else state
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    write_whole(buffer.getbuffer(), Path(path), flush=flush)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading; whatever goes wrong with it ends in one ValueError with its name."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; check the path")
    try:
        with open(path, "rb") as file:
            yield file
    except RefusedError as error:
        raise ValueError(f"{path} was refused: {error}") from error
    except Exception as error:  # the readers meet damage with a dozen different exceptions
        reason = printable(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint; it is damaged or of another kind ({reason})"
        ) from error


def load(path: str | Path) -> Any:
    """Read a file of tensors and plain values on the CPU. Nothing in it is ever executed.

    Both formats of torch are read, and the published files with their pickled modules: the memory bank
    `lemniscate` and its sampler arrive as dicts of their tensors. A `.safetensors` file is a dict too.
    What remains possible, as in torch itself, is a file made to keep the process busy or to end it.

    Raises:
        ValueError: if it is missing, damaged, claims sizes that it does not have, or asks for more.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        reader = import_safetensors()
        with _opened(path):
            return reader.load_file(path)
    with _opened(path) as file:
        num_bytes = path.stat().st_size
        return _plain(_unpickled(file, num_bytes), num_bytes, itertools.count())


def container(path: Path) -> str:
    """Name the format of a file that `load` reads."""
    if path.suffix == ".safetensors":
        return "safetensors"
    with open(path, "rb") as file:
        return "zip archive" if file.read(len(ZIP_START)) == ZIP_START else "legacy stream"


def _unpickled(file: BinaryIO, num_bytes: int) -> Any:
    if file.read(len(ZIP_START)) != ZIP_START:
        return published_pickle.read(file)
    members = zipfile.ZipFile(file).infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise RefusedError(
                f"its member {printable(member.filename)} is compressed; torch stores them as they are"
            )
    if sum(member.file_size for member in members) > num_bytes:
        raise RefusedError("its members together are larger than the file")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = printable(str(error).rpartition("WeightsUnpickler error: ")[2].strip())
        why = f", which could run code when opened ({found[1]})" if found else f" ({reason})"
        raise RefusedError(f"it holds more than tensors and plain values{why}") from error


def _plain(value: Any, num_bytes: int, parts: Iterator[int]) -> Any:
    """Copy what an unpickler gives into dicts, lists, numbers, text and tensors without history.

    `parts` counts the values, because a list of the same list of the same list ... is endless.
    """
    if next(parts) == MAX_PARTS:
        raise RefusedError(f"it has more than {MAX_PARTS} parts")
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Tensor):
        return _dense(value, num_bytes)
    if isinstance(value, PickledModule):
        value = value.entries()
    if isinstance(value, dict):  # whose methods may be hidden behind attributes from the file
        for key in dict.keys(value):
            if type(key) not in (str, int, bool):
                raise RefusedError(f"it has a {type(key).__name__} as a key")
        return {key: _plain(entry, num_bytes, parts) for key, entry in dict.items(value)}
    kind = next((kind for kind in (list, tuple, set) if isinstance(value, kind)), None)
    if kind is None:
        raise RefusedError(f"it holds a {type(value).__name__} where a plain value belongs")
    return kind([_plain(member, num_bytes, parts) for member in value])


def _dense(tensor: Tensor, num_bytes: int) -> Tensor:
    """Refuse tensors that are not dense, or that take more memory than a file of so many bytes can fill."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise RefusedError("it holds a tensor that is sparse or of another special kind")
    if tensor.is_quantized or tensor.device.type != "cpu":
        raise RefusedError("it holds a quantized tensor, or one without contents")
    if max(tensor.nbytes, tensor.untyped_storage().nbytes()) > num_bytes:
        shape = printable(list(tensor.shape))
        raise RefusedError(f"a tensor of size {shape} does not fit into the file")
    return tensor.detach()


def load_dict(path: str | Path, *keys: str, schema: Schema = EMPTY) -> dict[str, Any]:
    """Load a file that must hold a dict with `keys`; a ValueError lists all that are missing or wrong."""
    state = load(path)
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__} where a dict of entries is expected"
        )
    require_keys(state, path, *keys)
    require(state, schema, path)
    return state


def require_keys(state: Mapping[str, Any], path: str | Path, *keys: str) -> None:
    """Raise ValueError naming those of `keys` that are missing from what was read from `path`."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it holds: {listed(state, 20)}")


def newest_readable(folder: str | Path, names: Iterable[str]) -> str:
    """Return the newest readable file among folder/names (`--resume auto`), and print the choice.

    It is the same on every process, and empty if the folder has none of the files. If there are some and none
    of them can be read, this is a ValueError.
    """
    chosen = ""
    if distributed.is_main():
        files = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
        for file in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True):
            try:
                load_dict(file)
            except ValueError as error:
                print(f"--resume auto passes over a file: {error}", file=sys.stderr)
                continue
            chosen = str(file)
            break
        if files and not chosen:
            raise ValueError(
                f"--resume auto: none of the checkpoints in {folder} can be read; move them away to start "
                "afresh"
            )
        nothing = f": no checkpoint in {folder} yet, starting afresh"
        print("--resume auto" + (f" takes {chosen}" if chosen else nothing))
    return distributed.broadcast_object(chosen)


def listed(names: Iterable[Any], most: int) -> str:
    """Return the first few names out of a file for a message, without control characters."""
    names = list(names)
    first = ", ".join(printable(name) for name in names[:most])
    return first + (" ..." if len(names) > most else "")


def import_safetensors() -> Any:
    """Return the module `safetensors.torch`, or raise a ValueError that says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            "safetensors files need the package of that name: pip install safetensors"
        ) from error
    return safetensors.torch
