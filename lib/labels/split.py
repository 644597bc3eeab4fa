"""Which images count as labeled: the published class-balanced split, bit for bit."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import UNKNOWN

ALL = "all"


@dataclass(frozen=True)
class Split:
    """Indexes of the labeled and the unlabeled images, int64, class by class in the order of the draw."""

    labeled: Tensor
    unlabeled: Tensor


def parse_num_labeled(text: str | int) -> int | str:
    """Read a number of labeled images, an integer or `all`; anything else is a ValueError."""
    if text == ALL:
        return ALL
    try:
        return int(str(text))  # of the text, so that 2.5 is refused and not cut down
    except ValueError:
        raise ValueError(
            f"{text!r} is not a number of labeled images: give an integer or all"
        ) from None


def expected_count(num_labeled: int | str, targets: Tensor, num_classes: int) -> int:
    """Count the images that `labeled_split` labels: `num_labeled` cut down to a multiple of the classes."""
    if num_labeled == ALL:
        return int((targets != UNKNOWN).sum())
    return parse_num_labeled(num_labeled) // num_classes * num_classes


def labeled_split(
    targets: Tensor, num_labeled: int | str, num_classes: int, seed: int = 0
) -> Split:
    """Draw `num_labeled` labeled images, equally many of each class.

    As published: `perm = randperm(N)` under the seed; of every class the first `num_labeled // C`
    members in the order of `perm` are labeled, the others are not. Images without a known target
    come last among the unlabeled ones.

    Args:
        targets: N class numbers, `UNKNOWN` where an image has no label.
        num_labeled: number of labels to use, or `all` for every known one, balanced or not.
        num_classes: C.
        seed: seed of the draw; the published files were made with 0.

    Raises:
        ValueError: if a class has too few labeled images, or none, or a target is not a class number.
    """
    num_labeled = parse_num_labeled(num_labeled)
    strange = targets[(targets != UNKNOWN) & ((targets < 0) | (targets >= num_classes))]
    if len(strange):
        raise ValueError(
            f"class {int(strange[0])} among {num_classes} classes (0 to {num_classes - 1})"
        )
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    shuffled = targets[order]
    members = [order[shuffled == label] for label in range(num_classes)]
    per_class = len(targets)
    if num_labeled != ALL:
        per_class = num_labeled // num_classes
        if per_class < 1:
            raise ValueError(
                f"{num_labeled} labeled images for {num_classes} classes: give {num_classes} at least"
            )
        if num_labeled % num_classes:
            warnings.warn(
                f"{num_labeled} is not a multiple of {num_classes} classes; using "
                f"{per_class * num_classes} labeled images, {per_class} of each class",
                stacklevel=2,
            )
    for label, own in enumerate(members):
        if not len(own):
            raise ValueError(f"class {label} has no labeled image; every class needs one at least")
        if num_labeled != ALL and len(own) < per_class:
            raise ValueError(
                f"class {label} has {len(own)} labeled images and {per_class} are asked for; lower the "
                "number of labels"
            )
    unknown = order[shuffled == UNKNOWN]
    return Split(
        torch.cat([own[:per_class] for own in members]),
        torch.cat([own[per_class:] for own in members] + [unknown]),
    )


def cut_into_chunks(split: Split, num_chunks: int, seed: int = 0) -> list[Tensor]:
    """Shuffle the unlabeled images and cut them into parts of equal size, up to one image.

    The published lists are cut in the order of the true classes, so that a chunk holds a tenth of the
    classes and gives its labels away. Fewer images than chunks are a ValueError.
    """
    if not 1 <= num_chunks <= len(split.unlabeled):
        raise ValueError(f"{num_chunks} chunks of {len(split.unlabeled)} unlabeled images")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split.unlabeled), generator=generator)
    return list(split.unlabeled[order].tensor_split(num_chunks))
