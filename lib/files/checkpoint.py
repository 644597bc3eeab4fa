"""Files of tensors: saved all or nothing, loaded without running code, matched to a model by name.

    python -m lib.files.checkpoint show FILE              what is in a file, of any published kind
    python -m lib.files.checkpoint convert IN OUT         the same as plain tensors, free of pickled classes
    python -m lib.files.checkpoint convert IN OUT.safetensors                    its tensors, for other tools
    python -m lib.files.checkpoint convert IN OUT --published-format     as the scripts of 2019 read and write

Any file may be given, also one from a stranger: nothing in it is ever executed.
"""

import argparse
import contextlib
import io
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.files import unpickling
from lib.files.atomic import write_whole

WRAPPERS = ("module.", "_orig_mod.")  # DataParallel / DDP, torch.compile
NETWORKS = ("net", "state_dict")  # where CIFAR and ImageNet checkpoints keep their weights
# The colorization backbone numbers the parts of a wide residual network, and ends before its last
# normalization.
COLORIZATION = {"0": "conv1", "1": "block1", "2": "block2", "3": "block3"}
COLORIZATION_ENDS_BEFORE = "bn1."


def save(state: Any, path: str | Path, *, legacy: bool = False) -> None:
    """Write `state` so that `path` holds either the old file or the new one, never a part.

    Serialized to memory first, written beside the target, flushed to the disk, then renamed.

    Args:
        state: a dict, or one bare tensor (features as colorization published them).
        path: the file; missing folders are made.
        legacy: write the stream that torch before 1.6 reads instead of a zip archive.

    Raises:
        ValueError: if the folder cannot be written to or the disk is full; the old file stays.
    """
    buffer = io.BytesIO()
    state = dict(state) if isinstance(state, Mapping) else state
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    _replace(Path(path), buffer)


def _replace(path: Path, buffer: io.BytesIO) -> None:
    try:
        write_whole(buffer.getbuffer(), path)
    except OSError as error:
        raise ValueError(error.strerror) from error


class _Stream(io.FileIO):
    """A file without a descriptor: torch.load tries those that have one as tar archives first."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file for reading; whatever goes wrong with it ends in one ValueError with its name."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; check the path")
    try:
        with _Stream(path) as raw, io.BufferedReader(raw) as file:
            yield file
    except unpickling.Refused as error:
        raise ValueError(f"{path} was refused: {error}") from error
    except Exception as error:  # torch's readers meet damage with a dozen different exceptions
        raise ValueError(
            f"{path} cannot be read as a checkpoint; it is damaged or of another kind "
            f"({str(error) or type(error).__name__})"
        ) from error


def inspect(path: str | Path) -> unpickling.Contents:
    """What a file holds, with shapes and types in place of its tensors, which are not read.

    Raises:
        ValueError: as `load`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = load(path).items()
        tree = {k: unpickling.TensorRecord(tuple(v.shape), v.dtype) for k, v in tensors}
        return unpickling.Contents("safetensors", tree, ())
    with _opened(path) as file:
        return unpickling.scan(file)


def load(path: str | Path) -> Any:
    """Read a file of tensors and plain values on the CPU. Nothing in it is ever executed.

    Both formats of torch are read, and the published files with their pickled modules: the memory bank
    `lemniscate` and its sampler arrive as dicts of their tensors. A `.safetensors` file is a dict too.

    Raises:
        ValueError: if it is missing, damaged, claims sizes that it does not have, or asks for more than
            tensors and plain values.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with _opened(path) as file:
        unpickling.scan(file)
        return unpickling.plain(_torch_load(file))


def _torch_load(file: io.BufferedReader) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, UnicodeDecodeError):  # pickled modules, text of Python 2
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=unpickling)


def load_dict(path: str | Path, *keys: str) -> dict[str, Any]:
    """`load`, for a file that must be a dict holding `keys`.

    Raises:
        ValueError: as `load`, or naming the keys that are missing.
    """
    state = load(path)
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__} where a dict of entries is expected"
        )
    require_keys(state, path, *keys)
    return state


def require_keys(state: Mapping[str, Any], path: str | Path, *keys: str) -> None:
    """Raise ValueError naming those of `keys` that what was read from `path` does not hold."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it holds: {_listed(state, 20)}")


