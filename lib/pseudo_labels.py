"""Pseudo-labels: what phase 2 writes and phase 3 reads, checked whenever one is made, saved or loaded.

The file has the published keys: `pseudo_indexes`, `pseudo_labels` (int64, U), `pseudo_probs` (float32,
U x C), `pseudo_weights` (float32, U: the confidence), `labeled_indexes`, `unlabeled_indexes` (int64);
and `meta`, which is ours. The `pseudo_*` arrays are sorted by falling confidence.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib import checkpoint
from lib.split import Split

SLACK = 1e-4  # rounding of float32 probabilities
EPSILON = 1e-9  # rounding of a ratio times a count: 0.29 * 100 is 28.999999999999996


def _index_problems(name: str, indexes: Tensor) -> list[str]:
    if not isinstance(indexes, Tensor) or indexes.dtype != torch.int64 or indexes.ndim != 1:
        return [f"{name} is no int64 vector"]
    problems = []
    if len(indexes) and int(indexes.min()) < 0:
        problems.append(f"{name} holds the negative index {int(indexes.min())}")
    if len(torch.unique(indexes)) != len(indexes):
        problems.append(f"{name} holds an index twice")
    return problems


@dataclass(frozen=True)
class PseudoLabels:
    """Labels for unlabelled images, most confident first.

    Attributes:
        indexes: U, into the training set.
        labels: U class numbers.
        confidence: U, in [0, 1], falling.
        labeled: L indexes of the images whose true labels were used.
        unlabeled: indexes of the images to label.
        probabilities: U x C, or None (the published ImageNet files have none).
        meta: what made them.

    Raises:
        ValueError: listing every problem, on construction.
    """

    indexes: Tensor
    labels: Tensor
    confidence: Tensor
    labeled: Tensor
    unlabeled: Tensor
    probabilities: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("these pseudo-labels are not usable: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with them in themselves, one sentence each; empty if nothing is."""
        found = _index_problems("pseudo_indexes", self.indexes)
        found += _index_problems("labeled_indexes", self.labeled)
        found += _index_problems("unlabeled_indexes", self.unlabeled)
        if found:
            return found
        if torch.isin(self.indexes, self.labeled).any():
            found.append("an image is both labelled and pseudo-labelled")
        if not torch.isin(self.indexes, self.unlabeled).all():
            found.append("a pseudo-labelled image is not among unlabeled_indexes")
        if not isinstance(self.meta, Mapping):
            found.append(f"meta is a {type(self.meta).__name__}, not a record of names and values")
        labels = self._label_problems()
        found += labels + self._confidence_problems()
        return found if labels else found + self._probability_problems()

    def _label_problems(self) -> list[str]:
        labels = self.labels
        if labels.dtype != torch.int64 or labels.shape != self.indexes.shape:
            return [
                f"pseudo_labels of shape {tuple(labels.shape)} and type {labels.dtype} for "
                f"{len(self.indexes)} indexes; int64 is expected"
            ]
        if len(labels) and int(labels.min()) < 0:
            return [f"the label {int(labels.min())} is negative"]
        return []

    def _confidence_problems(self) -> list[str]:
        weights = self.confidence
        if not weights.is_floating_point() or weights.shape != self.indexes.shape:
            return [
                f"pseudo_weights of shape {tuple(weights.shape)} and type {weights.dtype} for "
                f"{len(self.indexes)} indexes; floats are expected"
            ]
        if not torch.isfinite(weights).all():
            return ["pseudo_weights hold NaN or infinity"]
        if len(weights) and (weights.min() < -SLACK or weights.max() > 1 + SLACK):
            return ["pseudo_weights leave [0, 1]"]
        # against all before, not the one before: small steps add up to a ranking upside down
        if len(weights) and (weights - weights.cummin(0).values > SLACK).any():
            return ["pseudo_weights do not fall"]
        return []

    def _probability_problems(self) -> list[str]:
        """Of `probabilities`, beside `labels` that are fine."""
        probs = self.probabilities
        if probs is None:
            return []
        if probs.ndim != 2 or len(probs) != len(self.indexes) or not probs.is_floating_point():
            return [f"pseudo_probs of shape {tuple(probs.shape)} for {len(self.indexes)} indexes"]
        if not torch.isfinite(probs).all() or (probs < -SLACK).any():
            return ["pseudo_probs hold NaN, infinity or negative values"]
        if ((probs.sum(dim=1) - 1).abs() > 10 * SLACK).any():
            return ["rows of pseudo_probs do not sum to 1"]
        if len(self.labels) and int(self.labels.max()) >= probs.shape[1]:
            return [
                f"label {int(self.labels.max())} is out of range for {probs.shape[1]} probabilities"
            ]
        own = probs.gather(1, self.labels[:, None])[:, 0]
        if (probs.amax(dim=1) - own > SLACK).any():
            return ["a label is not the most probable one of its row"]
        return []

    def require_fit(
        self, num_images: int, num_classes: int, num_labeled: int, digest: str = ""
    ) -> None:
        """Check them against a data set and the number of labels asked for.

        Raises:
            ValueError: listing every problem.
        """
        problems = []
        everything = torch.cat([self.indexes, self.labeled, self.unlabeled])
        if len(everything) and int(everything.max()) >= num_images:
            problems.append(f"index {int(everything.max())} in a data set of {num_images} images")
        if len(self.labels) and int(self.labels.max()) >= num_classes:
            problems.append(
                f"label {int(self.labels.max())} in a data set of {num_classes} classes"
            )
        if self.probabilities is not None and self.probabilities.shape[1] != num_classes:
            problems.append(
                f"{self.probabilities.shape[1]} probabilities for {num_classes} classes"
            )
        if len(self.labeled) != num_labeled:
            problems.append(
                f"made with {len(self.labeled)} labelled images, but --num-labeled asks for {num_labeled}"
            )
        recorded = self.meta.get("data_digest", "")
        if recorded and digest and recorded != digest:
            problems.append(f"made for another data set (digest {recorded}, this one has {digest})")
        if problems:
            raise ValueError("; ".join(problems))

    def select(self, ratio: float, *, class_balanced: bool = False) -> Tensor:
        """Positions of the most confident share, in the order of the file.

        Args:
            ratio: share to take, 0 to 1, rounded down.
            class_balanced: take this share of each pseudo-class instead of the whole ranking, rounded
                up, so that no class is left out. The most confident labels crowd into few classes;
                training on those alone forgets the others.

        Raises:
            ValueError: for a ratio outside of [0, 1].
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"pseudo ratio {ratio}: must lie in [0, 1]")
        if not class_balanced:
            return torch.arange(math.floor(ratio * len(self.indexes) + EPSILON))
        # rank of each image within its own class; stable, so that confidence still decides
        rank = torch.empty_like(self.labels)
        size = torch.bincount(self.labels)
        for label in range(len(size)):
            members = (self.labels == label).nonzero()[:, 0]
            rank[members] = torch.arange(len(members))
        quota = torch.ceil(ratio * size.double() - EPSILON)
        return (rank < quota[self.labels]).nonzero()[:, 0]

    def state(self) -> dict[str, Any]:
        """The published keys, and `meta`."""
        entries = {
            "pseudo_indexes": self.indexes,
            "pseudo_labels": self.labels,
            "pseudo_weights": self.confidence,
            "labeled_indexes": self.labeled,
            "unlabeled_indexes": self.unlabeled,
            "meta": dict(self.meta),
        }
        if self.probabilities is not None:
            entries["pseudo_probs"] = self.probabilities
        return entries


def save(pseudo: PseudoLabels, path: str | Path) -> None:
    """Write a pseudo-label file."""
    checkpoint.save(pseudo.state(), path)


def load(path: str | Path) -> PseudoLabels:
    """Read a pseudo-label file, ours or a published one.

    Where there are no `pseudo_weights` (the published kNN files), the largest probability is the
    confidence.

    Raises:
        ValueError: naming the file and everything that is wrong with it.
    """
    keys = ("pseudo_indexes", "pseudo_labels", "labeled_indexes", "unlabeled_indexes")
    state = checkpoint.load_dict(path, *keys)
    probs, weights = state.get("pseudo_probs"), state.get("pseudo_weights")
    if probs is None and weights is None:
        raise ValueError(f"{path} has neither pseudo_weights nor pseudo_probs")
    kinds = [key for key in (*keys, "pseudo_probs", "pseudo_weights") if key in state]
    wrong = [
        key
        for key in kinds
        if not isinstance(state[key], Tensor) or state[key].layout != torch.strided
    ]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be dense tensors")
    if weights is None:
        weights = probs.amax(dim=1) if probs.ndim == 2 and probs.shape[1] else probs
    try:
        return PseudoLabels(
            state["pseudo_indexes"],
            state["pseudo_labels"],
            weights,
            state["labeled_indexes"],
            state["unlabeled_indexes"],
            probs,
            state.get("meta", {}),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _build(
    probabilities: Tensor, confidence: Tensor, labels: Tensor, split: Split, meta: Mapping[str, Any]
) -> PseudoLabels:
    chosen = split.unlabeled
    confidence = confidence[chosen]
    order = confidence.argsort(descending=True, stable=True)
    indexes = chosen[order]
    return PseudoLabels(
        indexes,
        labels[indexes],
        confidence[order],
        split.labeled,
        split.unlabeled,
        probabilities[indexes],
        meta,
    )


def from_probabilities(
    probabilities: Tensor, split: Split, meta: Mapping[str, Any] | None = None
) -> PseudoLabels:
    """Pseudo-labels from N x C probabilities (kNN): confidence is the largest of each row."""
    confidence, labels = probabilities.max(dim=1)
    return _build(probabilities, confidence, labels, split, meta or {})


def from_scores(
    scores: Tensor, split: Split, meta: Mapping[str, Any] | None = None, *, temperature: float = 1.0
) -> PseudoLabels:
    """Pseudo-labels from N x C scores (normalised cut).

    Confidence is 1 - exp(-(z1 - z2) / T) with the two largest scores of a row, probabilities are
    softmax(z / T): the same temperature in both.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    first, second = scores.topk(2, dim=1).values.unbind(1)
    confidence = -torch.expm1(-(first - second) / temperature)
    return _build(
        (scores / temperature).softmax(dim=1), confidence, scores.argmax(dim=1), split, meta or {}
    )
