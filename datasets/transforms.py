"""Augmentation of whole batches, each image with random numbers of its own.

Every operation is split in two: `sample_params(n, generator)` gives one row of random numbers per image, and
calling the operation applies given rows to given images. What an image becomes is thus a function of
its row alone, whatever device, batch or process it is computed in. Images are float32 in [0, 1],
B x C x H x W, rows are on the CPU. The parameters are distributed as in torchvision's transforms of the
same name, and the same parameters give the same pixels (tests/datasets/test_transforms.py), up to
torchvision's rounding to bytes. `pil_transform` gives that transform itself, for one Pillow image at a time.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor
from torchvision import transforms

from datasets.images import Stats

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's "L" mode
CACHED = 2**18  # values that a CPU core keeps at hand: ops on larger batches wait for the memory
RATIO = 4 / 3  # crops are at most so much wider than high, or higher than wide


Transform = Callable[[Image], Image]  # draws from torch's global generator


class Op(Protocol):
    def sample_params(self, n: int, generator: Generator) -> Tensor: ...

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor: ...

    def pil_transform(self, size: int) -> Transform:
        """torchvision's counterpart, to give S x S Pillow images."""


def to_gray(images: Tensor) -> Tensor:
    """B x 3 x H x W -> B x 1 x H x W luminance."""
    r, g, b = images.split(1, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _replaced(
    images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *values: Tensor
) -> Tensor:
    """The images with `change(images, *values)` in place of the chosen ones; `chosen` is on the CPU.

    Where that is all or none of them, as in a batch of one, nothing is moved.
    """
    members = chosen.nonzero()[:, 0]
    if len(members) == len(images):
        return change(images, *values)
    if not len(members):
        return images
    members = members.to(images.device, non_blocking=True)
    changed = change(images[members], *(value[members] for value in values))
    return images.index_copy(0, members, changed)


class RandomResizedCrop:
    """A crop of `scale` times the area and 3/4 to 4/3 aspect ratio, resized (bilinear) to full size.

    A candidate that does not fit is redrawn up to ten times, then the largest central crop of an allowed
    ratio is taken, as torchvision does; here all ten are drawn at once and the first that fits wins.
    """

    tries = 10

    def __init__(self, min_scale: float, max_scale: float = 1.0) -> None:
        if not 0 < min_scale <= max_scale <= 1:
            raise ValueError(f"crop scale {min_scale} ... {max_scale}: must lie in (0, 1]")
        self.min_scale, self.max_scale = min_scale, max_scale

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """n x 22: place from the top and the left as fractions of the room, then the heights and the
        widths of ten candidates as fractions of the square root of the image's area."""
        area = torch.rand(n, self.tries, generator=generator)
        area = self.min_scale + area * (self.max_scale - self.min_scale)
        log_ratio = (2 * torch.rand(n, self.tries, generator=generator) - 1) * math.log(RATIO)
        place = torch.rand(n, 2, generator=generator)
        width = (area * torch.exp(log_ratio)).sqrt()
        height = (area * torch.exp(-log_ratio)).sqrt()
        return torch.cat([place, height, width], dim=1)

    @classmethod
    def box(cls, row: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """A row -> whole pixels of an image of that height and width: top, left, height, width."""
        h, w = size
        side = math.sqrt(h * w)
        heights, widths = row[2 : 2 + cls.tries], row[2 + cls.tries :]
        for height, width in zip(heights, widths, strict=True):
            # rounded first, as published: in small images more of the crops keep a whole side so
            height, width = max(1, round(height * side)), max(1, round(width * side))
            if height <= h and width <= w:
                top, left = int(row[0] * (h - height + 1)), int(row[1] * (w - width + 1))
                return min(top, h - height), min(left, w - width), height, width
        height, width = min(h, round(w * RATIO)), min(w, round(h * RATIO))
        return (h - height) // 2, (w - width) // 2, height, width

    @classmethod
    def boxes(cls, rows: Tensor, size: tuple[int, int]) -> Tensor:
        """The boxes of B rows in images of one size, B x 4 float32."""
        return torch.tensor([cls.box(row, size) for row in rows.tolist()]).float().view(-1, 4)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        boxes = self.boxes(rows, (h, w)).to(images.device, non_blocking=True)
        top, left, height, width = boxes[:, :, None].unbind(1)
        steps_y = torch.arange(h, device=images.device) + 0.5
        steps_x = torch.arange(w, device=images.device) + 0.5
        # clamped at the border of the crop, not of the image: crop first, resize second
        y = (steps_y * height / h - 0.5).clamp(min=0).minimum(height - 1) + top
        x = (steps_x * width / w - 0.5).clamp(min=0).minimum(width - 1) + left
        grid_y = (2 * y / max(h - 1, 1) - 1)[:, :, None].expand(-1, h, w)
        grid_x = (2 * x / max(w - 1, 1) - 1)[:, None, :].expand(-1, h, w)
        grid = torch.stack([grid_x, grid_y], dim=-1)
        return F.grid_sample(images, grid, align_corners=True, padding_mode="border")

    def pil_transform(self, size: int) -> Transform:
        scale, ratio = (self.min_scale, self.max_scale), (1 / RATIO, RATIO)
        return transforms.RandomResizedCrop(size, scale=scale, ratio=ratio)


class PadCrop:
    """Reflect-pad by an eighth of the side (4 pixels at 32) and cut the full size at random."""

    @staticmethod
    def padding(side: int) -> int:
        return max(1, side // 8)

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """n x 2: vertical and horizontal place, as fractions of the room."""
        return torch.rand(n, 2, generator=generator)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        pad = self.padding(h)
        padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
        offsets = (rows * (2 * pad + 1)).long().to(images.device, non_blocking=True)
        y = offsets[:, 0, None] + torch.arange(h, device=images.device)
        x = offsets[:, 1, None] + torch.arange(w, device=images.device)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)

    def pil_transform(self, size: int) -> Transform:
        pad = transforms.Pad(self.padding(size), padding_mode="reflect")
        return transforms.Compose([pad, transforms.RandomCrop(size)])


class RandomHorizontalFlip:
    def sample_params(self, n: int, generator: Generator) -> Tensor:
        return torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        return _replaced(images, rows[:, 0] < 0.5, lambda chosen: chosen.flip(3))

    def pil_transform(self, _: int) -> Transform:
        return transforms.RandomHorizontalFlip()


class RandomGrayscale:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        return torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        chosen = rows[:, 0] < self.probability
        return _replaced(images, chosen, lambda x: to_gray(x).expand_as(x))

    def pil_transform(self, _: int) -> Transform:
        return transforms.RandomGrayscale(self.probability)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _column(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    channels = images.mean(
        dim=(2, 3), keepdim=True
    )  # the mean of the luminance is that of the means
    return (images * _column(factor)).add_(to_gray(channels) * _column(1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _column(factor)).add_(to_gray(images).mul_(_column(1 - factor))).clamp_(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by `turn` (B, in revolutions), keeping HSV saturation and value.

    Without going through HSV: a third of a revolution swaps the channels in turn, and up to a sixth more
    is piecewise linear. It raises the middle channel by d = share * (max - min), toward the channel that
    follows, or lowers it; what goes beyond max or min moves the channel that was max or min instead.
    With y the channel after x (before x, for a negative turn) that is, for every channel x,
    clamp(x - y + min + d, x, max) + clamp(x - y + max - d, min, x) - x.
    """
    sixths = (6 * turn + 3) % 6 - 3
    thirds = (sixths / 2).round()
    rest = sixths - 2 * thirds
    channels = torch.arange(3, device=images.device)
    own = (channels - thirds[:, None].long()) % 3
    other = (own + torch.where(rest > 0, 1, -1)[:, None]) % 3
    first = 3 * torch.arange(len(images), device=images.device)[:, None]
    planes = images.flatten(0, 1)
    x, y = (planes[(first + order).flatten()].view_as(images) for order in (own, other))
    low, high = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    d = (high - low) * _column(rest.abs())
    difference = x - y
    raised = torch.clamp(difference + (low + d), x, high)
    lowered = torch.clamp(difference.add_(high - d), low, x)
    return raised.add_(lowered).sub_(x)


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

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """n x 8: the four factors, then the adjustment to apply first, second, third, fourth."""
        factors = (2 * torch.rand(n, 4, generator=generator) - 1) * self.strength
        factors[:, :3] += 1
        order = torch.rand(n, 4, generator=generator).argsort(dim=1)
        return torch.cat([factors, order], dim=1)

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        factors = rows[:, :4].to(images.device, non_blocking=True)
        for chosen in rows[:, 4:].long().unbind(1):
            for k in set(chosen.tolist()):
                images = _replaced(images, chosen == k, self.adjustments[k], factors[:, k])
        return images

    def pil_transform(self, _: int) -> Transform:
        return transforms.ColorJitter(*[self.strength] * 4)


def _empty_channels_last(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, device=device, memory_format=torch.channels_last)
    n, channels, height, width = shape
    # numpy asks for huge pages: to touch new pages of 4 KB costs as much as to jitter the colors
    pixels = np.empty((n, height, width, channels), np.float32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Augmentation:
    """A chain of operations ending in normalization: what turns stored bytes into network input.

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

    @property
    def starts_with_crop(self) -> bool:
        """Whether the first operation is one that readers of files apply while they decode."""
        return bool(self.ops) and isinstance(self.ops[0], RandomResizedCrop)

    def without_crop(self) -> "Augmentation":
        """What remains to be done with images that come from such a reader."""
        rest = copy(self)
        rest.ops = self.ops[self.starts_with_crop :]
        return rest

    def sample_params(self, n: int, generator: Generator) -> list[Tensor]:
        """One n x k tensor of random numbers per operation, on the CPU on every device."""
        return [op.sample_params(n, generator) for op in self.ops]

    def pil_transform(self, size: int) -> transforms.Compose:
        """The same for one Pillow image at a time -> normalized C x S x S float32."""
        stats = self.mean.flatten().tolist(), self.std.flatten().tolist()
        gray = [transforms.Grayscale()] if self.gray else []
        ending = (*gray, transforms.ToTensor(), transforms.Normalize(*stats))
        return transforms.Compose([*(op.pil_transform(size) for op in self.ops), *ending])

    def __call__(self, images: Tensor, rows: Sequence[Tensor] = ()) -> Tensor:
        """B x 3 x H x W bytes -> normalized float32 in channels-last memory order."""
        n, channels, *size = images.shape
        shape = (n, 1 if self.gray else channels, *size)
        out = _empty_channels_last(shape, images.device)
        step = max(1, n if images.is_cuda else CACHED // (channels * math.prod(size)))
        for start in range(0, n, step):
            part = slice(start, start + step)
            out[part] = self._normalized(images[part], [values[part] for values in rows])
        return out

    def _normalized(self, images: Tensor, rows: Sequence[Tensor]) -> Tensor:
        x = images.float().div_(255)
        for op, values in zip(self.ops, rows, strict=True):
            x = op(x, values)
        x = to_gray(x) if self.gray else x
        mean, std = (s.to(x.device, non_blocking=True) for s in (self.mean, self.std))
        return (x - mean).div_(std)


def instance_ops(
    crop: str = "RandomResizedCrop", scale: float = 0.2, *, gray_first: bool = False
) -> list[Op]:
    """The published augmentation of phase 1 (Wu et al. 2018): crop, jitter, gray, flip.

    Args:
        gray_first: gray before the jitter, as published for ImageNet: a gray image keeps no jitter of its
            colors, but that of brightness and contrast.
    """
    if crop not in ("RandomResizedCrop", "PadCrop"):
        raise ValueError(f"unknown crop {crop!r}: take RandomResizedCrop or PadCrop")
    first = RandomResizedCrop(scale) if crop == "RandomResizedCrop" else PadCrop()
    colors: list[Op] = [ColorJitter(0.4), RandomGrayscale(0.2)]
    return [first, *(colors[::-1] if gray_first else colors), RandomHorizontalFlip()]


def finetune_ops() -> list[Op]:
    """The published augmentation of phase 3: reflect-pad and crop, flip."""
    return [PadCrop(), RandomHorizontalFlip()]
