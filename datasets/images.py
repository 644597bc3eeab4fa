"""The contract of every data set: targets, class names, where it came from; and images held in memory."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

UNKNOWN = -1  # the target of an image without a label

Stats = tuple[
    tuple[float, float, float], tuple[float, float, float]
]  # mean, std of R, G, B in [0, 1]

CIFAR10_STATS: Stats = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATS: Stats = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Labeled:
    """What follows from the targets and classes of a data set, however its images are held."""

    targets: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_all_targets(self) -> bool:
        return bool((self.targets != UNKNOWN).all())


@dataclass(frozen=True)
class ImageSet(Labeled):
    """A set of equally sized images held as bytes, so that a batch is one indexing operation.

    Attributes:
        name: what the user typed after `--dataset`.
        images: N x 3 x S x S, uint8.
        targets: N, int64; class number, or `UNKNOWN`.
        classes: class names; their number is the number of classes.
        stats: mean and standard deviation per channel, for values in [0, 1].
        paths: file of each image, empty where the images do not come from single files.
        contents: digest of those files' bytes.
    """

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

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the images, their order or their labels.

        Files stand for the images where there are files, by name and content: another version of a
        JPEG decoder may change a pixel by one step, and that must not turn a set into another one.
        """
        state = hashlib.sha256(f"{len(self)} {self.classes}".encode())
        state.update(self.targets.numpy().tobytes())
        if self.paths:
            state.update("\n".join((*self.paths, self.contents)).encode())
        else:
            state.update(self.images.numpy().tobytes())
        return state.hexdigest()[:16]
