"""Labeled images with their classes, and what every algorithm asks of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Labeling(NamedTuple):
    """Labeled images and their classes: L indexes, L class numbers, int64, on the graph's device."""

    labeled: Tensor
    labels: Tensor


def check_labels(num_images: int, labeled: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless `labeled` (indexes) and `labels` (classes) describe labeled images."""
    if len(labeled) != len(labels) or len(labeled) == 0:
        raise ValueError(f"{len(labeled)} labeled images with {len(labels)} labels")
    if int(labeled.min()) < 0 or int(labeled.max()) >= num_images:
        raise ValueError(f"labeled indexes must lie in 0 ... {num_images - 1}")
    if len(torch.unique(labeled)) != len(labeled):
        raise ValueError("a labeled image is named twice")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0 ... {num_classes - 1}")


def check_every_class(labels: Tensor, num_classes: int, algorithm: str) -> None:
    """Raise ValueError unless there are two classes at least and a label of each."""
    empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero()[:, 0]
    if len(empty) or num_classes < 2:
        raise ValueError(
            f"{algorithm} needs two classes, and a labeled image of each; none of class "
            f"{empty.tolist()}. Give a label of it, or take knn"
        )
