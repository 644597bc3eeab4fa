"""How sure a pseudo-label is: the measures of confidence, and pseudo-labels ranked by one of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib.labels.pseudo_labels import TOP, PseudoLabels
from lib.labels.split import Split

TILE = 2**24  # scores at a time, 64 MB: those of a million images and a thousand classes are 4 GB


def _build(
    scores: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None,
    measure: Callable[[Tensor], Tensor],
    as_probabilities: Callable[[Tensor], Tensor] | None,
) -> PseudoLabels:
    """Rank the unlabeled images by confidence, `TILE` scores at a time.

    Args:
        scores: N x C, the higher the more likely.
        measure: function from rows of scores to their confidence.
        as_probabilities: function from rows of scores to their probabilities; None leaves these out.
    """
    count, num_classes = len(split.unlabeled), scores.shape[1]
    height = max(1, TILE // num_classes)
    tiles = [slice(start, start + height) for start in range(0, count, height)]
    confidence = scores.new_empty(count)
    top_classes = torch.empty(count, min(TOP, num_classes), dtype=torch.int32)
    labels = torch.empty_like(split.unlabeled)
    for tile in tiles:
        rows = scores[split.unlabeled[tile]]
        confidence[tile], labels[tile] = measure(rows), rows.argmax(dim=1)
        top_classes[tile] = rows.topk(top_classes.shape[1], dim=1).indices
    order = confidence.argsort(descending=True, stable=True)
    indexes, probabilities = split.unlabeled[order], None
    if as_probabilities is not None:
        probabilities = scores.new_empty(count, num_classes)
        # Computed in sorted order, as sorting them afterwards would take a second copy.
        for tile in tiles:
            probabilities[tile] = as_probabilities(scores[indexes[tile]])
    return PseudoLabels(
        indexes,
        labels[order],
        confidence[order],
        split.labeled,
        split.unlabeled,
        probabilities,
        meta or {},
        top_classes[order],
    )


def margin_confidence(probabilities: Tensor) -> Tensor:
    """Return 1 - p2 / p1 of the two largest probabilities of each row: N numbers in [0, 1].

    For p = softmax(z / T) this is 1 - exp(-(z1 - z2) / T), the published confidence of the normalized cut.

    >>> margin_confidence(torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.4, 0.2]]))
    tensor([0.5000, 0.0000])
    """
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return 1 - second / first


def entropy_confidence(probabilities: Tensor) -> Tensor:
    """Return 1 - H(p) / log C of each row: N numbers, 1 for a certain row, 0 for a uniform one.

    This is eq. 11 of Iscen et al. 2019, "Label propagation for deep semi-supervised learning".

    Args:
        probabilities: N x C, for at least two classes.

    >>> entropy_confidence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([1., 0.])
    """
    entropy = torch.special.entr(probabilities).sum(dim=1)
    return (1 - entropy / math.log(probabilities.shape[1])).clamp(0, 1)


def largest_confidence(probabilities: Tensor) -> Tensor:
    """Return the largest probability of each row, the published confidence of nearest neighbors."""
    return probabilities.amax(dim=1)


CONFIDENCES = {
    "margin": margin_confidence,
    "entropy": entropy_confidence,
    "largest": largest_confidence,
}


def _confidence(name: str) -> Callable[[Tensor], Tensor]:
    if name not in CONFIDENCES:
        raise ValueError(f"unknown confidence {name!r}: take one of {', '.join(CONFIDENCES)}")
    return CONFIDENCES[name]


def from_probabilities(
    probabilities: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None = None,
    *,
    confidence: str = "largest",
) -> PseudoLabels:
    """Make pseudo-labels from N x C probabilities, as nearest neighbors give them.

    Args:
        probabilities: one row for each image of the training set.
        split: which images are labeled; the others get pseudo-labels.
        meta: record of what made the probabilities.
        confidence: a key of `CONFIDENCES`; published: the largest probability of each row.

    Raises:
        ValueError: if the confidence is unknown.
    """
    return _build(probabilities, split, meta, _confidence(confidence), lambda rows: rows)


def from_scores(
    scores: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None = None,
    *,
    temperature: float = 1.0,
    confidence: str = "margin",
    probabilities: bool = True,
) -> PseudoLabels:
    """Make pseudo-labels from N x C scores z, as the normalized cut gives them.

    Probabilities are softmax(z / T), and the confidence uses the same temperature T.

    Args:
        scores: one row for each image of the training set.
        split: which images are labeled; the others get pseudo-labels.
        meta: record of what made the scores.
        temperature: T.
        confidence: a key of `CONFIDENCES`; published: 1 - exp(-(z1 - z2) / T) with the two largest
            scores of a row.
        probabilities: False leaves them out, which saves as much memory as the scores take.

    Raises:
        ValueError: if the temperature is not positive, or the confidence is unknown.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    of_probabilities = _confidence(confidence)

    def as_probabilities(rows: Tensor) -> Tensor:
        return (rows / temperature).softmax(dim=1)

    def measure(rows: Tensor) -> Tensor:
        if confidence != "margin":
            return of_probabilities(as_probabilities(rows))
        # From the scores themselves: exact where probabilities are rounded to 1 or 0.
        first, second = rows.topk(2, dim=1).values.unbind(1)
        return -torch.expm1(-(first - second) / temperature)

    return _build(scores, split, meta, measure, as_probabilities if probabilities else None)
