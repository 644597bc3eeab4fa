"""Predicted class sizes that match given ones: per-class offsets on the scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 20  # of offsets at each temperature
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)  # in units of the scores' spread
PASSES = 10  # over the classes, to make the sizes exact


def check_prior(prior: Tensor | Sequence[float] | None, num_classes: int) -> Tensor:
    """Class shares as C float64 that sum to 1; uniform for None.

    Raises:
        ValueError: if they are not C positive finite numbers.
    """
    if prior is None:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    shares = torch.as_tensor(prior, dtype=torch.float64)
    if shares.shape != (num_classes,) or not torch.isfinite(shares).all() or (shares <= 0).any():
        raise ValueError(
            f"a class prior of {shares.tolist()} for {num_classes} classes: give one positive share each"
        )
    return shares / shares.sum()


def _smooth_offsets(scores: Tensor, shares: Tensor) -> Tensor:
    """Offsets o that maximize sum_c share_c o_c - mean_i T logsumexp_c((z_ic + o_c) / T), T falling.

    The dual of transporting the rows to classes of the given sizes at least loss of score; Sinkhorn's
    iteration climbs it (Cuturi 2013).
    """
    spread = float((scores - scores.mean(dim=1, keepdim=True)).std())
    offsets = torch.zeros_like(shares)
    for temperature in (spread * t for t in TEMPERATURES):
        for _ in range(ROUNDS):
            found = ((scores + offsets) / temperature).softmax(dim=1).mean(dim=0)
            step = temperature * (shares / found.clamp_min(1e-12)).log()
            offsets = offsets + step
            if float(step.abs().max()) < 0.02 * temperature:
                break
    return offsets


def _exact_offsets(scores: Tensor, shares: Tensor, offsets: Tensor) -> Tensor:
    """The best of offsets that give one class after the other exactly its size."""
    sizes = (shares * len(scores)).round().long().clamp(1, len(scores) - 1)
    best, least = offsets, float("inf")
    for _ in range(PASSES):
        found = torch.bincount((scores + offsets).argmax(dim=1), minlength=len(sizes))
        wrong = float((found - sizes).abs().max())
        if wrong < least:
            best, least = offsets.clone(), wrong
        if wrong <= 1:
            break
        for label, size in enumerate(sizes.tolist()):
            others = scores + offsets
            others[:, label] = -torch.inf
            needed = (others.amax(dim=1) - scores[:, label]).sort().values
            offsets[label] = (needed[size - 1] + needed[size]) / 2
    return best


def match_prior(scores: Tensor, prior: Tensor | Sequence[float] | None, rows: Tensor) -> Tensor:
    """Add one offset per class, so that the shares of predicted classes among `rows` match `prior`.

    Equal scores stay together, so that a class may miss its size by their number.

    Args:
        scores: N x C.
        prior: C shares, or None for equal ones.
        rows: indexes of the images to count; rows whose scores are all equal (no label reaches them) are
            left out, and keep their scores.

    Returns:
        N x C scores.

    Raises:
        ValueError: for a prior that does not fit.
    """
    shares = check_prior(prior, scores.shape[1]).to(scores.dtype)
    informed = scores.amax(dim=1) > scores.amin(dim=1)
    counted = scores[rows][informed[rows]]
    if len(counted) < 2:
        return scores
    offsets = _exact_offsets(counted, shares, _smooth_offsets(counted, shares))
    return torch.where(informed[:, None], scores + (offsets - offsets.mean()), scores)
