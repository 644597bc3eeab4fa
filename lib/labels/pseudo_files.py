"""Pseudo-label files: one for a whole training set, or a folder of chunks as published for ImageNet.

A file has the published keys: `pseudo_indexes`, `pseudo_labels` (int64, U), `pseudo_probs` (float32, U x C),
`pseudo_weights` (float32, U: the confidence), `labeled_indexes`, `unlabeled_indexes` (int64); and `meta`,
which is ours. The `pseudo_*` arrays are sorted by falling confidence. With T = `calibration` in `meta`, the
probabilities are calibrated: in proportion to p^(1 / T), p the published ones.
"""

import itertools
import re
from collections import Counter
from pathlib import Path

from torch import Tensor

from lib.files import checkpoint
from lib.files.schema import FLOATS, INTEGERS, expect, list_of, number, record, text
from lib.labels import gain
from lib.labels.pseudo_labels import KEYS, SHOWN, PseudoLabels, listed, sorted_labeled

SUFFIX = ".pth.tar"
_TENSOR = expect(
    lambda v: isinstance(v, Tensor) and v.dtype in FLOATS + INTEGERS, "a tensor of numbers"
)
# Shapes, ranges and relations are those of `PseudoLabels`, wherever it comes from.
SCHEMA = {
    **{key: _TENSOR for name, key in KEYS.items() if name != "meta"},
    "meta": record(
        {
            "data_digest": text,
            "classes": list_of(text),
            "calibration": number(1e-6, 1e6),
            gain.KEY: gain.CHECK,
        }
    ),
}
CHUNK = re.compile(r"(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\.pth\.tar")  # number of chunks, of this one


def save(pseudo: PseudoLabels, path: str | Path) -> None:
    """Write a pseudo-label file, without waiting for the disk: the graph that is kept makes it again soon."""
    checkpoint.save(pseudo.state(), path, flush=False)


def load(path: str | Path) -> PseudoLabels:
    """Read a pseudo-label file, ours or a published one.

    The published kNN files have no `pseudo_weights`: the largest probability is the confidence there.

    Raises:
        ValueError: if the file cannot be used, naming everything that is wrong with it.
    """
    needed = ("indexes", "labels", "labeled", "unlabeled")
    state = checkpoint.load_dict(path, *(KEYS[name] for name in needed), schema=SCHEMA)
    found = {name: state[key] for name, key in KEYS.items() if key in state}
    if "confidence" not in found:
        if "probabilities" not in found:
            raise ValueError(f"{path} has neither pseudo_weights nor pseudo_probs")
        probs = found["probabilities"]
        found["confidence"] = probs.amax(dim=1) if probs.ndim == 2 and probs.shape[1] else probs
    try:
        return PseudoLabels(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_chunks(folder: str | Path) -> list[PseudoLabels]:
    """Read a folder of chunks, `n_0.pth.tar` ... `n_<n-1>.pth.tar`, in the order of their numbers.

    Raises:
        ValueError: if the folder does not hold exactly one whole set, listing what is missing and what does
            not belong; if a chunk cannot be used, or was made with other labeled images or data.
    """
    files = _chunk_files(Path(folder))
    parts = [load(file) for file in files]
    checks = {
        "other labeled images": sorted_labeled,
        "another data set": lambda p: p.meta.get("data_digest", ""),
    }
    problems = []
    for what, value in checks.items():
        first = value(parts[0])
        others = [f.name for f, part in zip(files, parts, strict=True) if value(part) != first]
        if others:
            problems.append(f"{listed(others)} made with {what} than {files[0].name}")
    if problems:
        raise ValueError(f"{folder} does not hold one set of chunks: {'; '.join(problems)}")
    return parts


def _chunk_files(folder: Path) -> list[Path]:
    """List the chunks of a folder in order; other files than .pth.tar may lie beside them."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; name one with chunks 10_0.pth.tar ... 10_9.pth.tar"
        )
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIX))
    chunks = {
        name: (int(match[1]), int(match[2])) for name in names if (match := CHUNK.fullmatch(name))
    }
    if not chunks:
        raise ValueError(
            f"{folder} holds no chunks such as 10_0.pth.tar; its {SUFFIX} files are: "
            f"{listed(names) or 'none'}"
        )
    size = Counter(size for size, _ in chunks.values()).most_common(1)[0][0]
    own = {number: name for name, (of, number) in chunks.items() if of == size and number < size}
    foreign = sorted(set(names) - set(own.values()))
    # The first few of a generator, because a file name can claim 10^9 chunks.
    missing = (f"{size}_{number}{SUFFIX}" for number in range(size) if number not in own)
    problems = []
    if count := size - len(own):
        first = ", ".join(itertools.islice(missing, SHOWN))
        problems.append(f"{count} missing ({first}{' ...' * (count > SHOWN)})")
    if foreign:
        problems.append(f"{len(foreign)} that do not belong to it ({listed(foreign)})")
    if problems:
        raise ValueError(
            f"{folder} must hold the {size} chunks of one set and no other {SUFFIX}: "
            + " and ".join(problems)
        )
    return [folder / own[number] for number in range(size)]
