"""Augmentation of whole batches, each image with random numbers of its own.

Every operation has two parts: `sample_params(n, generator)` draws one row of parameters per image on the CPU,
and calling the operation applies given parameters to given images, float32 in [0, 1], B x C x H x W, on their
device. The result for an image thus depends on its parameters alone, not on the device, batch or process.
The parameters are distributed as in torchvision's transforms of the same name, and the same parameters give
the same pixels (tests/datasets/test_transforms.py), up to torchvision's rounding to bytes. `pil_transform`
returns that transform, for one Pillow image at a time.

A GPU computes every operation for every image and selects: all shapes are fixed, the host reads no value, and
no constant is uploaded twice, so that a CUDA graph can hold the whole chain. A CPU, where arithmetic is
expensive, computes an operation for the images that it changes only.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor
from torchvision import transforms
from torchvision.transforms.functional import solarize

from datasets.images import Stats

LUMA = (0.299, 0.587, 0.114)  # weights of ITU-R 601, as in PIL's "L" mode
FEW = 16  # number of boxes up to which a CPU is faster one by one
CACHED = 2**18  # values that fit the cache of a CPU core: larger batches wait for the memory
RATIO = 4 / 3  # largest ratio of a crop's sides


Transform = Callable[[Image], Image]  # draws from torch's global generator


class Op(Protocol):
    def sample_params(self, n: int, generator: Generator) -> Tensor: ...

    def __call__(self, images: Tensor, params: Tensor) -> Tensor: ...

    def pil_transform(self, size: int) -> Transform:
        """Return torchvision's counterpart, for S x S Pillow images."""


def to_gray(images: Tensor, luma: Sequence[float] = LUMA) -> Tensor:
    """Convert images, ... x 3 x H x W, to ... x 1 x H x W sums of red, green and blue with weights `luma`."""
    r, g, b = images.split(1, dim=-3)
    return (r * luma[0]).add_(g, alpha=luma[1]).add_(b, alpha=luma[2])


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@cache
def constant(values: range | tuple[Any, ...], device: torch.device) -> Tensor:
    """Make a float32 tensor of `values`, uploaded once per device."""
    return torch.tensor(values, dtype=torch.float32).to(device)


def selects(images: Tensor) -> bool:
    """Return whether to compute an operation for all images and select, or for the chosen images only."""
    return images.is_cuda


def replaced(
    images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *values: Tensor
) -> Tensor:
    """Replace the chosen images by `change(images, *values)`.

    If all or none are chosen, as in a batch of one, a CPU copies nothing.
    """
    if selects(images):
        return torch.where(column(chosen), change(images, *values), images)
    members = chosen.nonzero()[:, 0]
    if len(members) == len(images):
        return change(images, *values)
    if not len(members):
        return images
    changed = change(images[members], *(value[members] for value in values))
    return images.index_copy(0, members, changed)