def is_metric(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of phase 1, its last layer an embedding and no classifier."""
    return "lemniscate" in state  # phase 1 keeps its memory bank under this name


def _listed(names: Iterable[Any], most: int) -> str:
    """Names out of a file for a message: the first few, without control characters."""
    names = list(names)
    first = ", ".join(unpickling.shown(name) for name in names[:most])
    return first + (" ..." if len(names) > most else "")


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without the prefixes that wrappers of a model put before them."""
    plain = {}
    for name, value in weights.items():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        plain[name] = value
    return plain


def model_weights(state: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights inside a checkpoint: `net` (CIFAR), `state_dict` (ImageNet), or a bare state dict.

    Raises:
        ValueError: if there are none.
    """
    weights = next((state[key] for key in NETWORKS if key in state), state)
    if isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights):
        plain = strip_wrappers(weights)
        if any(isinstance(value, Tensor) for value in plain.values()):
            return plain
    raise ValueError(f"{path} holds no network weights; its entries are: {_listed(state, 20)}")


def is_colorization(weights: Mapping[str, Any]) -> bool:
    """Whether these are the weights of a colorization backbone, by their names."""
    return bool(weights) and all(re.match(r"[0-3]\.", name) for name in weights)


def bank_rows(state: Mapping[str, Any], path: str | Path) -> Tensor:
    """The memory bank of a checkpoint of phase 1, N x D float32: ours, or a pickled module's.

    Raises:
        ValueError: if there is none.
    """
    bank = state.get("lemniscate")
    rows = bank.get("memory") if isinstance(bank, Mapping) else None
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{path} holds no memory bank (an entry `lemniscate` with `memory`, N x D)"
        )
    return rows.float()


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did with each name."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                parts.append(f"{len(names)} {kind} ({_listed(names, 6)})")
        return "; ".join(parts)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path, keep_head: bool = True
) -> LoadReport:
    """Copy weights into a model by name and prove that the right ones arrived.

    A colorization backbone (`0.weight` ...) gets the names of a wide residual network; it has neither
    a head nor the normalization before it, which then keeps its start values.

    Args:
        model: a network of `models`, with `head_name`.
        weights: names without wrappers' prefixes.
        source: the file, for messages.
        keep_head: False leaves the last layer as it is (phase 1 -> phase 3).

    Returns:
        What was loaded; with `keep_head=False` exactly the head is missing.

    Raises:
        ValueError: if anything else is missing, left over or of another shape. The model is unchanged.
    """
    head = tuple(f"{model.head_name}.{kind}" for kind in ("weight", "bias"))
    own = model.state_dict()
    absent = head
    if is_colorization(weights):
        weights = {COLORIZATION[name[0]] + name[1:]: value for name, value in weights.items()}
        absent += tuple(name for name in own if name.startswith(COLORIZATION_ENDS_BEFORE))
    given = dict(weights) if keep_head else {k: v for k, v in weights.items() if k not in head}
    # absent in files from before PyTorch 0.4.1, and only a counter
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    shapes = {name: getattr(value, "shape", None) for name, value in given.items()}
    same = [name for name in given if name in own and own[name].shape == shapes[name]]
    report = LoadReport(
        loaded=tuple(same),
        missing=tuple(n for n in own if n not in given and n not in optional),
        unexpected=tuple(n for n in given if n not in own),
        mismatched=tuple(n for n in given if n in own and n not in same),
    )
    allowed = () if keep_head else absent
    if set(report.missing) - set(allowed) or report.unexpected or report.mismatched:
        raise ValueError(
            f"{source} does not fit this network: {report}. Was it trained with another "
            "--architecture, for another number of classes or --low-dim, or on gray images "
            "(--input-gray)?"
        )
    model.load_state_dict({name: given[name] for name in same}, strict=False)
    return report


def published_format(state: Any) -> Any:
    """A state as the published scripts expect it: names of weights begin with `module.`."""
    return _renamed(state, "module.")


def plain_format(state: Any) -> Any:
    """A state as we write it: names of weights without wrappers' prefixes."""
    return _renamed(state, "")


def _renamed(state: Any, prefix: str) -> Any:
    if not isinstance(state, dict):
        return state
    networks = [key for key in NETWORKS if isinstance(state.get(key), dict)]
    return state | {
        key: {prefix + name: value for name, value in strip_wrappers(state[key]).items()}
        for key in networks
    }


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            "safetensors files need the package of that name: pip install safetensors"
        ) from error
    return safetensors.torch


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    reader = _safetensors()
    with _opened(path):
        return reader.load_file(path)


def _save_safetensors(state: Any, path: Path) -> list[str]:
    """Write a network's weights, or else the tensors of a dict; returns the entries left out."""
    writer = _safetensors()
    state = {"features": state} if isinstance(state, Tensor) else state
    state = state if isinstance(state, dict) else {}
    network = next((key for key in NETWORKS if isinstance(state.get(key), dict)), None)
    source = state if network is None else state[network]
    tensors = {
        str(name): value.clone(
            memory_format=torch.contiguous_format
        )  # they may not share memory there
        for name, value in source.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"there are no tensors to write to {path}")
    notes = {str(k): str(v) for k, v in state.items() if isinstance(v, str | int | float)}
    _replace(path, io.BytesIO(writer.save(tensors, metadata=notes)))
    return [str(name) for name in state if str(name) not in (network, *tensors, *notes)]


def _described(value: Any, name: str, depth: int) -> Iterator[str]:
    """A line for each entry of a scanned tree."""
    start = "  " * depth + (name if name.isprintable() else ascii(name))
    if isinstance(value, unpickling.TensorRecord):
        kind = str(value.dtype).removeprefix("torch.")
        yield f"{start}  {kind} {' x '.join(map(str, value.shape)) or 'one number'}"
    elif isinstance(value, dict):
        yield f"{start}  dict of {len(value)}"
        for key, entry in value.items():
            yield from _described(entry, str(key), depth + 1)
    elif isinstance(value, list | tuple | set) and len(value) > 8:
        yield f"{start}  {type(value).__name__} of {len(value)}"
    else:
        text = ascii(value)
        yield f"{start}  {text if len(text) <= 100 else text[:97] + '...'}"


def show(path: str | Path) -> str:
    """What is in a file, as text: its format, stand-ins, and a tree of keys, types and shapes.

    Raises:
        ValueError: as `load`.
    """
    found = inspect(path)
    lines = [f"{path}: {found.kind}, {Path(path).stat().st_size / 1e6:.1f} MB"]
    lines += [f"a pickled {name} was replaced by its plain entries" for name in found.stand_ins]
    if isinstance(found.tree, dict):
        for key, value in found.tree.items():
            lines += _described(value, str(key), 0)
    else:
        lines += _described(found.tree, "(the whole file)", 0)
    return "\n".join(lines)


def convert(source: str | Path, target: str | Path, *, published: bool = False) -> list[str]:
    """Write a file again as plain tensors, or, where `target` ends in .safetensors, in that format.

    Args:
        source: a file of any kind that `load` reads.
        target: the new file.
        published: prefix the names of weights by `module.` and write the stream that torch before
            1.6 reads.

    Returns:
        Entries left out, which only a safetensors file has.

    Raises:
        ValueError: as `load` and `save`.
    """
    state, target = load(source), Path(target)
    if target.suffix == ".safetensors":
        if published:
            raise ValueError(
                "the published format is one of torch; name a file that ends in .pth.tar"
            )
        return _save_safetensors(plain_format(state), target)
    save(published_format(state) if published else plain_format(state), target, legacy=published)
    return []


def build_parser() -> argparse.ArgumentParser:
    from lib.cli import options

    parser = options.parser(__doc__)
    parser.prog = "lib.files.checkpoint"
    commands = parser.add_subparsers(dest="command", required=True)
    shows = commands.add_parser("show", help="print what is in a file")
    shows.add_argument("file", metavar="FILE")
    converts = commands.add_parser("convert", help="write a file again as plain tensors")
    converts.add_argument("source", metavar="IN", help="file of any published kind")
    converts.add_argument("target", metavar="OUT", help="new file: .pth.tar or .safetensors")
    converts.add_argument(
        "--published-format",
        action="store_true",
        help="prefix the names of weights by module. and write the stream that torch before 1.6 reads",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.command == "show":
        print(show(args.file))
        return
    left_out = convert(args.source, args.target, published=args.published_format)
    print(args.target + (f", without {', '.join(left_out)}" if left_out else ""))


if __name__ == "__main__":
    from lib.cli import options

    options.run(main, build_parser())
