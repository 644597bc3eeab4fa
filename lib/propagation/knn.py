"""Propagation by weighted nearest neighbors."""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.graph.knn import BLOCK_BYTES, classify, weighted_votes
from lib.propagation.checks import check_labels

MAX_NEIGHBORS = 200


def _without_own_vote(
    bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """What the other labeled images say about each one: L x C probabilities."""
    votes = []
    rows_at_once = max(1, BLOCK_BYTES // (4 * len(bank)))
    for rows in torch.arange(len(bank), device=bank.device).split(rows_at_once):
        similarities = bank[rows] @ bank.T
        similarities[torch.arange(len(rows), device=bank.device), rows] = -torch.inf
        top, places = similarities.topk(min(k, len(bank) - 1), dim=1)
        votes.append(weighted_votes(top, labels[places], num_classes, temperature))
    return torch.cat(votes)


def propagate_knn(
    features: Tensor,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
    vote: Callable[..., Tensor] = classify,
) -> Tensor:
    """Class probabilities from the K nearest *labeled* images, votes weighted by exp(cos / T).

    A labeled image has no vote on itself: its row tells what the other labels say about it.

    Args:
        features: N x D unit vectors.
        labeled: L indexes of the labeled images.
        labels: their L class numbers.
        num_classes: C.
        k: neighbors that vote, cut down to the number of labels.
        vote: `lib.graph.knn.classify`, or what does the same in several processes.

    Returns:
        N x C probabilities, float32; uniform for a labeled image that is the only one.

    Raises:
        ValueError: for labels that do not fit, no neighbor, or a temperature that is not positive.
    """
    check_labels(len(features), labeled, labels, num_classes)
    bank = features[labeled]
    scores = vote(features, bank, labels, num_classes, k=k, temperature=temperature)
    if len(labeled) == 1:
        scores[labeled] = 1 / num_classes
    else:
        scores[labeled] = _without_own_vote(
            bank, labels.to(bank.device), num_classes, k, temperature
        )
    return scores
