"""How sure a pseudo-label is: the measures of confidence, and pseudo-labels ranked by one of them.

Every measure takes N x C scores z and a temperature T. Probabilities are p = softmax(z / T). Calibrated ones
have a temperature of their own on top of it, which changes neither labels nor confidence.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lib.labels.pseudo_labels import TOP, PseudoLabels
from lib.labels.split import Split

TILE = 2**24  # scores at a time, 64 MB: those of a million images and a thousand classes are 4 GB


def _softmax(scores: Tensor, temperature: float) -> Tensor:
    return (scores / temperature).softmax(dim=1)


def margin_confidence(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Return 1 - p2 / p1 of the two largest probabilities of each row: N numbers in [0, 1].

    This is 1 - exp(-(z1 - z2) / T), the published confidence of the normalized cut. It is computed from the
    scores themselves: exact where probabilities are rounded to 1 or 0.

    >>> margin_confidence(torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.4, 0.2]]).log())
    tensor([0.5000, 0.0000])
    """
    first, second = scores.topk(2, dim=1).values.unbind(1)
    return -torch.expm1(-(first - second) / temperature)


def entropy(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Return H(p) of each row in nats: N numbers from 0 to log C."""
    return torch.special.entr(_softmax(scores, temperature)).sum(dim=1)


def entropy_confidence(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Return 1 - H(p) / log C of each row: N numbers, 1 for a certain row, 0 for a uniform one.

    This is eq. 11 of Iscen et al. 2019, "Label propagation for deep semi-supervised learning".

    >>> entropy_confidence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log())
    tensor([1., 0.])
    """
    return (1 - entropy(scores, temperature) / math.log(scores.shape[1])).clamp(0, 1)


def largest_confidence(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the largest probability of each row, the published confidence of nearest neighbors."""
    return _softmax(scores, temperature).amax(dim=1)


CONFIDENCES = {
    "margin": margin_confidence,
    "entropy": entropy_confidence,
    "largest": largest_confidence,
}


def from_scores(
    scores: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None = None,
    *,
    temperature: float = 1.0,
    confidence: str = "margin",
    probabilities: bool = True,
    calibration: float = 1.0,
) -> PseudoLabels:
    """Make pseudo-labels of the unlabeled images from scores z, most confident first, on the CPU.

    Args:
        scores: N x C, one row for each image of the training set, on any device, where all is computed.
        meta: record of what made the scores.
        temperature: T of the probabilities and the confidence, as published.
        confidence: a key of `CONFIDENCES`.
        probabilities: False leaves them out, which saves as much memory as the scores take.
        calibration: temperature of the probabilities alone, times T (`lib.propagation.calibrate`).

    Raises:
        ValueError: if a temperature is not positive, or the confidence is unknown.
    """
    calibrated = temperature * calibration
    if not (temperature > 0 and calibration > 0):
        raise ValueError(f"temperature {temperature}, calibration {calibration}: must be positive")
    if confidence not in CONFIDENCES:
        raise ValueError(f"unknown confidence {confidence!r}: take one of {', '.join(CONFIDENCES)}")
    count, num_classes = len(split.unlabeled), scores.shape[1]
    height = max(1, TILE // num_classes)
    tiles = [slice(start, start + height) for start in range(0, count, height)]
    unlabeled = split.unlabeled.to(scores.device)
    weights, labels = scores.new_empty(count), torch.empty_like(unlabeled)
    entropies, largest = torch.empty_like(weights), weights.new_empty(count, 2)
    top_classes = unlabeled.new_empty((count, min(TOP, num_classes)), dtype=torch.int32)
    for tile in tiles:
        rows = scores[unlabeled[tile]]
        weights[tile], labels[tile] = CONFIDENCES[confidence](rows, temperature), rows.argmax(dim=1)
        top_classes[tile] = rows.topk(top_classes.shape[1], dim=1).indices
        entropies[tile] = entropy(rows, temperature)
        for place, one in enumerate((temperature, calibrated)):
            largest[tile, place] = largest_confidence(rows, one)
    order = weights.argsort(descending=True, stable=True)
    indexes, probs = unlabeled[order], None
    if probabilities:
        probs = torch.empty(count, num_classes, dtype=scores.dtype)
        # Computed in sorted order, as sorting them afterwards would take a second copy.
        for tile in tiles:
            probs[tile] = _softmax(scores[indexes[tile]], calibrated)
    return PseudoLabels(
        indexes.cpu(),
        labels[order].cpu(),
        weights[order].cpu(),
        split.labeled,
        split.unlabeled,
        probs,
        meta or {},
        top_classes[order].cpu(),
        entropies[order].cpu(),
        largest[order].cpu(),
    )