class RandomResizedCrop:
    """Crop of a fraction of the area, of aspect ratio 1 / `ratio` to `ratio`, resized (bilinear).

    torchvision draws up to ten candidates until one fits, and else takes the largest central crop of an
    allowed ratio (3/4 to 4/3 here, whatever the ratio). Here all ten are drawn at once, and the first that
    fits is taken.
    """

    tries = 10

    def __init__(self, min_scale: float, max_scale: float = 1.0, ratio: float = RATIO) -> None:
        if not 0 < min_scale <= max_scale <= 1:
            raise ValueError(f"crop scale {min_scale} ... {max_scale}: must lie in (0, 1]")
        self.min_scale, self.max_scale, self.ratio = min_scale, max_scale, ratio

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """Draw n x 22: top and left as fractions of the free room, then heights and widths of ten candidates.

        Heights and widths are fractions of the square root of the image's area.
        """
        area = torch.rand(n, self.tries, generator=generator)
        area = self.min_scale + area * (self.max_scale - self.min_scale)
        log_ratio = (2 * torch.rand(n, self.tries, generator=generator) - 1) * math.log(self.ratio)
        place = torch.rand(n, 2, generator=generator)
        width = (area * torch.exp(log_ratio)).sqrt()
        height = (area * torch.exp(-log_ratio)).sqrt()
        return torch.cat([place, height, width], dim=1)

    @classmethod
    def box(cls, params: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return top, left, height and width in whole pixels, for one image's parameters and (H, W)."""
        h, w = size
        side = math.sqrt(h * w)
        heights, widths = params[2 : 2 + cls.tries], params[2 + cls.tries :]
        for height, width in zip(heights, widths, strict=True):
            # rounding comes first, as published: in small images more crops then keep a whole side
            height, width = max(1, round(height * side)), max(1, round(width * side))
            if height <= h and width <= w:
                top, left = int(params[0] * (h - height + 1)), int(params[1] * (w - width + 1))
                return min(top, h - height), min(left, w - width), height, width
        return cls._central(size)

    @staticmethod
    def _central(size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the largest central box of an allowed ratio."""
        h, w = size
        height, width = min(h, round(w * RATIO)), min(w, round(h * RATIO))
        return (h - height) // 2, (w - width) // 2, height, width

    @classmethod
    def boxes(cls, params: Tensor, size: tuple[int, int]) -> Tensor:
        """Return B boxes in images of one size, B x 4 float32, on the device of the parameters.

        They are computed in float64, as in `box`, because a side that rounds differently is another crop.
        """
        if len(params) < FEW and not selects(params):
            found = [cls.box(row, size) for row in params.tolist()]
            return torch.tensor(found, dtype=torch.float32).view(-1, 4)
        limits = constant(size, params.device)
        places, sides = params.double().split([2, 2 * cls.tries], dim=1)
        sides = sides.unflatten(1, (2, cls.tries)) * math.sqrt(math.prod(size))
        sides = sides.round_().clamp_(min=1)
        fits = (sides <= limits[:, None]).all(dim=1)
        first = fits.byte().argmax(dim=1)  # argmax returns the first of equal values
        lengths = sides.gather(2, first[:, None, None].expand(-1, 2, 1))[:, :, 0]
        room = limits - lengths
        starts = (places * (room + 1)).floor_().minimum(room)
        found = torch.cat([starts, lengths], dim=1).float()
        central = constant(cls._central(size), params.device)
        return torch.where(fits.any(dim=1, keepdim=True), found, central)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        starts, lengths = self.boxes(params, (h, w))[:, :, None].split(2, dim=1)
        sides = constant((h, w), images.device)[:, None]
        spans = constant((max(h - 1, 1), max(w - 1, 1)), images.device)[:, None]
        steps = constant(range(max(h, w)), images.device) + 0.5  # pixel centers of both axes
        # clamping at the border of the crop, not of the image, is a crop followed by a resize
        inside = (steps * lengths / sides - 0.5).clamp_(min=0).minimum(lengths - 1) + starts
        y, x = (2 * inside / spans - 1).unbind(1)
        grid_y = y[:, :h, None].expand(-1, h, w)
        grid_x = x[:, None, :w].expand(-1, h, w)
        grid = torch.stack([grid_x, grid_y], dim=-1)
        return F.grid_sample(images, grid, align_corners=True, padding_mode="border")

    def pil_transform(self, size: int) -> Transform:
        scale, ratio = (self.min_scale, self.max_scale), (1 / self.ratio, self.ratio)
        return transforms.RandomResizedCrop(size, scale=scale, ratio=ratio)


class PadCrop:
    """Random crop of full size after reflection padding by an eighth of the side (4 pixels at 32)."""

    @staticmethod
    def padding(side: int) -> int:
        return max(1, side // 8)

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """Draw n x 2: vertical and horizontal place, as fractions of the free room."""
        return torch.rand(n, 2, generator=generator)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        pad = self.padding(h)
        padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
        offsets = (params * (2 * pad + 1)).long()
        steps = torch.arange(max(len(images), h, w), device=images.device)
        y, x = (offsets[:, :, None] + steps[: max(h, w)]).unbind(1)
        batch = steps[: len(images), None, None]
        pixels = padded.permute(0, 2, 3, 1)[batch, y[:, :h, None], x[:, None, :w]]
        return pixels.permute(0, 3, 1, 2)

    def pil_transform(self, size: int) -> Transform:
        pad = transforms.Pad(self.padding(size), padding_mode="reflect")
        return transforms.Compose([pad, transforms.RandomCrop(size)])


class RandomHorizontalFlip:
    def sample_params(self, n: int, generator: Generator) -> Tensor:
        return torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return replaced(images, params[:, 0] < 0.5, lambda chosen: chosen.flip(3))

    def pil_transform(self, _: int) -> Transform:
        return transforms.RandomHorizontalFlip()


class RandomGrayscale:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        return torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        chosen = params[:, 0] < self.probability
        return replaced(images, chosen, lambda x: to_gray(x).expand_as(x))

    def pil_transform(self, _: int) -> Transform:
        return transforms.RandomGrayscale(self.probability)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * column(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    channels = images.mean(dim=(2, 3), keepdim=True)  # their luminance is the mean luminance
    return (images * column(factor)).add_(to_gray(channels) * column(1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (images * column(factor)).add_(to_gray(images).mul_(column(1 - factor))).clamp_(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by `turn` (B, in revolutions), keeping HSV saturation and value.

    The conversion to HSV is not needed: a third of a revolution rotates the channels, and up to a sixth more
    is piecewise linear. It raises the middle channel by d = fraction * (max - min), toward the channel that
    follows, or lowers it; the part beyond max or min moves the channel that was max or min instead. With y
    the channel after x (before x, for a negative turn) that is, for every channel x,
    clamp(x - y + min + d, x, max) + clamp(x - y + max - d, min, x) - x.
    """
    sixths = (6 * turn + 3) % 6 - 3
    thirds = (sixths / 2).round()
    rest = sixths - 2 * thirds
    own = (constant(range(3), images.device) - thirds[:, None]).long() % 3
    other = (own + 1 + (rest <= 0)[:, None]) % 3  # two channels further is one back
    first = torch.arange(0, 3 * len(images), 3, device=images.device)[:, None]
    planes = images.flatten(0, 1)
    x, y = (planes[(first + order).flatten()].view_as(images) for order in (own, other))
    low, high = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    d = (high - low) * column(rest.abs())
    difference = x - y
    raised = torch.clamp(difference + (low + d), x, high)
    lowered = torch.clamp(difference.add_(high - d), low, x)
    return raised.add_(lowered).sub_(x)


def blend(images: Tensor, factor: Tensor, gray: Tensor, mean: Tensor) -> Tensor:
    """Scale each image by `factor` and add `gray` times its luminance and `mean` times the mean of that.

    Brightness adds nothing, contrast 1 - factor of the mean, saturation 1 - factor of the luminance.
    """
    luminance = to_gray(images)
    average = luminance.mean(dim=(2, 3), keepdim=True)
    added = (luminance * column(gray)).addcmul_(average, column(mean))
    return added.addcmul(images, column(factor)).clamp_(0, 1)


class ColorJitter:
    """Jitter of brightness, contrast, saturation and hue, in a random order for each image."""

    adjustments: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        adjust_brightness,
        adjust_contrast,
        adjust_saturation,
        adjust_hue,
    )

    def __init__(self, strength: float, hue: float | None = None) -> None:
        self.strength, self.hue = strength, strength if hue is None else hue

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """Draw n x 8: the four factors, then the adjustment to apply first, second, third, fourth."""
        factors = 2 * torch.rand(n, 4, generator=generator) - 1
        factors[:, :3] *= self.strength
        factors[:, 3] *= self.hue
        factors[:, :3] += 1
        order = torch.rand(n, 4, generator=generator).argsort(dim=1)
        return torch.cat([factors, order], dim=1)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        if selects(images):
            return self._through_all_stations(images, params)
        for chosen in params[:, 4:].long().unbind(1):
            for k in set(chosen.tolist()):
                images = replaced(images, chosen == k, self.adjustments[k], params[:, k])
        return images

    @staticmethod
    def _stations(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of six blends, B x 6 each: three before the hue is turned, three after.

        The first, second and third adjustment of an image may come before its hue, the second, third and
        fourth after it. A blend on the wrong side has the factor 1, which leaves every pixel as it is.
        """
        order = params[:, 4:]
        turned = (
            (order == 3).cumsum(dim=1)[:, :3].bool()
        )  # hue is turned by the first, second, third
        kinds = torch.cat([order[:, :3], order[:, 1:]], dim=1)
        idle = torch.cat([turned, ~turned], dim=1)
        factors = params.gather(1, kinds.long()).masked_fill_(idle, 1)
        rest = 1 - factors
        return factors, rest * (kinds == 2), rest * (kinds == 1)

    def _through_all_stations(self, images: Tensor, params: Tensor) -> Tensor:
        """Apply the same seven adjustments to every image, of which each needs four."""
        factor, gray, mean = self._stations(params)
        for station in range(6):
            if station == 3:
                images = adjust_hue(images, params[:, 3])
            images = blend(images, factor[:, station], gray[:, station], mean[:, station])
        return images

    def pil_transform(self, _: int) -> Transform:
        return transforms.ColorJitter(*[self.strength] * 3, self.hue)


class GaussianBlur:
    """Blur by a Gaussian of 0.1 to 2 pixels, over a tenth of the side and 3 pixels at least, as in SimCLR."""

    sigmas = 0.1, 2.0

    @staticmethod
    def kernel_size(side: int) -> int:
        return max(3, side // 10 // 2 * 2 + 1)

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """Draw n x 1: the standard deviation in pixels."""
        low, high = self.sigmas
        return low + (high - low) * torch.rand(n, 1, generator=generator)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        n, channels, h, w = images.shape
        half = self.kernel_size(min(h, w)) // 2
        places = constant(range(-half, half + 1), images.device)
        kernels = (-0.5 * (places / params) ** 2).exp()
        kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
        planes = images.reshape(1, n * channels, h, w)
        padded = F.pad(planes, (half, half, half, half), mode="reflect")
        rows = F.conv2d(padded, kernels[:, None, :, None], groups=n * channels)
        return F.conv2d(rows, kernels[:, None, None, :], groups=n * channels).view_as(images)

    def pil_transform(self, size: int) -> Transform:
        return transforms.GaussianBlur(self.kernel_size(size), self.sigmas)


class Solarize:
    """Inversion of every value that is not below half of the range."""

    threshold = 128  # of bytes

    def sample_params(self, n: int, _: Generator) -> Tensor:
        return torch.empty(n, 0)

    def __call__(self, images: Tensor, _: Tensor) -> Tensor:
        return torch.where(images * 255 < self.threshold, images, 1 - images)

    def pil_transform(self, _: int) -> Transform:
        return partial(solarize, threshold=self.threshold)


class RandomApply:
    """Another operation, applied to an image with the given probability."""

    def __init__(self, op: Op, probability: float) -> None:
        self.op, self.probability = op, probability

    def sample_params(self, n: int, generator: Generator) -> Tensor:
        """Draw n x (1 + k): whether it is applied, and the k numbers of the operation."""
        chance = torch.rand(n, 1, generator=generator)
        return torch.cat([chance, self.op.sample_params(n, generator)], dim=1)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return replaced(images, params[:, 0] < self.probability, self.op, params[:, 1:])

    def pil_transform(self, size: int) -> Transform:
        return transforms.RandomApply([self.op.pil_transform(size)], self.probability)


def _empty_channels_last(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, device=device, memory_format=torch.channels_last)
    n, channels, height, width = shape
    # numpy asks for huge pages: first access to pages of 4 KB costs as much as the color jitter
    pixels = np.empty((n, height, width, channels), np.float32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Augmentation:
    """A chain of operations and a normalization, which turn stored bytes into network input.

    Args:
        ops: operations in order; none for evaluation.
        stats: mean and standard deviation per channel.
        luma: weights of red, green and blue in the one channel of networks that read gray images, whose
            mean and standard deviation are the averages of `stats`; none for color.
    """

    def __init__(self, ops: Sequence[Op], stats: Stats, *, luma: Sequence[float] = ()) -> None:
        self.ops, self.luma = tuple(ops), tuple(luma)
        values = np.array(stats, np.float32)
        values = values.mean(axis=1, keepdims=True) if luma else values
        self.mean, self.std = map(tuple, values.tolist())

    @property
    def starts_with_crop(self) -> bool:
        """Whether readers of files apply the first operation while they decode."""
        return bool(self.ops) and isinstance(self.ops[0], RandomResizedCrop)

    def without_crop(self) -> "Augmentation":
        """Return the augmentation that remains for images from such a reader."""
        rest = copy(self)
        rest.ops = self.ops[self.starts_with_crop :]
        return rest

    def sample_params(self, n: int, generator: Generator) -> list[Tensor]:
        """Draw one n x k tensor of parameters per operation, always on the CPU."""
        return [op.sample_params(n, generator) for op in self.ops]

    def pil_transform(self, size: int) -> transforms.Compose:
        """Return the same chain for one Pillow image, to normalized C x S x S float32."""
        gray = [transforms.Lambda(partial(to_gray, luma=self.luma))] if self.luma else []
        ending = (transforms.ToTensor(), *gray, transforms.Normalize([*self.mean], [*self.std]))
        return transforms.Compose([*(op.pil_transform(size) for op in self.ops), *ending])

    def __call__(self, images: Tensor, params: Sequence[Tensor] = ()) -> Tensor:
        """Augment B x 3 x H x W bytes into normalized float32 in channels-last memory order.

        Parameters on another device are moved to that of the images.
        """
        params = [values.to(images.device, non_blocking=True) for values in params]
        n, channels, *size = images.shape
        shape = (n, 1 if self.luma else channels, *size)
        out = _empty_channels_last(shape, images.device)
        step = max(1, n if images.is_cuda else CACHED // (channels * math.prod(size)))
        for start in range(0, n, step):
            part = slice(start, start + step)
            out[part] = self._normalized(images[part], [values[part] for values in params])
        return out

    def _normalized(self, images: Tensor, params: Sequence[Tensor]) -> Tensor:
        x = images.float().div_(255)
        for op, values in zip(self.ops, params, strict=True):
            x = op(x, values)
        x = to_gray(x, self.luma) if self.luma else x
        mean, std = constant((self.mean, self.std), x.device)[:, None, :, None, None]
        return (x - mean).div_(std)


RESIZED_CROP, PAD_CROP = CROPS = ("RandomResizedCrop", "PadCrop")


def _first_op(crop: str, scale: float) -> Op:
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}: take {' or '.join(CROPS)}")
    return RandomResizedCrop(scale) if crop == RESIZED_CROP else PadCrop()


def instance_ops(
    crop: str = RESIZED_CROP, scale: float = 0.2, *, gray_first: bool = False
) -> list[Op]:
    """Return the published augmentation of phase 1 (Wu et al. 2018): crop, jitter, gray, flip.

    Args:
        crop: one of `CROPS`.
        scale: smallest share of the area that RandomResizedCrop keeps.
        gray_first: whether gray comes before the jitter, as published for ImageNet; a gray image then gets
            only the jitter of brightness and contrast.
    """
    colors: list[Op] = [ColorJitter(0.4), RandomGrayscale(0.2)]
    colors = colors[::-1] if gray_first else colors
    return [_first_op(crop, scale), *colors, RandomHorizontalFlip()]


def two_view_ops(crop: str = RESIZED_CROP, scale: float = 0.2) -> list[Op]:
    """Return an augmentation of SimCLR for small images (Chen et al. 2020): no blur, little gray."""
    colors = [RandomApply(ColorJitter(0.4, hue=0.1), 0.8), RandomGrayscale(0.1)]
    return [_first_op(crop, scale), RandomHorizontalFlip(), *colors]


def patch_ops(scale: float = 0.25) -> list[Op]:
    """Return the augmentation of EMP-SSL (Tong et al. 2023): square crops of one share of the area."""
    crop = RandomResizedCrop(scale, scale, ratio=1.0)
    colors = [RandomApply(ColorJitter(0.4, hue=0.2), 0.8), RandomGrayscale(0.2)]
    rare = [RandomApply(GaussianBlur(), 0.1), RandomApply(Solarize(), 0.1)]
    return [crop, RandomHorizontalFlip(), *colors, *rare]


def finetune_ops() -> list[Op]:
    """Return the published augmentation of phase 3: reflection padding and crop, flip."""
    return [PadCrop(), RandomHorizontalFlip()]
