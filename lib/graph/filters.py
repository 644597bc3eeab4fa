"""Graph filters: g(L) applied to a few columns, without eigenvectors.

L = I - S with S = D^-1/2 W D^-1/2, whose eigenvalues lie in [-1, 1]. A filter g is applied through
products S x alone: as a Chebyshev polynomial (Hammond et al. 2011, "Wavelets on graphs via spectral graph
theory") where g is smooth, by conjugate gradients where it is the inverse of a polynomial. The product is
a function, so that its rows may be spread over processes.

    name           g(lambda), up to a constant          published as
    pseudo-inverse 1 / lambda                           the normalized cut with all its eigenvectors
    powers         (1 - lambda)^power / lambda
    smoothed-step  [lambda < cutoff] / lambda           the normalized cut with some of them
    heat           exp(-time lambda)                    Kondor and Lafferty 2002
    ppr            (1 - a) / (1 - a + a lambda)         Zhou et al. 2004; personalised PageRank

The first three have no value at 0 and leave the null space of L out; `components` tells it.
"""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from lib.graph.spectral import (
    Spectrum,
    csr_operator,
    normalized_affinity,
    null_projection,
    null_space,
    positive_degrees,
    self_loop_choice,
)
from lib.runtime.seeding import generator

TILE = 64  # columns at a time: their rows stay in cache during a product
POWER, CUTOFF, DEGREE, TIME, ALPHA = 20, 0.20, 40, 20.0, 0.99  # of the filters, where none is given
TOLERANCE = 1e-4  # of conjugate gradients: residual over right-hand side
EPS = float(np.finfo(np.float32).eps)
MAX_ITERATIONS = 2000
SOLVER_STEPS = 20  # of conjugate gradients, as a rule
ROWS = 8192  # worked on at a time where a copy of all answers would not fit
GRID = 2000  # points at which the gain beyond the known eigenvalues is looked up

Product = Callable[[Tensor], Tensor]


class Seeds(NamedTuple):
    """Columns that are zero outside of a few nodes: L node numbers, and L x m values there."""

    nodes: Tensor
    values: Tensor


@dataclass(frozen=True)
class GraphOperator:
    """What a filter needs of a graph; its vectors on the CPU.

    Attributes:
        product: N x m -> S x, N x m, for m up to `TILE` contiguous columns, float32, on `device`.
        components: N, number of the connected component of each node.
        null: N, float32; inside a component its unit null vector, proportional to `root_degrees`.
        root_degrees: N, float32, square roots of the degrees in the Laplacian, 1 at an isolated node.
        seed_degrees: N, float64, all positive, the degrees that constraints are weighed with.
        device: of the products.
    """

    product: Product
    components: Tensor
    null: Tensor
    root_degrees: Tensor
    seed_degrees: np.ndarray
    device: torch.device | str = "cpu"

    @property
    def num_components(self) -> int:
        return int(self.components.max()) + 1

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """The smallest positive eigenvalue of L, from above, by inverse iteration; 2 where there is none."""
        if self.num_components == len(self.null):
            return 2.0
        columns = torch.randn(len(self.null), 4, generator=generator(0, "sample")).to(self.device)
        for _ in range(8):
            columns = _pseudo_inverse(self, columns)
            columns = columns / columns.norm(dim=0)
        quotient = (columns * (columns - self.product(columns))).sum(dim=0)
        # rounding can put an almost disconnected part at 0 or below
        return max(float(torch.nan_to_num(quotient).min()), EPS)

    @cached_property
    def project_out(self) -> Product:
        """Takes the null space of L out of columns on `device`, in place."""
        return null_projection(self.null.numpy(), self.components.numpy(), self.device)

    def without_null(self, columns: Tensor) -> Tensor:
        """The columns, their part in the null space of L taken out."""
        return self.project_out(columns.clone())

    def reached(self, labeled: Tensor) -> Tensor:
        """N, bool: whether the component of each node holds one of the nodes `labeled`."""
        holds = torch.zeros(self.num_components, dtype=torch.bool)
        holds[self.components[labeled]] = True
        return holds[self.components]


