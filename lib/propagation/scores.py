"""Scores made comparable: as logarithms of shares, and with class sizes that match a prior."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 20  # steps of the offsets at each temperature
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)  # in units of the spread of the scores
PASSES = 10  # over the classes, to make the sizes exact
ROWS = 8192  # rows worked on at a time where a copy of all scores would not fit
NEVER = -1e30  # finite, as all scores are, and of probability 0 at any temperature
LEAST_PROBABILITY = 1e-6  # of a class whose score is 0, so that its logarithm is finite


def of_all_classes(scores: Tensor, present: Tensor, num_classes: int) -> Tensor:
    """Widen N x P scores of the classes `present` to N x C: a class without a label gets `NEVER`.

    Its probability is 0 everywhere, so that no image gets it and no margin changes.
    """
    if len(present) == num_classes:
        return scores
    wide = scores.new_full((len(scores), num_classes), NEVER)
    wide[:, present] = scores
    return wide


def log_shares(scores: Tensor) -> Tensor:
    """Turn non-negative scores, N x C, into finite logarithms of their shares of the row, in place.

    Iscen et al. 2019 normalize the rows of label spreading in this way. A row of zeros becomes uniform.
    """
    num_classes = scores.shape[1]
    for rows in scores.split(ROWS):
        sums = rows.sum(dim=1, keepdim=True)
        shares = torch.where(sums > 0, rows / sums.clamp_min(1e-37), 1 / num_classes)
        rows.copy_(((1 - num_classes * LEAST_PROBABILITY) * shares + LEAST_PROBABILITY).log())
    return scores


def _smooth_offsets(scores: Tensor, shares: Tensor) -> Tensor:
    """Find offsets o that maximize sum_c share_c o_c - mean_i T logsumexp_c((z_ic + o_c) / T), T falling.

    This is the dual of transporting the rows to classes of the given sizes at least loss of score;
    Sinkhorn's iteration climbs it (Cuturi 2013).
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
    """Find the best of the offsets that give one class after the other exactly its size."""
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


def class_shares(prior: Tensor | Sequence[float] | None, num_classes: int) -> Tensor:
    """Return C shares that sum to 1, float64: those of the prior, or equal ones for None.

    Raises:
        ValueError: for a prior that is not C positive finite numbers.
    """
    if prior is None:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    shares = torch.as_tensor(prior, dtype=torch.float64)
    good = shares.shape == (num_classes,) and torch.isfinite(shares).all() and (shares > 0).all()
    if not good:
        raise ValueError(
            f"a class prior of {shares.tolist()} for {num_classes} classes: give one positive share each"
        )
    return shares / shares.sum()


def match_prior(scores: Tensor, prior: Tensor | Sequence[float] | None, rows: Tensor) -> Tensor:
    """Add one offset per class, so that the shares of predicted classes among `rows` match `prior`.

    Equal scores stay together, so that a class may miss its size by their number. Rows whose scores are all
    equal (no label reaches them) are not counted, and keep their scores.

    Args:
        scores: N x C.
        prior: C shares, or None for equal ones.
        rows: indexes of the images to count.

    Raises:
        ValueError: for a prior that is not C positive finite numbers.
    """
    shares = class_shares(prior, scores.shape[1]).to(scores)
    informed = scores.amax(dim=1) > scores.amin(dim=1)
    counted = scores[rows][informed[rows]]
    if len(counted) < 2:
        return scores
    offsets = _exact_offsets(counted, shares, _smooth_offsets(counted, shares))
    return torch.where(informed[:, None], scores + (offsets - offsets.mean()), scores)
