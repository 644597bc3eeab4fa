"""Propagation by weighted nearest neighbors: every image asks the nearest labeled ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib.graph.knn import BLOCK_BYTES, classify, weighted_votes
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.labelings import Labeling, check_labels
from lib.propagation.scores import log_shares

MAX_NEIGHBORS = 200


def knn_probabilities(
    features: Tensor,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
    vote: Callable[..., Tensor] = classify,
) -> Tensor:
    """Compute P with P_ic proportional to the sum of exp(v_i . v_j / T) over the neighbors j of class c.

    The neighbors are the K nearest *labeled* images. A labeled image does not vote on itself: its row tells
    what the other labels say about it.

    Args:
        features: V, N x D unit vectors.
        labeled: L indexes of the labeled images.
        labels: their L class numbers.
        num_classes: C.
        k: neighbors that vote, cut down to the number of labels.
        temperature: T.
        vote: `lib.graph.knn.classify`, or a function that does the same in several processes.

    Returns:
        P, N x C, float32; uniform for a labeled image that is the only one.

    Raises:
        ValueError: for labels that do not fit, no neighbor, or a temperature that is not positive.
    """
    check_labels(len(features), labeled, labels, num_classes)
    bank = features[labeled]
    probabilities = vote(features, bank, labels, num_classes, k=k, temperature=temperature)
    if len(labeled) == 1:
        probabilities[labeled] = 1 / num_classes
    else:
        probabilities[labeled] = _without_own_vote(
            bank, labels.to(bank.device), num_classes, k, temperature
        )
    return probabilities


def _without_own_vote(
    bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Let the other labeled images vote on each labeled one: L x C probabilities."""
    votes = []
    rows_at_once = max(1, BLOCK_BYTES // (4 * len(bank)))
    for rows in torch.arange(len(bank), device=bank.device).split(rows_at_once):
        similarities = bank[rows] @ bank.T
        similarities[torch.arange(len(rows), device=bank.device), rows] = -torch.inf
        top, places = similarities.topk(min(k, len(bank) - 1), dim=1)
        votes.append(weighted_votes(top, labels[places], num_classes, temperature))
    return torch.cat(votes)


def propagate_knn(
    graph: EmbeddingGraph,
    labelings: Sequence[Labeling],
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
) -> list[Tensor]:
    """Compute log P of the nearest labeled images for each set of labels: N x C, on the CPU.

    Args:
        graph: the features; their graph is not needed.
        labelings: labeled images and their classes, one pair for each answer.
        num_classes: C.
        k, temperature: as in `knn_probabilities`.

    Raises:
        ValueError: as `knn_probabilities`.
    """
    answers = []
    for labeled, labels in labelings:
        probabilities = knn_probabilities(
            graph.features,
            labeled,
            labels,
            num_classes,
            k=k,
            temperature=temperature,
            vote=graph.workers.classify if graph.workers else classify,
        )
        answers.append(log_shares(probabilities.cpu()))
    return answers
