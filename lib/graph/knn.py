"""Weighted nearest-neighbor classification by the products of vectors, by blocks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from datasets import UNKNOWN
from lib.runtime.distributed import all_reduce_sum, shard

BLOCK_BYTES = 128 * 2**20  # bound of the similarities at a time


def weighted_votes(
    similarities: Tensor, neighbor_labels: Tensor, num_classes: int, temperature: float = 0.1
) -> Tensor:
    """Sum the votes exp(cos / T) of neighbors by class, normalized to sum 1: B x K twice -> B x C."""
    # Minus the maximum of the row: the same ratios, and no overflow at small temperatures.
    weights = ((similarities - similarities.amax(dim=1, keepdim=True)) / temperature).exp()
    votes = torch.zeros(len(weights), num_classes, device=weights.device, dtype=weights.dtype)
    votes.scatter_add_(1, neighbor_labels, weights)
    return votes / votes.sum(dim=1, keepdim=True)


def nearest(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int, *, own_vote: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cosines, falling, and classes of the k nearest labeled rows of `bank`, B x k, by blocks.

    Without `own_vote`, row i of the bank is not among the neighbors of query i.
    """
    known = bank_labels != UNKNOWN
    if not known.any():
        raise ValueError("nearest neighbors need at least one labeled image")
    if not known.all():
        bank, bank_labels = bank[known.to(bank.device)], bank_labels[known]
    bank, labels = bank.to(queries.device), bank_labels.to(queries.device)
    first, most = 0, len(bank) - (not own_vote)
    for block in queries.split(max(1, BLOCK_BYTES // (4 * len(bank)))):
        similarities = block @ bank.T
        if not own_vote:
            similarities.diagonal(first).fill_(-torch.inf)
        first += len(block)
        top, places = similarities.topk(min(k, most), dim=1)
        yield top, labels[places]


def classify(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.1,
    own_vote: bool = True,
) -> Tensor:
    """Compute class probabilities of `queries` from their nearest rows of `bank` (Wu et al. 2018, eq. 9).

    Args:
        queries, bank: Q x D and M x D, unit vectors for votes by cosine.
        bank_labels: M class numbers; rows labeled `UNKNOWN` have no vote.
        k: neighbors that vote; all of them where the bank has fewer.
        own_vote: whether row i of the bank votes on query i.

    Returns:
        Q x C float32 probabilities on the device of `queries`.

    Raises:
        ValueError: if no row of the bank has a label, for no neighbor or a temperature that is not
            positive.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"k {k} and temperature {temperature} of nearest neighbors must be positive"
        )
    blocks = nearest(queries, bank, bank_labels, k, own_vote=own_vote)
    return torch.cat([weighted_votes(*block, num_classes, temperature) for block in blocks])


def topk_correct(scores: Tensor, targets: Tensor, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """Count the rows that have their target among the k highest scores, for each k; int64.

    Where there are fewer classes than k, k is their number.
    """
    highest = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices
    found = highest.eq(targets.to(scores.device)[:, None])
    return torch.stack([found[:, :k].any(dim=1).sum() for k in ks])


def top_k_accuracy(scores: Tensor, targets: Tensor, ks: tuple[int, ...] = (1, 5)) -> list[float]:
    """Compute the percentage of rows whose target is among the k highest scores, for each k."""
    return [100 * count / len(targets) for count in topk_correct(scores, targets, ks).tolist()]


def accuracy(
    queries: Tensor,
    targets: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> dict[str, float]:
    """Measure the accuracy in percent of the votes of k nearest neighbors, and of the nearest one alone.

    Every process has all the arguments, as in `classify`, and works on its part of the queries. Queries
    whose target is `UNKNOWN` are not counted.

    Returns:
        `top1` and `top5` of the votes, `nearest` of the nearest neighbor's label.

    Raises:
        ValueError: as `classify`, or if no query has a target.
    """
    known = targets != UNKNOWN
    if not known.any():
        raise ValueError("there is no labeled image to measure the accuracy on")
    queries, targets = queries[known.to(queries.device)], targets[known].to(queries.device)
    mine, counts = shard(len(targets)), torch.zeros(3, dtype=torch.int64, device=queries.device)
    start = mine.start
    for cosines, labels in nearest(queries[mine], bank, bank_labels, k):
        own = targets[start : start + len(labels)]
        votes = weighted_votes(cosines, labels, num_classes, temperature)
        counts[:2] += topk_correct(votes, own)
        counts[2] += (labels[:, 0] == own).sum()
        start += len(labels)
    found = zip(("top1", "top5", "nearest"), all_reduce_sum(counts).tolist(), strict=True)
    return {name: 100 * count / len(targets) for name, count in found}