def graph_operator(
    affinity: sp.csr_matrix,
    *,
    self_loops: str = "published",
    product: Product | None = None,
    device: torch.device | str = "cpu",
) -> GraphOperator:
    """The operator of a symmetric affinity matrix W.

    Args:
        affinity: N x N.
        self_loops: a key of `lib.graph.spectral.SELF_LOOPS`.
        product: products with S, where they exist already.
        device: of the products.

    Raises:
        ValueError: for an unknown choice of self-loops.
    """
    in_laplacian, in_seeds = self_loop_choice(self_loops)
    components, null = null_space(affinity, self_loops=in_laplacian)
    degree = positive_degrees(affinity, self_loops=in_laplacian)
    if product is None:
        product = csr_operator(normalized_affinity(affinity, self_loops=in_laplacian), device)
    return GraphOperator(
        product,
        torch.from_numpy(components).long(),
        torch.from_numpy(null).float(),
        torch.from_numpy(np.sqrt(degree)).float(),
        positive_degrees(affinity, self_loops=in_seeds),
        device,
    )


def conjugate_gradients(
    apply: Product,
    columns: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Solve A x = b for every column b, each with step lengths of its own (Hestenes and Stiefel 1952).

    Args:
        apply: x -> A x, symmetric and positive on the space that the columns span under A.
        columns: N x m right-hand sides; a column of zeros has the solution zero.
        tolerance: largest residual of a column, relative to its norm.

    Returns:
        N x m.

    Warns:
        UserWarning: where the tolerance is not reached.
    """
    size = columns.norm(dim=0)
    # of unit norm: squares of small columns would be lost in float32
    residual = torch.where(size > 0, columns / size, torch.zeros_like(columns))
    solution, direction = torch.zeros_like(columns), residual.clone()
    square = residual.square().sum(dim=0)
    target = square * tolerance**2
    steps = 0
    while steps < max_iterations:
        steps += 1
        if (square <= target).all():
            return solution * size
        image = apply(direction)
        curvature = (direction * image).sum(dim=0)
        # a column stands still when it is done, and where A x is rounding: it would be blown up
        alive = (square > target) & (curvature > EPS * direction.square().sum(dim=0))
        if not alive.any():
            break
        step = torch.where(alive, square / curvature, torch.zeros_like(square))
        solution += step * direction
        residual -= step * image
        before, square = square, residual.square().sum(dim=0)
        ratio = torch.where(alive, square / before, torch.zeros_like(square))
        direction = residual + ratio * direction
    worst = float((square / target.clamp_min(1e-37)).max().sqrt()) * tolerance
    warnings.warn(
        f"conjugate gradients stopped after {steps} steps at a residual of {worst:.1e}; the "
        "graph is close to falling apart: take more neighbors per image, or another filter",
        stacklevel=2,
    )
    return solution * size


def chebyshev_filter(product: Product, coefficients: np.ndarray, columns: Tensor) -> Tensor:
    """sum_k c_k T_k(S) x by the three-term recurrence: one product per degree.

    Args:
        coefficients: c_0 ... c_K.
        columns: N x m.
    """
    before, current = columns, product(columns)
    total = coefficients[0] * before
    for coefficient in coefficients[1:]:
        total += coefficient * current
        before, current = current, product(current).mul_(2).sub_(before)
    return total


def step_coefficients(cutoff: float, degree: int) -> np.ndarray:
    """Chebyshev coefficients of [1 - s < cutoff] on [-1, 1], damped by the Jackson kernel.

    The damping (Jackson 1912; Di Napoli et al. 2016) makes the step smooth, falling and free of
    overshooting; its width at the cut-off is about pi sqrt(1 - s^2) / degree.
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


def _pseudo_inverse(operator: GraphOperator, columns: Tensor) -> Tensor:
    def laplacian(x: Tensor) -> Tensor:
        return operator.project_out(x - operator.product(x))

    return conjugate_gradients(laplacian, operator.without_null(columns))


def _powers(operator: GraphOperator, columns: Tensor, *, power: int = POWER) -> Tensor:
    columns = operator.without_null(columns)
    for _ in range(power):  # what is left of the null space would soon outweigh all others
        columns = operator.project_out(operator.product(columns))
    return _pseudo_inverse(operator, columns)


def _powers_gain(values: np.ndarray, *, power: int = POWER) -> np.ndarray:
    _check(power >= 0, f"power {power} of a filter: must not be negative")
    return (1 - values) ** power / values


def _smoothed_step(
    operator: GraphOperator, columns: Tensor, *, cutoff: float = CUTOFF, degree: int = DEGREE
) -> Tensor:
    columns = operator.without_null(columns)
    low = chebyshev_filter(operator.product, step_coefficients(cutoff, degree), columns)
    return _pseudo_inverse(operator, low)


def _smoothed_step_gain(
    values: np.ndarray, *, cutoff: float = CUTOFF, degree: int = DEGREE
) -> np.ndarray:
    _check(
        0 < cutoff < 2 and degree >= 1,
        f"cut-off {cutoff} and degree {degree}: give 0 < cut-off < 2, degree >= 1",
    )
    return chebyshev.chebval(1 - values, step_coefficients(cutoff, degree)) / values


def _heat_degree(time: float) -> int:
    return 10 + math.ceil(6 * math.sqrt(time))  # what is left out is below 1e-6


def _heat(operator: GraphOperator, columns: Tensor, *, time: float = TIME) -> Tensor:
    coefficients = chebyshev.chebinterpolate(lambda s: np.exp(time * (s - 1)), _heat_degree(time))
    return chebyshev_filter(operator.product, coefficients, columns)


def _heat_gain(values: np.ndarray, *, time: float = TIME) -> np.ndarray:
    _check(0 < time < math.inf, f"time {time} of the heat kernel: must be positive")
    return np.exp(-time * values)


def _ppr(operator: GraphOperator, columns: Tensor, *, alpha: float = ALPHA) -> Tensor:
    def restart(x: Tensor) -> Tensor:
        return x - alpha * operator.product(x)

    return conjugate_gradients(restart, (1 - alpha) * columns)


def _ppr_gain(values: np.ndarray, *, alpha: float = ALPHA) -> np.ndarray:
    _check(0 < alpha < 1, f"alpha {alpha}: must lie between 0 and 1")
    return (1 - alpha) / (1 - alpha + alpha * values)


@dataclass(frozen=True)
class Filter:
    """One member of the family.

    Attributes:
        apply: (operator, N x m columns, parameters) -> g(L) x.
        gain: (eigenvalues of L, parameters) -> g of each; ValueError for parameters out of range.
        products: parameters -> products with S that a column takes, about.
    """

    apply: Callable[..., Tensor]
    gain: Callable[..., np.ndarray]
    products: Callable[..., int]


FILTERS = {
    "pseudo-inverse": Filter(_pseudo_inverse, lambda values: 1 / values, lambda: SOLVER_STEPS),
    "powers": Filter(_powers, _powers_gain, lambda power=POWER: power + SOLVER_STEPS),
    "smoothed-step": Filter(
        _smoothed_step,
        _smoothed_step_gain,
        lambda cutoff=CUTOFF, degree=DEGREE: degree + SOLVER_STEPS,
    ),
    "heat": Filter(_heat, _heat_gain, lambda time=TIME: _heat_degree(time)),
    "ppr": Filter(_ppr, _ppr_gain, lambda alpha=ALPHA: SOLVER_STEPS),
}
WITHOUT_NULL = ("pseudo-inverse", "powers", "smoothed-step")


def check_filter(name: str, **parameters: float) -> Filter:
    """The filter of that name, if it takes these parameters.

    Raises:
        ValueError: for an unknown filter or a parameter out of range.
    """
    _check(name in FILTERS, f"unknown filter {name!r}: take one of {', '.join(FILTERS)}")
    found = FILTERS[name]
    strange = sorted(set(parameters) - set(inspect.signature(found.gain).parameters))
    _check(not strange, f"the filter {name} has no parameter {', '.join(strange)}")
    found.gain(np.ones(1), **parameters)
    return found


def filter_columns(
    operator: GraphOperator, columns: Tensor, name: str = "smoothed-step", **parameters: float
) -> Tensor:
    """g(L) x for every column x, in tiles of `TILE` columns.

    Args:
        columns: N x m, float32.
        name: a key of `FILTERS`.
        parameters: of that filter: power, cutoff and degree, time, or alpha.

    Returns:
        N x m, float32, on the CPU.

    Raises:
        ValueError: for an unknown filter or a parameter out of range.
    """
    everywhere = torch.arange(len(columns))
    return filter_each(operator, [Seeds(everywhere, columns.float())], name, **parameters)[0]


def filter_each(
    operator: GraphOperator, seeds: Sequence[Seeds], name: str, **parameters: float
) -> list[Tensor]:
    """g(L) applied to several sets of columns, side by side, so that they share their products.

    Beside the answers only a few N x `TILE` blocks are held.

    Args:
        seeds: for each set its values at a few nodes.
        name, parameters: as in `filter_columns`.

    Returns:
        N x m float32 for each set, on the CPU.

    Raises:
        ValueError: for an unknown filter or a parameter out of range.
    """
    apply = check_filter(name, **parameters).apply
    n = len(operator.null)
    answers = [torch.empty(n, one.values.shape[1]) for one in seeds]
    starts = [
        0,
        *itertools.accumulate(a.shape[1] for a in answers),
    ]  # of each set among all columns
    for first in range(0, starts[-1], TILE):
        columns = torch.zeros(n, min(TILE, starts[-1] - first))
        shared = []  # (set, its columns, their place in the tile)
        for one, (start, stop) in enumerate(itertools.pairwise(starts)):
            low, high = max(start, first), min(stop, first + TILE)
            if low < high:
                own, place = slice(low - start, high - start), slice(low - first, high - first)
                columns[seeds[one].nodes, place] = seeds[one].values[:, own].float()
                shared.append((one, own, place))
        solved = apply(operator, columns.to(operator.device), **parameters).cpu()
        for one, own, place in shared:
            answers[one][:, own] = solved[:, place]
    return answers


def filter_by_eigenvectors(
    spectrum: Spectrum, seeds: Sequence[Seeds], name: str, **parameters: float
) -> tuple[list[Tensor], float]:
    """The part of g(L) x that the known eigenvectors hold, and a bound of the part that they do not.

    V g(Lambda) V^T x, and g(0) x along the null vectors: other mathematics than `filter_each` unless g is
    small beyond the last eigenvalue known. What is left out of a column is at most the largest |g| there
    times the norm of the column's part outside of all known vectors.

    Args:
        spectrum: the smallest eigenvalues and their vectors, taken as exact.
        seeds, name, parameters: as in `filter_each`.

    Returns:
        N x m float32 for each set, and the largest bound of a column, relative to its answer's norm.

    Raises:
        ValueError: for an unknown filter or a parameter out of range.
    """
    gain = check_filter(name, **parameters).gain
    gains = gain(spectrum.values, **parameters)
    beyond = 0.0
    if len(gains) + spectrum.num_components < len(spectrum.null):
        last = spectrum.values[-1] if len(gains) else np.finfo(np.float32).eps
        beyond = np.abs(gain(np.linspace(last, 2, GRID), **parameters)).max()
    answers, worst = [], 0.0
    for nodes, values in seeds:
        at, columns = nodes.numpy(), values.double().numpy()
        along = spectrum.vectors[at].T.astype(np.float64) @ columns
        of = spectrum.components[at]
        inside = np.zeros((spectrum.num_components, columns.shape[1]))
        np.add.at(inside, of, spectrum.null[at, None] * columns)
        kept = (gains[:, None] * along).astype(np.float32)
        answer = torch.from_numpy(spectrum.vectors @ kept)
        known = np.square(along).sum(axis=0) + np.square(inside).sum(axis=0)
        outside = np.sqrt(np.maximum(np.square(columns).sum(axis=0) - known, 0))
        size = np.square(kept).sum(axis=0, dtype=np.float64)
        if name not in WITHOUT_NULL:
            for start in range(0, len(answer), ROWS):
                rows = slice(start, start + ROWS)
                whole = spectrum.null[rows, None] * inside[spectrum.components[rows]]
                answer[rows] += torch.from_numpy(whole)
            size += np.square(inside).sum(axis=0)
        answers.append(answer)
        worst = max(worst, float((beyond * outside / np.sqrt(size).clip(1e-30)).max()))
    return answers, worst
