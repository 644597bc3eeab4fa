"""Weighted nearest-neighbour classification on unit vectors, by blocks."""

import torch
from torch import Tensor

from datasets import UNKNOWN

BLOCK_BYTES = 128 * 2**20  # of similarities at a time


def weighted_votes(
    similarities: Tensor, neighbour_labels: Tensor, num_classes: int, temperature: float = 0.1
) -> Tensor:
    """Votes exp(cos / T) of each row's neighbours, per class, normalised to sum 1.

    Args:
        similarities: B x K cosines.
        neighbour_labels: B x K class numbers.

    Returns:
        B x C probabilities.
    """
    # minus the row's largest: the same ratios, and no overflow at small temperatures
    weights = ((similarities - similarities.amax(dim=1, keepdim=True)) / temperature).exp()
    votes = torch.zeros(len(weights), num_classes, device=weights.device, dtype=weights.dtype)
    votes.scatter_add_(1, neighbour_labels, weights)
    return votes / votes.sum(dim=1, keepdim=True)


def classify(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    """Class probabilities of `queries` from their nearest rows of `bank` (Wu et al. 2018, eq. 9).

    Args:
        queries: Q x D unit vectors.
        bank: M x D unit vectors.
        bank_labels: M class numbers; rows labelled `UNKNOWN` have no vote.
        k: neighbours that vote; all of them where the bank has fewer.

    Returns:
        Q x C float32 probabilities on the device of `queries`.

    Raises:
        ValueError: if no row of the bank has a label, for no neighbour or a temperature that is not
            positive.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"k {k} and temperature {temperature} of nearest neighbours must be positive"
        )
    known = bank_labels != UNKNOWN
    if not known.any():
        raise ValueError("nearest neighbours need at least one labelled image")
    bank = bank[known.to(bank.device)].to(queries.device)
    labels = bank_labels[known].to(queries.device)
    k = min(k, len(bank))
    rows = max(1, BLOCK_BYTES // (4 * len(bank)))
    answers = []
    for block in queries.split(rows):
        top, places = (block @ bank.T).topk(k, dim=1)
        answers.append(weighted_votes(top, labels[places], num_classes, temperature))
    return torch.cat(answers)


def top_k_accuracy(scores: Tensor, targets: Tensor, ks: tuple[int, ...] = (1, 5)) -> list[float]:
    """Percentage of rows whose target is among the k highest scores, for each k.

    With fewer classes than k, k is the number of classes (and the answer 100).
    """
    highest = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices
    hits = highest.eq(targets.to(scores.device)[:, None])
    return [100 * hits[:, :k].any(dim=1).float().mean().item() for k in ks]
