"""Images that stay in their files, and are decoded, cropped and resized to bytes by the loading workers.

Workers apply the random crop of the augmentation, or the central crop of evaluation, to the decoded bytes.
Colors, flips and normalization follow in batches on the device. The pixels are those of
torchvision.transforms.v2 on uint8 for the same crop.
"""

import hashlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional

from datasets.images import DataSet, Stats
from datasets.resizing import MARGIN, Resizing
from datasets.transforms import RandomResizedCrop

SURPLUS = 2  # a JPEG is decoded smaller only while its side stays this many times the output's
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112  # the EXIF tag

Box = tuple[float, float, float, float]  # top, left, height, width in pixels


@dataclass(frozen=True)
class FileSet(DataSet):
    """A set of image files of any sizes, which are read when they are needed.

    Attributes:
        root: folder that `paths` start from.
        paths: N files of the images.
        image_size: side in pixels of the square crops.
        resizing: resizing before the central crop; None takes 256/224 of `image_size` for the shorter side.
    """

    in_memory: ClassVar[bool] = False

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

    @property
    def evaluation_resize(self) -> int:
        return self.resizing.shorter if self.resizing else round(self.image_size * MARGIN)

    @property
    def portable_digest(self) -> str:
        return ""  # images held in memory have another digest

    def picture(self, index: int) -> Tensor:
        data = (self.root / self.paths[index]).read_bytes()
        return read_image(data, self.image_size, resizing=self.resizing)

    def for_workers(self) -> "Reader":
        return Reader(self)

    def resized_by(self, resizing: Resizing) -> "FileSet":
        return replace(self, resizing=resizing)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with names, file sizes and labels.

        Reading the content of a million files would take too long.
        """
        state = hashlib.sha256(f"{len(self)} {self.classes}".encode())
        state.update(self.targets.numpy().tobytes())
        for path in self.paths:
            size = (self.root / path).stat().st_size
            state.update(os.fsencode(f"{path}\n{size}\n"))
        return state.hexdigest()[:16]


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. Pillow's own conversion clips deeper pixels at 255, to a white picture."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class View:
    """A view of an image: the box of its pixels, and the function that crops and resizes it.

    Attributes:
        resampling: Pillow's name of the method that `cut` resizes with.
    """

    box: Box
    cut: Callable[[Image.Image], Tensor]
    resampling: Image.Resampling = Image.Resampling.BILINEAR


def random_view(params: Sequence[float], size: tuple[int, int], image_size: int) -> View:
    """Return the view of `RandomResizedCrop` with the random numbers `params`; size is height, width."""
    top, left, height, width = RandomResizedCrop.box(params, size)
    output = [image_size, image_size]

    def cut(image: Image.Image) -> Tensor:
        part = image.crop((left, top, left + width, top + height))
        return functional.resize(_as_tensor(part), output, antialias=True)

    return View((top, left, height, width), cut)


def central_view(size: tuple[int, int], image_size: int, resizing: Resizing | None = None) -> View:
    """Return the view of evaluation: resized (by default the shorter side to 256/224 S), central S x S."""
    resizing = resizing or Resizing(round(image_size * MARGIN))
    resized = [
        resizing.shorter if resizing.squash else resizing.shorter * side // min(size)
        for side in size
    ]
    first = [round((side - image_size) / 2) for side in resized]
    scales = [old / new for old, new in zip(size, resized, strict=True)]
    top, left = (place * scale for place, scale in zip(first, scales, strict=True))

    def cut(image: Image.Image) -> Tensor:
        return resizing(_as_tensor(image), image_size)

    box = (top, left, image_size * scales[0], image_size * scales[1])
    return View(box, cut, Image.Resampling[resizing.interpolation.name])


def _scale(image: Image.Image, orientation: int, view: View, image_size: int) -> int:
    """Return 8, 4 or 2 if a JPEG may be decoded at that fraction of its size for this view, else 1."""
    surplus = min(view.box[2:]) / (SURPLUS * image_size)
    for scale in (8, 4, 2):
        # decoding leaves part of a pixel over at the right and below, which must not be turned
        whole = not (image.width % scale or image.height % scale)
        if image.format == "JPEG" and scale <= surplus and (whole or orientation == 1):
            return scale
    return 1


def _shrunk_view(image: Image.Image, view: View, scale: int, image_size: int) -> Tensor:
    """Crop the view from an image that was decoded at 1/scale of its size."""
    top, left, height, width = (value / scale for value in view.box)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    side = (image_size, image_size)
    return _as_tensor(image.resize(side, view.resampling, box))


def read_image(
    data: bytes,
    image_size: int,
    params: Sequence[float] | None = None,
    resizing: Resizing | None = None,
) -> Tensor:
    """Read one view of an image file as 3 x S x S bytes, upright and RGB.

    Args:
        data: content of the file.
        image_size: S.
        params: random numbers of a `RandomResizedCrop`; None takes the central view.
        resizing: resizing for the central view.
    """
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        size = image.size if orientation in SIDEWAYS else image.size[::-1]
        view = central_view(size, image_size, resizing)
        if params is not None:
            view = random_view(params, size, image_size)
        scale = _scale(image, orientation, view, image_size)
        if scale > 1:  # draft mode skips most of the work of decoding
            image.draft("RGB", (image.width // scale, image.height // scale))
        upright = as_rgb(image if orientation == 1 else ImageOps.exif_transpose(image))
        return view.cut(upright) if scale == 1 else _shrunk_view(upright, view, scale, image_size)


class UnreadableImageError(Exception):
    """The error of a file that cannot be read as an image, with its path and the reason."""


class Reader(Dataset):
    """Reader of a set's images in the workers of a DataLoader, many images for each item.

    A request is (indexes, params): the images, and the random numbers of their crops or None. Its item is the
    images, B x 3 x S x S bytes, and a message for each image that cannot be read.
    """

    def __init__(self, data: FileSet) -> None:
        self.root, self.image_size, self.resizing = data.root, data.image_size, data.resizing
        # one array in place of a million strings, whose reference counts make each process copy them
        self.paths = np.array([os.fsencode(path) for path in data.paths])

    def pil_image(self, index: int) -> Image.Image:
        """Return a whole image as 8-bit RGB, upright.

        Raises:
            UnreadableImageError: naming the file and what is wrong with it.
        """
        path = self.root / os.fsdecode(self.paths[index])
        try:
            with Image.open(path) as image:
                return as_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # whatever a broken file makes a decoder raise is reported
            reason = str(error) or type(error).__name__
            raise UnreadableImageError(f"image {index}, {path}: {reason}") from error

    def __getitem__(self, request: tuple[Tensor, Tensor | None]) -> tuple[Tensor, list[str]]:
        indexes, params = request
        images = [torch.empty(0)] * len(indexes)
        problems = []
        for place, index in enumerate(indexes.tolist()):
            path = self.root / os.fsdecode(self.paths[index])
            try:
                crop = None if params is None else params[place].tolist()
                images[place] = read_image(path.read_bytes(), self.image_size, crop, self.resizing)
            except Exception as error:  # whatever a broken file makes a decoder raise is reported
                problems.append(f"image {index}, {path}: {str(error) or type(error).__name__}")
        if problems or not images:
            return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8), problems
        return default_collate(images), problems


def surviving(loader: DataLoader) -> Iterator[Any]:
    """Yield the items of `loader`, whose processes read images.

    Raises:
        ValueError: if the item of a dead process is missing. torch alone would raise wherever the program is
            at that moment.
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
