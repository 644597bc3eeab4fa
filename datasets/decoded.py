"""A copy of decoded image files in the cache folder, so that the next start reads one file instead of all."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

VERSION = 1  # of the decoder in datasets/folder.py: another one makes other copies
LARGEST = 2**30  # bytes of images that are copied
KEPT = 4  # copies; the one used longest ago makes room for a fifth


class Decoded(NamedTuple):
    """Decoded files: N x 3 x S x S bytes, and the SHA-256 of the files' contents."""

    images: Tensor
    contents: str


def cache_folder() -> Path:
    """Return the folder of copies, below `XDG_CACHE_HOME` or ~/.cache."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deep-metric-transfer"
    )


def key_of(paths: Sequence[str], image_size: int) -> str:
    """Compute a digest of paths, sizes and times of the files, and of the decoder; "" if one is missing."""
    try:
        stats = [(str(Path(path).absolute()), Path(path).stat()) for path in paths]
    except OSError:
        return ""
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    made_by = VERSION, PIL.__version__, image_size
    return hashlib.sha256(json.dumps([made_by, files]).encode()).hexdigest()[:32]


def load(key: str, shape: tuple[int, ...]) -> Decoded | None:
    """Load the copy of this key; None if there is none, or it is damaged or of another shape."""
    for file in cache_folder().glob(f"{key}-*.npy"):
        try:
            with open(file, "rb") as source:  # np.load opens other formats too
                images = np.lib.format.read_array(source, allow_pickle=False)
            if images.dtype != np.uint8 or images.shape != shape:
                raise ValueError(f"it holds {images.dtype} of shape {images.shape}")
            os.utime(file)  # counts as used
        except (MemoryError, OSError, ValueError) as error:
            print(f"{file} is damaged, and the images are decoded anew: {error}", file=sys.stderr)
        else:
            return Decoded(torch.from_numpy(images), file.stem.removeprefix(f"{key}-"))
    return None


def save(key: str, decoded: Decoded) -> None:
    """Write a copy whole or not at all, and remove those used longest ago; a failure is only told."""
    file = cache_folder() / f"{key}-{decoded.contents}.npy"
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as target:
            np.save(target, decoded.images.numpy())
        os.replace(temporary, file)
        copies = sorted(file.parent.glob("*.npy"), key=lambda path: path.stat().st_mtime)
        for old in copies[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        print(f"the next start decodes all images again: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
