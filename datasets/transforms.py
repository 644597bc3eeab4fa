"""Augmentation of whole batches, each image with random numbers of its own.

Every operation is split in two: `draw(n, generator)` gives one row of random numbers per image, and
calling the operation applies given rows to given images. What an image becomes is thus a function of
its row alone, whatever device, batch or process it is computed in. Images are float32 in [0, 1],
B x C x H x W. The parameters are distributed as in torchvision's transforms of the same name, and the
same parameters give the same pixels (tests/test_transforms.py), up to torchvision's rounding to bytes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from datasets.images import Stats

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's "L" mode


class Op(Protocol):
    def draw(self, n: int, generator: Generator) -> Tensor: ...

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor: ...


def to_gray(images: Tensor) -> Tensor:
    """B x 3 x H x W -> B x 1 x H x W luminance."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class RandomResizedCrop:
    """A crop of `scale` times the area and 3/4 to 4/3 aspect ratio, resized (bilinear) to full size.

    A candidate that does not fit is redrawn up to ten times, then the whole image is taken, as
    torchvision does; here all ten candidates are drawn at once and the first that fits wins.
    """

    tries = 10

    def __init__(self, min_scale: float, max_scale: float = 1.0) -> None:
        if not 0 < min_scale <= max_scale <= 1:
            raise ValueError(f"crop scale {min_scale} ... {max_scale}: must lie in (0, 1]")
        self.min_scale, self.max_scale = min_scale, max_scale

    def draw(self, n: int, generator: Generator) -> Tensor:
        """n x 4: top, left, height, width as fractions of the image (square images)."""
        area = torch.rand(n, self.tries, generator=generator)
        area = self.min_scale + area * (self.max_scale - self.min_scale)
        log_ratio = (2 * torch.rand(n, self.tries, generator=generator) - 1) * math.log(4 / 3)
        place = torch.rand(n, 2, generator=generator)
        width = (area * torch.exp(log_ratio)).sqrt()
        height = (area * torch.exp(-log_ratio)).sqrt()
        fits = (width <= 1) & (height <= 1)
        first = fits.int().argmax(dim=1, keepdim=True)
        missing = ~fits.any(dim=1)
        height, width = height.gather(1, first)[:, 0], width.gather(1, first)[:, 0]
        height[missing], width[missing] = 1.0, 1.0
        return torch.stack([place[:, 0], place[:, 1], height, width], dim=1)

    @staticmethod
    def boxes(rows: Tensor, size: tuple[int, int]) -> Tensor:
        """Rows -> whole pixels, B x 4: top, left, height, width."""
        h, w = size
        height = (rows[:, 2] * h).round().clamp(1, h)
        width = (rows[:, 3] * w).round().clamp(1, w)
        top = (rows[:, 0] * (h - height + 1)).floor().minimum(h - height)
        left = (rows[:, 1] * (w - width + 1)).floor().minimum(w - width)
        return torch.stack([top, left, height, width], dim=1)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        top, left, height, width = self.boxes(rows, (h, w))[:, :, None].unbind(1)
        steps_y = torch.arange(h, device=images.device) + 0.5
        steps_x = torch.arange(w, device=images.device) + 0.5
        # clamped at the border of the crop, not of the image: crop first, resize second
        y = (steps_y * height / h - 0.5).clamp(min=0).minimum(height - 1) + top
        x = (steps_x * width / w - 0.5).clamp(min=0).minimum(width - 1) + left
        grid_y = (2 * y / max(h - 1, 1) - 1)[:, :, None].expand(-1, h, w)
        grid_x = (2 * x / max(w - 1, 1) - 1)[:, None, :].expand(-1, h, w)
        grid = torch.stack([grid_x, grid_y], dim=-1)
        return F.grid_sample(images, grid, align_corners=True, padding_mode="border")


