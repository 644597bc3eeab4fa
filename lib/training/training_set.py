"""The training images of phase 3: labeled ones, and the most confident pseudo-labeled ones."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets import UNKNOWN, DataSet
from lib.labels import pseudo_files, pseudo_labels
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import expected_count, labeled_split
from lib.training.settings import FinetuningSettings as Settings


@dataclass(frozen=True)
class TrainingSet:
    """The training images by index, their labels and the weights of their losses.

    The first `num_labeled` have their true labels, the others have pseudo-labels.
    """

    indexes: Tensor
    labels: Tensor
    weights: Tensor
    num_labeled: int

    def __str__(self) -> str:
        num_pseudo = len(self.labels) - self.num_labeled
        return f"{self.num_labeled} labeled and {num_pseudo} pseudo-labeled images"

    @property
    def digest(self) -> str:
        parts = (self.indexes, self.labels, self.weights)
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()[:16]


def read_pseudo_labels(file: str, folder: str) -> list[PseudoLabels]:
    """Read the pseudo-labels of one file or of a folder of chunks, or none."""
    if folder:
        return pseudo_files.load_chunks(folder)
    return [pseudo_files.load(file)] if file else []


def choose_training_set(
    train: DataSet, parts: Sequence[PseudoLabels], settings: Settings, *, source: str = ""
) -> TrainingSet:
    """Choose the labeled images with their true labels, then the most confident of the pseudo-labeled ones.

    Pseudo-labels are in `parts` or whole; without any, only the labeled images are chosen. With
    `pseudo_per_chunk` each part is ranked by itself and gives the same fraction.

    Raises:
        ValueError: if they do not fit the data set and the requested number of labels.
    """
    classes, count = train.num_classes, settings.num_labeled
    if not parts:
        labeled = labeled_split(train.targets, count, classes, settings.rng_seed).labeled
        groups: Sequence[PseudoLabels] = []
    else:
        try:
            whole = pseudo_labels.merged(parts)
            expected = expected_count(count, train.targets, classes)
            whole.require_fit(len(train), classes, expected, train.digest, train.classes)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        labeled = whole.labeled
        groups = parts if settings.pseudo_per_chunk else [whole]
    true = train.targets[labeled]
    if (true == UNKNOWN).any():
        raise ValueError(f"{source}: a labeled image has no label in this data set")
    indexes, labels, weights = [labeled], [true], [torch.ones(len(true))]
    for group in groups:
        best = group.select(settings.pseudo_ratio, class_balanced=settings.class_balanced)
        confidence = group.confidence[best].float()
        indexes.append(group.indexes[best])
        labels.append(group.labels[best])
        weights.append(confidence if settings.confidence_weighted else torch.ones(len(best)))
    return TrainingSet(torch.cat(indexes), torch.cat(labels), torch.cat(weights), len(true))
