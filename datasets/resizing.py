"""Resizing and central crop of images in evaluation."""

from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

MARGIN = 8 / 7  # evaluation shows the central 224 of 256 pixels, and other sizes in proportion

Picture = TypeVar("Picture", Tensor, Image.Image)


@dataclass(frozen=True)
class Resizing:
    """Resizing followed by a central crop.

    Attributes:
        shorter: length of the shorter side before the crop; with `squash`, of both sides.
        interpolation: method of resizing, always with antialiasing.
    """

    shorter: int
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    squash: bool = False

    def __call__(self, images: Picture, image_size: int) -> Picture:
        """Return the central S x S pixels of resized bytes (... x H x W) or of a Pillow image."""
        sides = [self.shorter] * (1 + self.squash)
        resized = functional.resize(images, sides, interpolation=self.interpolation, antialias=True)
        return functional.center_crop(resized, [image_size])
