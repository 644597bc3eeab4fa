"""Graph filters: g(L) applied to a few columns, without eigenvectors.

L = I - S, and the eigenvalues of S lie in [-1, 1]. A filter g is applied by products S x alone: as a
Chebyshev polynomial (Hammond et al. 2011, "Wavelets on graphs via spectral graph theory") where g is smooth,
by conjugate gradients where it is the inverse of a polynomial.

    name           g(lambda), up to a constant          published as
    pseudo-inverse 1 / lambda                           the normalized cut with all its eigenvectors
    powers         (1 - lambda)^power / lambda
    smoothed-step  [lambda < cutoff] / lambda           the normalized cut with some of them
    heat           exp(-time lambda)                    Kondor and Lafferty 2002
    ppr            (1 - a) / (1 - a + a lambda)         Zhou et al. 2004; personalized PageRank

The first three have no value at 0 and leave the null space of L out.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from lib.graph.laplacian import EPS, GraphOperator, Operator, conjugate_gradients
from lib.graph.spectrum import Spectrum

TILE = 64  # columns at a time: their rows stay in the cache during a product
SOLVER_STEPS = 20  # steps that conjugate gradients take as a rule
ROWS = 8192  # rows worked on at a time where a copy of all answers would not fit
GRID = 2000  # points at which the gain beyond the known eigenvalues is looked up


class LabelVectors(NamedTuple):
    """Columns that are zero outside of a few nodes."""

    nodes: Tensor  # L node numbers, on the device of the graph, like the values
    values: Tensor  # L x m


def chebyshev_filter(product: Operator, coefficients: np.ndarray, columns: Tensor) -> Tensor:
    """Compute sum_k c_k T_k(S) x, N x m, by the three-term recurrence: one product x -> S x per degree."""
    before, current = columns, product(columns)
    total = coefficients[0] * before
    for coefficient in coefficients[1:]:
        total += coefficient * current
        before, current = current, product(current).mul_(2).sub_(before)
    return total


def step_coefficients(cutoff: float, degree: int) -> np.ndarray:
    """Compute the Chebyshev coefficients of [1 - s < cutoff] on [-1, 1], damped by the Jackson kernel.

    The damping (Jackson 1912; Di Napoli et al. 2016) makes the step smooth, falling and free of overshooting;
    its width at the cut-off is about pi sqrt(1 - s^2) / degree.
    """
    angle, k = math.acos(1 - cutoff), np.arange(1, degree + 1)
    step = np.concatenate([[angle / math.pi], 2 / math.pi * np.sin(k * angle) / k])
    k, turn = np.arange(degree + 1), math.pi / (degree + 2)
    damping = (
        (degree + 2 - k) * math.sin(turn) * np.cos(k * turn) + math.cos(turn) * np.sin(k * turn)
    ) / ((degree + 2) * math.sin(turn))
    return step * damping


def _check(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def _powers(operator: GraphOperator, columns: Tensor, power: int) -> Tensor:
    columns = operator.project_out(columns.clone())
    for _ in range(power):  # what is left of the null space would soon outweigh all others
        columns = operator.project_out(operator.product(columns))
    return operator.solve(columns)


def _powers_gain(values: np.ndarray, power: int) -> np.ndarray:
    _check(power >= 0, f"power {power} of a filter: must not be negative")
    return (1 - values) ** power / values


def _smoothed_step(operator: GraphOperator, columns: Tensor, cutoff: float, degree: int) -> Tensor:
    columns = operator.project_out(columns.clone())
    low = chebyshev_filter(operator.product, step_coefficients(cutoff, degree), columns)
    return operator.solve(low)


def _smoothed_step_gain(values: np.ndarray, cutoff: float, degree: int) -> np.ndarray:
    _check(
        0 < cutoff < 2 and degree >= 1,
        f"cut-off {cutoff} and degree {degree}: give 0 < cut-off < 2, degree >= 1",
    )
    return chebyshev.chebval(1 - values, step_coefficients(cutoff, degree)) / values


def _heat_degree(time: float) -> int:
    return 10 + math.ceil(6 * math.sqrt(time))  # what is left out is below 1e-6


def _heat(operator: GraphOperator, columns: Tensor, time: float) -> Tensor:
    coefficients = chebyshev.chebinterpolate(lambda s: np.exp(time * (s - 1)), _heat_degree(time))
    return chebyshev_filter(operator.product, coefficients, columns)


def _heat_gain(values: np.ndarray, time: float) -> np.ndarray:
    _check(0 < time < math.inf, f"time {time} of the heat kernel: must be positive")
    return np.exp(-time * values)


def _ppr(operator: GraphOperator, columns: Tensor, alpha: float) -> Tensor:
    return conjugate_gradients(lambda x: x - alpha * operator.product(x), (1 - alpha) * columns)


def _ppr_gain(values: np.ndarray, alpha: float) -> np.ndarray:
    _check(0 < alpha < 1, f"alpha {alpha}: must lie between 0 and 1")
    return (1 - alpha) / (1 - alpha + alpha * values)


@dataclass(frozen=True)
class Filter:
    """One member of the family; each function takes all `parameters` by name."""

    apply: Callable[..., Tensor]  # (operator, N x m columns, ...) -> g(L) x
    gain: Callable[..., np.ndarray]  # (eigenvalues of L, ...) -> g of each; checks the parameters
    num_products: Callable[..., int]  # (...) -> about how many products with S a column takes
    parameters: Mapping[str, float] = field(default_factory=dict)  # and their defaults
    keeps_null: bool = False  # whether g has a value at 0


FILTERS = {
    "pseudo-inverse": Filter(GraphOperator.solve, lambda values: 1 / values, lambda: SOLVER_STEPS),
    "powers": Filter(
        _powers, _powers_gain, lambda power: power + SOLVER_STEPS, parameters={"power": 20}
    ),
    "smoothed-step": Filter(
        _smoothed_step,
        _smoothed_step_gain,
        lambda cutoff, degree: degree + SOLVER_STEPS,
        parameters={"cutoff": 0.20, "degree": 40},
    ),
    "heat": Filter(_heat, _heat_gain, _heat_degree, parameters={"time": 20.0}, keeps_null=True),
    "ppr": Filter(
        _ppr, _ppr_gain, lambda alpha: SOLVER_STEPS, parameters={"alpha": 0.99}, keeps_null=True
    ),
}


def find_filter(name: str, **parameters: float) -> tuple[Filter, dict[str, float]]:
    """Look up a filter, and complete its parameters by their defaults.

    Raises:
        ValueError: for an unknown filter, or a parameter that it does not have or that is out of range.
    """
    _check(name in FILTERS, f"unknown filter {name!r}: take one of {', '.join(FILTERS)}")
    found = FILTERS[name]
    strange = sorted(set(parameters) - set(found.parameters))
    _check(not strange, f"the filter {name} has no parameter {', '.join(strange)}")
    complete = {**found.parameters, **parameters}
    found.gain(np.ones(1), **complete)
    return found, complete


def apply_filter(
    operator: GraphOperator, vectors: Sequence[LabelVectors], name: str, **parameters: float
) -> list[Tensor]:
    """Apply g(L) to several sets of columns, side by side, so that they share their products.

    Args:
        operator: the graph.
        vectors: for each set its values at a few nodes.
        name, parameters: a key of `FILTERS`, and what that filter takes.

    Returns:
        N x m float32 for each set. Beside them a few blocks of N x `TILE` numbers are held.
    """
    found, parameters = find_filter(name, **parameters)
    n = len(operator)
    device = operator.device
    answers = [torch.empty(n, one.values.shape[1], device=device) for one in vectors]
    # of each set among all columns
    starts = [0, *itertools.accumulate(answer.shape[1] for answer in answers)]
    for first in range(0, starts[-1], TILE):
        columns = torch.zeros(n, min(TILE, starts[-1] - first), device=device)
        shared = []  # (set, its columns, their place in the tile)
        for one, (start, stop) in enumerate(itertools.pairwise(starts)):
            low, high = max(start, first), min(stop, first + TILE)
            if low < high:
                own, place = slice(low - start, high - start), slice(low - first, high - first)
                columns[vectors[one].nodes, place] = vectors[one].values[:, own].float()
                shared.append((one, own, place))
        filtered = found.apply(operator, columns, **parameters)
        for one, own, place in shared:
            answers[one][:, own] = filtered[:, place]
    return answers


def filter_by_eigenvectors(
    spectrum: Spectrum, vectors: Sequence[LabelVectors], name: str, **parameters: float
) -> tuple[list[Tensor], float]:
    """Compute the part of g(L) x that the known eigenvectors hold, and bound the part that they do not.

    The part is U g(Lambda) U^T x, and g(0) x along the null vectors. What is left out of a column is at most
    the largest |g| beyond the last known eigenvalue times the norm of the column's part outside of all known
    vectors, which are taken as exact. The other arguments are those of `apply_filter`.

    Returns:
        N x m float32 for each set, and the largest bound of a column, relative to its answer's norm.
    """
    found, parameters = find_filter(name, **parameters)
    gains = found.gain(spectrum.values, **parameters)
    beyond = 0.0
    if len(gains) + spectrum.num_components < len(spectrum.null):
        last = spectrum.values[-1] if len(gains) else EPS
        beyond = np.abs(found.gain(np.linspace(last, 2, GRID), **parameters)).max()
    answers, worst = [], 0.0
    for one in vectors:
        nodes, columns = one.nodes, one.values.double()
        along = spectrum.vectors[nodes].double().T @ columns
        inside = columns.new_zeros(
            spectrum.num_components, columns.shape[1]
        )  # along the null vectors
        inside.index_add_(0, spectrum.components[nodes], spectrum.null[nodes, None] * columns)
        kept = (torch.from_numpy(gains).to(along.device)[:, None] * along).float()
        answer = spectrum.vectors @ kept
        known = along.square().sum(dim=0) + inside.square().sum(dim=0)
        outside = (columns.square().sum(dim=0) - known).clamp(min=0).sqrt()
        size = kept.double().square().sum(dim=0)  # squared norms of the answer
        if found.keeps_null:  # with gain g(0) = 1
            for start in range(0, len(answer), ROWS):
                rows = slice(start, start + ROWS)
                answer[rows] += spectrum.null[rows, None] * inside[spectrum.components[rows]]
            size += inside.square().sum(dim=0)
        answers.append(answer)
        worst = max(worst, float((beyond * outside / size.sqrt().clamp(min=1e-30)).max()))
    return answers, worst
