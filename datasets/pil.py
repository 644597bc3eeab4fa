"""The classic pipeline: torchvision's transforms on one Pillow image at a time, in workers.

It feeds a run as the published ones were fed, to compare with batches that are augmented on the device. The
chain is made of what each operation of datasets/transforms.py names as its counterpart.
"""

import os
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from datasets.files import MARGIN, FileSet, Reader, Resizing, as_rgb
from datasets.images import ImageSet
from datasets.transforms import Augmentation


class UnreadableImageError(Exception):
    """A file that is no image; says which one, and why."""


def open_image(path: Path) -> Image.Image:
    """A whole image file as 8-bit RGB, upright."""
    with Image.open(path) as image:
        return as_rgb(ImageOps.exif_transpose(image))


def central_cut(image_size: int, resizing: Resizing | None = None) -> transforms.Compose:
    """What evaluation sees of an image file: resized, the central S x S cut out."""
    resizing = resizing or Resizing(round(image_size * MARGIN))
    size = [resizing.shorter] * 2 if resizing.squash else resizing.shorter
    resize = transforms.Resize(size, resizing.interpolation)
    return transforms.Compose([resize, transforms.CenterCrop(image_size)])


class PilReader(Dataset):
    """Reads and augments the images of a set, many an item: what a DataLoader runs in its workers.

    An item is asked for by (indexes, seeds): which images, and a seed for the random numbers of each. It is
    the images, B x C x S x S float32, and what is wrong with those that cannot be read.
    """

    def __init__(self, data: ImageSet | FileSet, augmentation: Augmentation) -> None:
        size = data.image_size
        self.data = Reader(data) if isinstance(data, FileSet) else data  # which packs the paths
        self.transform = augmentation.pil_transform(size)
        if isinstance(data, FileSet) and not augmentation.starts_with_crop:
            cut = central_cut(size, data.resizing)
            self.transform = transforms.Compose([cut, self.transform])
        self.nothing = torch.empty(0, len(augmentation.mean), size, size)

    def open(self, index: int) -> Image.Image:
        if isinstance(self.data, ImageSet):
            return Image.fromarray(self.data[index][0].permute(1, 2, 0).numpy())
        path = self.data.root / os.fsdecode(self.data.paths[index])
        try:
            return open_image(path)
        except Exception as error:  # whatever a broken file makes a decoder raise is reported
            reason = str(error) or type(error).__name__
            raise UnreadableImageError(f"image {index}, {path}: {reason}") from error

    def __getitem__(self, request: tuple[Tensor, Tensor]) -> tuple[Tensor, list[str]]:
        images, problems = [], []
        with torch.random.fork_rng(devices=[]):
            for index, seed in zip(*(values.tolist() for values in request), strict=True):
                try:
                    image = self.open(index)
                except UnreadableImageError as error:
                    problems.append(str(error))
                    continue
                torch.default_generator.manual_seed(seed)  # not those of the GPUs, too
                images.append(self.transform(image))
        if problems or not images:
            return self.nothing, problems
        return default_collate(images), problems
