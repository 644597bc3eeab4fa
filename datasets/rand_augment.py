"""RandAugment of whole batches, as FixMatch has it: three random operations, and a gray square.

Sohn et al. 2020 (arXiv 2001.07685), table 12, after Cubuk et al. 2020. Every image draws its own operations,
with replacement, and their strengths, uniformly. Values are those of Pillow's functions up to rounding to
bytes; rotations, shears and translations interpolate (bilinear), and what comes in from outside is black.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from datasets.transforms import (
    Transform,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    column,
    constant,
    replaced,
    selects,
)

NUM_OPS = 3  # of each image
LARGEST_ANGLE, LARGEST_SHEAR, LARGEST_SHIFT = 30.0, 0.3, 0.3  # degrees; shares of the side
LARGEST_HOLE = 0.5  # side of the gray square, as a share of the image's
GRAY = (125 / 255, 123 / 255, 114 / 255)
LEVELS = 256


def _factor(strength: Tensor) -> Tensor:
    return 0.05 + 0.9 * strength


def _to_bytes(images: Tensor) -> Tensor:
    return (images * (LEVELS - 1)).round_().clamp_(0, LEVELS - 1)


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the whole range; one of a single value stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    stretched = (images - low) / (high - low).clamp_min(1e-6)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Give each channel a flat histogram of its bytes."""
    bytes_ = _to_bytes(images).long().flatten(2)
    counts = torch.zeros(*bytes_.shape[:2], LEVELS, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, bytes_, torch.ones_like(bytes_))
    before = counts.cumsum(dim=2) - counts
    last = counts.gather(2, bytes_.amax(dim=2, keepdim=True))  # pixels of the brightest value
    step = (bytes_.shape[2] - last) // (LEVELS - 1)
    table = ((before + step // 2) // step.clamp_min(1)).clamp_(max=LEVELS - 1)
    levels = torch.where(step > 0, table.gather(2, bytes_), bytes_)
    return (levels.float() / (LEVELS - 1)).view_as(images)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the highest 4 to 8 bits."""
    dropped = (5 * strength).floor_().clamp_(max=4)  # bits
    size = column(torch.exp2(dropped))
    return (_to_bytes(images) / size).floor_() * size / (LEVELS - 1)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Mix with a smoothed copy, whose border is that of the image."""
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=images.device) / 13
    kernel[:, :, 1, 1] *= 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=channels)
    return torch.lerp(smooth, images, column(_factor(strength)))


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert what is not below a threshold of 0 to 256."""
    bright = images * (LEVELS - 1) >= column(LEVELS * strength)
    return torch.where(bright, 1 - images, images)


def _affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample at B x 2 x 3 `matrices` applied to places in [-1, 1]."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _matrices(strength: Tensor) -> Tensor:
    return torch.eye(2, 3, device=strength.device).repeat(len(strength), 1, 1)


def rotate(images: Tensor, strength: Tensor) -> Tensor:
    angles = (2 * strength - 1) * math.radians(LARGEST_ANGLE)
    matrices = _matrices(strength)
    matrices[:, 0, 0] = matrices[:, 1, 1] = angles.cos()
    matrices[:, 0, 1], matrices[:, 1, 0] = -angles.sin(), angles.sin()
    return _affine(images, matrices)


def _shear(axis: int) -> Callable[[Tensor, Tensor], Tensor]:
    def shear(images: Tensor, strength: Tensor) -> Tensor:
        matrices = _matrices(strength)
        # about the corner at (-1, -1), as in Pillow
        matrices[:, axis, 1 - axis] = matrices[:, axis, 2] = (2 * strength - 1) * LARGEST_SHEAR
        return _affine(images, matrices)

    return shear


def _translate(axis: int) -> Callable[[Tensor, Tensor], Tensor]:
    def translate(images: Tensor, strength: Tensor) -> Tensor:
        matrices = _matrices(strength)
        matrices[:, axis, 2] = (2 * strength - 1) * 2 * LARGEST_SHIFT
        return _affine(images, matrices)

    return translate


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "identity": None,
    "auto contrast": auto_contrast,
    "equalize": equalize,
    "brightness": lambda images, s: adjust_brightness(images, _factor(s)),
    "color": lambda images, s: adjust_saturation(images, _factor(s)),
    "contrast": lambda images, s: adjust_contrast(images, _factor(s)),
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "rotate": rotate,
    "shear x": _shear(0),
    "shear y": _shear(1),
    "translate x": _translate(0),
    "translate y": _translate(1),
}


class RandAugment:
    """Three operations out of `OPERATIONS`, then a gray square of up to half the side."""

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """Draw n x 9: number and strength of each operation, then side, top and left of the square."""
        numbers = torch.randint(len(OPERATIONS), (n, NUM_OPS), generator=generator)
        return torch.cat([numbers, torch.rand(n, NUM_OPS + 3, generator=generator)], dim=1)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        numbers, strengths, hole = params.split([NUM_OPS, NUM_OPS, 3], dim=1)
        for number, strength in zip(numbers.unbind(1), strengths.unbind(1), strict=True):
            present = range(len(OPERATIONS)) if selects(images) else set(number.int().tolist())
            for k, change in enumerate(OPERATIONS.values()):
                if change is not None and k in present:
                    images = replaced(images, number == k, change, strength)
        return self._with_hole(images, hole)

    @staticmethod
    def _with_hole(images: Tensor, hole: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        side = hole[:, :1] * LARGEST_HOLE * min(h, w)
        steps = constant(range(max(h, w)), images.device) + 0.5
        inside = []
        for place, length in zip((1, 2), (h, w), strict=True):
            middle = hole[:, place : place + 1] * length
            inside.append((steps[:length] - middle).abs() < side / 2)
        covered = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(covered, constant(GRAY, images.device)[None, :, None, None], images)

    def pil_transform(self, _: int) -> Transform:
        raise ValueError(
            "RandAugment changes whole batches on the device: leave out --loader workers"
        )
