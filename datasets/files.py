"""Images that stay in their files: decoded, cropped and resized to bytes by the loading workers.

The only geometric operation, the first of the augmentation or the central cut of evaluation, happens here, on
the decoded bytes; colors, flips and normalization follow in batches on the device. Pixels are those of
torchvision.transforms.v2 on uint8 for the same crop.
"""

import hashlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from datasets.images import Labeled, Stats
from datasets.transforms import RandomResizedCrop

MARGIN = 8 / 7  # evaluation shows the central 224 of 256 pixels, at any size in this proportion
SURPLUS = 2  # a JPEG is decoded at a fraction of its size while this many times the pixels remain
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112  # the EXIF tag

Box = tuple[float, float, float, float]  # top, left, height, width in pixels


@dataclass(frozen=True)
class Resizing:
    """How evaluation resizes an image before it cuts the center out.

    Attributes:
        shorter: length of the shorter side; with `squash` of both.
        interpolation: always with antialiasing.
    """

    shorter: int
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    squash: bool = False


@dataclass(frozen=True)
class FileSet(Labeled):
    """A set of image files, of any size each, that are read when they are needed.

    Attributes:
        name: what the user typed after `--dataset`.
        root: folder that `paths` start from.
        paths: file of each image, N.
        targets: N, int64; class number, or `UNKNOWN`.
        classes: class names; their number is the number of classes.
        stats: mean and standard deviation per channel, for values in [0, 1].
        image_size: side in pixels of the squares that are cut from the images.
        resizing: before the central cut; None: of the shorter side to 256/224 of `image_size`.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    targets: Tensor
    classes: tuple[str, ...]
    stats: Stats
    image_size: int
    resizing: Resizing | None = None

    def __post_init__(self) -> None:
        assert self.targets.dtype == torch.int64
        assert len(self.targets) == len(self.paths)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with names, file sizes, labels; reading a million files costs
        too much for more."""
        state = hashlib.sha256(f"{len(self)} {self.classes}".encode())
        state.update(self.targets.numpy().tobytes())
        for path in self.paths:
            size = (self.root / path).stat().st_size
            state.update(os.fsencode(f"{path}\n{size}\n"))
        return state.hexdigest()[:16]


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Pillow's own conversion cuts deeper pixels off at 255: the picture would be white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class View:
    """What is to be seen of an image: a box of its pixels, and the function that cuts and resizes it.

    Attributes:
        resampling: Pillow's name of what `cut` resizes with.
    """

    box: Box
    cut: Callable[[Image.Image], Tensor]
    resampling: Image.Resampling = Image.Resampling.BILINEAR


def random_view(row: Sequence[float], size: tuple[int, int], image_size: int) -> View:
    """The crop that a row of `RandomResizedCrop` means in an image of that height and width."""
    top, left, height, width = RandomResizedCrop.box(row, size)
    output = [image_size, image_size]

    def cut(image: Image.Image) -> Tensor:
        part = image.crop((left, top, left + width, top + height))
        return functional.resize(_as_tensor(part), output, antialias=True)

    return View((top, left, height, width), cut)


def central_view(size: tuple[int, int], image_size: int, resizing: Resizing | None = None) -> View:
    """Evaluation: resized, the central S x S cut out; as published the shorter side to 256/224 of S."""
    resizing = resizing or Resizing(round(image_size * MARGIN))
    resized = [
        resizing.shorter if resizing.squash else resizing.shorter * side // min(size)
        for side in size
    ]
    first = [round((side - image_size) / 2) for side in resized]
    scales = [old / new for old, new in zip(size, resized, strict=True)]
    top, left = (place * scale for place, scale in zip(first, scales, strict=True))

    def cut(image: Image.Image) -> Tensor:
        interpolation = resizing.interpolation
        whole = functional.resize(_as_tensor(image), resized, interpolation, antialias=True)
        return functional.center_crop(whole, [image_size])

    box = (top, left, image_size * scales[0], image_size * scales[1])
    return View(box, cut, Image.Resampling[resizing.interpolation.name])