class PadCrop:
    """Reflect-pad by an eighth of the side (4 pixels at 32) and cut the full size at random."""

    def draw(self, n: int, generator: Generator) -> Tensor:
        """n x 2: vertical and horizontal place, as fractions of the room."""
        return torch.rand(n, 2, generator=generator)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        pad = max(1, h // 8)
        padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
        offsets = (rows * (2 * pad + 1)).long()
        y = offsets[:, 0, None] + torch.arange(h, device=images.device)
        x = offsets[:, 1, None] + torch.arange(w, device=images.device)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


class RandomHorizontalFlip:
    def draw(self, n: int, generator: Generator) -> Tensor:
        return torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        return torch.where(_column(rows[:, 0] < 0.5), images.flip(3), images)


class RandomGrayscale:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def draw(self, n: int, generator: Generator) -> Tensor:
        return torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        return torch.where(_column(rows[:, 0] < self.probability), to_gray(images), images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _column(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = to_gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, _column(factor)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(to_gray(images).expand_as(images), images, _column(factor)).clamp(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by `turn` (B, in revolutions), keeping HSV saturation and value.

    In closed form, without a case per sextant: channel n of (5, 3, 1) is
    v - (v - min) * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 * hue) mod 6.
    """
    value, arg = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    r, g, b = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    by_red, by_green, by_blue = (g - b) / safe, 2 + (b - r) / safe, 4 + (r - g) / safe
    hue = torch.where(arg == 0, by_red, torch.where(arg == 1, by_green, by_blue))
    offset = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    k = (offset + (hue + 6 * turn[:, None, None])[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


class ColorJitter:
    """Brightness, contrast, saturation and hue, each image in a random order of its own."""

    adjustments: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        adjust_brightness,
        adjust_contrast,
        adjust_saturation,
        adjust_hue,
    )

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def draw(self, n: int, generator: Generator) -> Tensor:
        """n x 8: the four factors, then the adjustment to apply first, second, third, fourth."""
        factors = (2 * torch.rand(n, 4, generator=generator) - 1) * self.strength
        factors[:, :3] += 1
        order = torch.rand(n, 4, generator=generator).argsort(dim=1)
        return torch.cat([factors, order], dim=1)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        images = images.clone()
        for place in range(4):
            chosen = rows[:, 4 + place].long()
            for k, adjust in enumerate(self.adjustments):
                members = (chosen == k).nonzero()[:, 0]
                images[members] = adjust(images[members], rows[members, k])
        return images


class Augmentation:
    """A chain of operations ending in normalisation: what turns stored bytes into network input.

    Args:
        ops: applied in order; none for evaluation.
        stats: mean and standard deviation per channel.
        gray: reduce to one channel, for networks that read gray images.
    """

    def __init__(self, ops: Sequence[Op], stats: Stats, *, gray: bool = False) -> None:
        self.ops, self.gray = tuple(ops), gray
        mean, std = torch.tensor(stats, dtype=torch.float32).view(2, 1, 3, 1, 1)
        self.mean = mean.mean(dim=1, keepdim=True) if gray else mean
        self.std = std.mean(dim=1, keepdim=True) if gray else std

    def draw(self, n: int, generator: Generator) -> list[Tensor]:
        """One n x k tensor of random numbers per operation, on the CPU on every device."""
        return [op.draw(n, generator) for op in self.ops]

    def __call__(self, images: Tensor, rows: Sequence[Tensor] = ()) -> Tensor:
        """B x 3 x H x W bytes -> normalised float32 in channels-last memory order."""
        x = images.float() / 255
        for op, values in zip(self.ops, rows, strict=True):
            x = op(x, values.to(x.device, non_blocking=True))
        x = to_gray(x) if self.gray else x
        x = (x - self.mean.to(x.device)) / self.std.to(x.device)
        return x.contiguous(memory_format=torch.channels_last)


def instance_ops(crop: str = "RandomResizedCrop", scale: float = 0.2) -> list[Op]:
    """The published augmentation of phase 1 (Wu et al. 2018): crop, jitter, gray, flip."""
    if crop not in ("RandomResizedCrop", "PadCrop"):
        raise ValueError(f"unknown crop {crop!r}: take RandomResizedCrop or PadCrop")
    first = RandomResizedCrop(scale) if crop == "RandomResizedCrop" else PadCrop()
    return [first, ColorJitter(0.4), RandomGrayscale(0.2), RandomHorizontalFlip()]


def finetune_ops() -> list[Op]:
    """The published augmentation of phase 3: reflect-pad and crop, flip."""
    return [PadCrop(), RandomHorizontalFlip()]
