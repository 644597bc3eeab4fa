"""The interface of every data set, and data sets held in memory."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from datasets.resizing import Resizing

UNKNOWN = -1  # the target of an image without a label

Stats = tuple[
    tuple[float, float, float], tuple[float, float, float]
]  # mean, std of R, G, B in [0, 1]

CIFAR10_STATS: Stats = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATS: Stats = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The published colorization networks read scikit-image's `rgb2gray`: these weights of red, green and blue,
# and values in [0, 1] as they are.
GRAY_LUMA = (0.2125, 0.7154, 0.0721)
GRAY_STATS: Stats = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class DataSet:
    """The interface of every data set.

    Attributes:
        in_memory: whether `images` holds all images as bytes; otherwise workers read them from files.
        name: name of the data set, as in `--dataset`.
        targets: N int64 class numbers, or `UNKNOWN`.
        classes: class names, one for each class number.
        stats: mean and standard deviation per channel, for values in [0, 1].
        paths: file of each image; empty if the images do not come from single files.
        image_size: side in pixels of the square images that a network sees.
        evaluation_resize: length of the shorter side in evaluation, before the central crop.
        digest: 16 hexadecimal digits that change with the images, their order or their labels.
        portable_digest: the digest if it does not depend on how the images are held, else empty.
    """

    in_memory: ClassVar[bool]
    name: str
    targets: Tensor
    classes: tuple[str, ...]
    stats: Stats
    paths: tuple[str, ...]
    image_size: int
    evaluation_resize: int
    digest: str
    portable_digest: str

    def picture(self, index: int) -> Tensor:
        """Return an image as evaluation shows it, 3 x S x S bytes."""
        raise NotImplementedError

    def for_workers(self) -> Any:
        """Return the object with `pil_image(index)` that worker processes read single images from."""
        raise NotImplementedError

    def resized_by(self, _: Resizing) -> "DataSet":
        """Return the same set with another resizing in evaluation, if its images are in files."""
        return self

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_all_targets(self) -> bool:
        return bool((self.targets != UNKNOWN).all())


@dataclass(frozen=True)
class ImageSet(DataSet):
    """A set of equally sized images held as bytes, so that a batch is one indexing operation.

    Attributes:
        images: N x 3 x S x S uint8.
        contents: digest of those files' bytes.
    """

    in_memory: ClassVar[bool] = True

    name: str
    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    stats: Stats
    paths: tuple[str, ...] = ()
    contents: str = ""

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8
        assert self.images.ndim == 4
        assert self.targets.dtype == torch.int64
        assert len(self.targets) == len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], int(self.targets[index]), index

    def picture(self, index: int) -> Tensor:
        return self[index][0]

    def for_workers(self) -> "ImageSet":
        return self

    def pil_image(self, index: int) -> Image.Image:
        """Return an image as a Pillow image."""
        return Image.fromarray(self.picture(index).permute(1, 2, 0).numpy())

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    @property
    def evaluation_resize(self) -> int:
        return self.image_size  # images in memory are shown whole

    @property
    def portable_digest(self) -> str:
        return self.digest

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the images, their order or their labels.

        Names and contents of files stand for the images if there are files: another version of a JPEG
        decoder may change a pixel by one step, and the digest must not change with it.
        """
        state = hashlib.sha256(f"{len(self)} {self.classes}".encode())
        state.update(self.targets.numpy().tobytes())
        if self.paths:
            state.update("\n".join((*self.paths, self.contents)).encode())
        else:
            state.update(self.images.numpy().tobytes())
        return state.hexdigest()[:16]