def _scale(image: Image.Image, orientation: int, view: View, image_size: int) -> int:
    """1/8, 1/4 or 1/2 is how small a JPEG may be decoded for this view; 1 for other images."""
    surplus = min(view.box[2:]) / (SURPLUS * image_size)
    for scale in (8, 4, 2):
        # a part of a pixel is left over at the right and below: to be turned, there must be none
        whole = not (image.width % scale or image.height % scale)
        if image.format == "JPEG" and scale <= surplus and (whole or orientation == 1):
            return scale
    return 1


def _shrunk_view(image: Image.Image, view: View, scale: int, image_size: int) -> Tensor:
    """The view, cut out of an image decoded at 1/scale of its size."""
    top, left, height, width = (value / scale for value in view.box)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    side = (image_size, image_size)
    return _as_tensor(image.resize(side, view.resampling, box))


def read_image(
    data: bytes,
    image_size: int,
    row: Sequence[float] | None = None,
    resizing: Resizing | None = None,
) -> Tensor:
    """One view of an image file as 3 x S x S bytes, upright, RGB.

    Args:
        data: content of the file.
        image_size: S.
        row: random numbers of a `RandomResizedCrop`; without them the central view.
        resizing: of the central view.
    """
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        size = image.size if orientation in SIDEWAYS else image.size[::-1]
        view = central_view(size, image_size, resizing)
        if row is not None:
            view = random_view(row, size, image_size)
        scale = _scale(image, orientation, view, image_size)
        if scale > 1:  # most of the work of decoding is skipped
            image.draft("RGB", (image.width // scale, image.height // scale))
        upright = as_rgb(image if orientation == 1 else ImageOps.exif_transpose(image))
        return view.cut(upright) if scale == 1 else _shrunk_view(upright, view, scale, image_size)


class Reader(Dataset):
    """Reads the images of a set, many an item: what a DataLoader runs in its workers.

    An item is asked for by (indexes, rows): which images, and the rows of random numbers of their crops, or
    None. It is the images, B x 3 x S x S bytes, and what is wrong with those that cannot be read.
    """

    def __init__(self, data: FileSet) -> None:
        self.root, self.image_size, self.resizing = data.root, data.image_size, data.resizing
        # one array, not a million strings: each process that counts references copies their pages
        self.paths = np.array([os.fsencode(path) for path in data.paths])

    def __getitem__(self, request: tuple[Tensor, Tensor | None]) -> tuple[Tensor, list[str]]:
        indexes, rows = request
        images = [torch.empty(0)] * len(indexes)
        problems = []
        for place, index in enumerate(indexes.tolist()):
            path = self.root / os.fsdecode(self.paths[index])
            try:
                row = None if rows is None else rows[place].tolist()
                images[place] = read_image(path.read_bytes(), self.image_size, row, self.resizing)
            except Exception as error:  # whatever a broken file makes a decoder raise is reported
                problems.append(f"image {index}, {path}: {str(error) or type(error).__name__}")
        if problems or not images:
            return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8), problems
        return default_collate(images), problems


def surviving(loader: DataLoader) -> Iterator[Any]:
    """The items of `loader`, whose processes read images.

    Raises:
        ValueError: where the item of a dead process is missed. By itself torch raises wherever the program
            is at that moment.
    """
    handler, items = signal.getsignal(signal.SIGCHLD), None
    while True:
        try:
            if items is None:
                items = iter(loader)
                if threading.current_thread() is threading.main_thread() and handler is not None:
                    signal.signal(signal.SIGCHLD, handler)
            item = next(items, None)
        except (RuntimeError, OSError, EOFError) as error:
            ours = any(text in str(error) for text in ("DataLoader worker", "Pin memory thread"))
            if isinstance(error, RuntimeError) and not ours:
                raise
            raise ValueError(
                f"a process that reads images has ended, killed perhaps for want of memory ({error}); "
                "fewer of them (-j) need less"
            ) from error
        if item is None:
            return
        yield item
