"""Show what is in a file of tensors, or write it again as plain tensors.

    python -m lib.cli.convert show FILE              what is in a file, of any published kind
    python -m lib.cli.convert convert IN OUT         the same as plain tensors, free of pickled classes
    python -m lib.cli.convert convert IN OUT.safetensors                    its tensors, for other tools
    python -m lib.cli.convert convert IN OUT --published-format     for the scripts of 2019

The scripts and notebooks of 2019 start from the weights of such a file, and their imagenet-semi.py continues
a run of phase 3. They cannot continue phase 1: for that they want the memory bank as a pickled object of
theirs, which is not written here.

Any file may be given, also one from a stranger: nothing in it is ever executed.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.cli import declared, start
from lib.files import checkpoint
from lib.files.atomic import write_whole
from lib.files.published import HEADS, in_published_units, is_metric
from lib.files.weights import NETWORKS, model_weights, strip_wrappers

CANNOT_CONTINUE = (
    "The scripts of 2019 take the weights of this metric (cifar-semi.py --resume, the notebooks, "
    "imagenet-semi.py --pretrained). They cannot continue its training, for which they want the memory bank "
    "as a pickled object of theirs."
)
NO_LAST_LAYER = " Nor do the notebooks take this one, which has no last layer (--objective)."


def _renamed(state: Any, prefix: str) -> Any:
    """Return a state with `prefix` in place of those of wrappers before the names of weights."""
    if not isinstance(state, dict):
        return state
    networks = [key for key in NETWORKS if isinstance(state.get(key), dict)]
    return state | {
        key: {prefix + name: value for name, value in strip_wrappers(state[key]).items()}
        for key in networks
    }


def _save_safetensors(state: Any, path: Path) -> list[str]:
    """Write a network's weights, or else the tensors of a dict; return the entries left out."""
    writer = checkpoint.import_safetensors()
    state = {"features": state} if isinstance(state, Tensor) else state
    state = state if isinstance(state, dict) else {}
    network = next((key for key in NETWORKS if isinstance(state.get(key), dict)), None)
    source = state if network is None else state[network]
    tensors = {
        # Tensors may not share their memory in that format.
        str(name): value.clone(memory_format=torch.contiguous_format)
        for name, value in source.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"there are no tensors to write to {path}")
    notes = {str(k): str(v) for k, v in state.items() if isinstance(v, str | int | float)}
    write_whole(writer.save(tensors, metadata=notes), path)
    return [str(name) for name in state if str(name) not in (network, *tensors, *notes)]


def _described(value: Any, name: str, depth: int = 0) -> Iterator[str]:
    """Yield a line for each entry of a loaded file."""
    start = "  " * depth + (name if name.isprintable() else ascii(name))
    if isinstance(value, Tensor):
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
    """Describe a file that `checkpoint.load` reads: its format, and a tree of keys, types and shapes."""
    path = Path(path)
    found = checkpoint.load(path)
    lines = [f"{path}: {checkpoint.container(path)}, {path.stat().st_size / 1e6:.1f} MB"]
    entries = found if isinstance(found, dict) else {"(the whole file)": found}
    for key, value in entries.items():
        lines += _described(value, str(key))
    return "\n".join(lines)


def convert(source: str | Path, target: str | Path, *, published: bool = False) -> list[str]:
    """Write a file again as plain tensors, or, where `target` ends in .safetensors, in that format.

    `published` prefixes the names of weights by `module.`, gives accuracies in the published units and writes
    the stream that torch before 1.6 reads. The entries left out are returned, which only a safetensors file
    has. ValueErrors are those of `checkpoint.load` and `checkpoint.save`.
    """
    state, target = checkpoint.load(source), Path(target)
    if target.suffix == ".safetensors":
        if published:
            raise ValueError(
                "the published format is one of torch; name a file that ends in .pth.tar"
            )
        return _save_safetensors(_renamed(state, ""), target)
    state = _renamed(state, "module." if published else "")
    if published and isinstance(state, dict):
        state = in_published_units(state)
    checkpoint.save(state, target, legacy=published)
    return []


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.prog = "lib.cli.convert"
    commands = parser.add_subparsers(dest="command", required=True)
    shows = commands.add_parser("show", help="print what is in a file")
    shows.add_argument("file", metavar="FILE")
    converts = commands.add_parser("convert", help="write a file again as plain tensors")
    converts.add_argument("source", metavar="IN", help="file of any published kind")
    converts.add_argument("target", metavar="OUT", help="new file: .pth.tar or .safetensors")
    converts.add_argument(
        "--published-format",
        action="store_true",
        help="prefix the names of weights by module. and write the stream that torch before 1.6 reads; see "
        "above for what the scripts of 2019 can do with it",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.command == "show":
        print(show(args.file))
        return
    left_out = convert(args.source, args.target, published=args.published_format)
    print(args.target + (f", without {', '.join(left_out)}" if left_out else ""))
    if args.published_format:
        written = checkpoint.load(args.target)
        if isinstance(written, dict) and is_metric(written):
            headless = not set(HEADS) & model_weights(written, args.target).keys()
            print(f"{CANNOT_CONTINUE}{NO_LAST_LAYER if headless else ''}")


if __name__ == "__main__":
    start.run(main, build_parser())
