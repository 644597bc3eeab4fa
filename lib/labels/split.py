"""Which images count as labeled: the published class-balanced split, bit for bit, or those of a list."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets.images import UNKNOWN
from lib.labels import chosen
from lib.labels.chosen import Images
from lib.labels.pseudo_labels import listed

ALL = "all"
LIST = ".csv"  # ends the name of a list of images


@dataclass(frozen=True)
class Split:
    """Indexes of the labeled and the unlabeled images, int64.

    They stand class by class in the order of the draw; those of a list are in its order, then the others in
    theirs.
    """

    labeled: Tensor
    unlabeled: Tensor


def parse_num_labeled(text: str | int) -> int | str:
    """Read a number of labeled images: an integer, `all`, or the name of a list of images (*.csv).

    Anything else is a ValueError.
    """
    if text == ALL or str(text).endswith(LIST):
        return str(text)
    try:
        return int(str(text))  # of the text, so that 2.5 is refused and not cut down
    except ValueError:
        raise ValueError(
            f"{text!r} is not a number of labeled images: give an integer or all, or a list (FILE{LIST})"
        ) from None


def is_list(num_labeled: int | str) -> bool:
    """Return whether the labeled images are those of a list."""
    return str(num_labeled).endswith(LIST)


def name_of(num_labeled: int | str) -> str:
    """Return the name of what is made with these labels: their number, `all`, or the name of their list."""
    return Path(str(num_labeled)).stem if is_list(num_labeled) else str(num_labeled)


def expected_count(num_labeled: int | str, targets: Tensor, num_classes: int) -> int:
    """Count the images that `labeled_split` labels: `num_labeled` cut down to a multiple of the classes."""
    if num_labeled == ALL:
        return int((targets != UNKNOWN).sum())
    if is_list(num_labeled):
        return len(chosen.read(num_labeled).indexes)
    return int(parse_num_labeled(num_labeled)) // num_classes * num_classes


def labeled_split(
    targets: Tensor,
    num_labeled: int | str,
    num_classes: int,
    seed: int = 0,
    *,
    images: Images | None = None,
) -> Split:
    """Draw `num_labeled` labeled images, equally many of each class, or take those of a list.

    As published: `perm = randperm(N)` under the seed; of every class the first `num_labeled // C`
    members in the order of `perm` are labeled, the others are not. Images without a known target
    come last among the unlabeled ones.

    Args:
        targets: N class numbers, `UNKNOWN` where an image has no label.
        num_labeled: number of labels to use, or `all` for every known one, balanced or not; or a list of
            images (`lib.labels.chosen`), which may leave classes out.
        num_classes: C.
        seed: seed of the draw; the published files were made with 0.
        images: the images, to find those of a list among them.

    Raises:
        ValueError: if a class has too few labeled images, or none, or a target is not a class number; if a
            list is of other images, or one of them has no known label.

    Warns:
        UserWarning: about classes without a label in a list.
    """
    num_labeled = parse_num_labeled(num_labeled)
    if not num_classes:
        raise ValueError(
            "no image has a label: scripts/choose.py says which to label, and labels.csv (path,label) in the "
            "folder of the images holds their labels"
        )
    strange = targets[(targets != UNKNOWN) & ((targets < 0) | (targets >= num_classes))]
    if len(strange):
        raise ValueError(
            f"class {int(strange[0])} among {num_classes} classes (0 to {num_classes - 1})"
        )
    if is_list(num_labeled):
        return _split_of_list(str(num_labeled), targets, num_classes, images)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    shuffled = targets[order]
    members = [order[shuffled == label] for label in range(num_classes)]
    per_class = len(targets)
    if isinstance(num_labeled, int):
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


def _split_of_list(path: str, targets: Tensor, num_classes: int, images: Images | None) -> Split:
    labeled = chosen.find(path, len(targets), images)
    unknown = labeled[targets[labeled] == UNKNOWN].tolist()
    if unknown:
        names = [images.paths[i] if images and images.paths else f"image {i}" for i in unknown]
        raise ValueError(
            f"{path}: {len(unknown)} of its {len(labeled)} images have no known label ({listed(names)}); "
            "fill in labels.csv and put it into the folder of the images, or take their lines out of the list"
        )
    counts = torch.bincount(targets[labeled], minlength=num_classes)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        classes = [images.classes[c] if images and images.classes else str(c) for c in empty]
        warnings.warn(
            f"{path} holds no image of class {listed(classes)}: no image will get "
            f"{'it' if len(empty) == 1 else 'them'}",
            stacklevel=3,
        )
    return Split(labeled, others(len(targets), labeled))


def others(num_images: int, labeled: Tensor) -> Tensor:
    """Return the indexes of the images that are not among `labeled`."""
    unlabeled = torch.ones(num_images, dtype=torch.bool, device=labeled.device)
    unlabeled[labeled] = False
    return unlabeled.nonzero()[:, 0]


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
