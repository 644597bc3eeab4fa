"""Graph filters: g(L) applied to a few columns, without eigenvectors.

L = I - S with S = D^-1/2 W D^-1/2, whose eigenvalues lie in [-1, 1]. A filter g is applied through
products S x alone: as a Chebyshev polynomial (Hammond et al. 2011, "Wavelets on graphs via spectral graph
theory") where g is smooth, by conjugate gradients where it is the inverse of a polynomial. The product is
a function, so that its rows may be spread over processes.

    name           g(lambda), up to a constant          published as
    pseudo-inverse 1 / lambda                           the normalised cut with all its eigenvectors
    powers         (1 - lambda)^power / lambda
    smoothed-step  [lambda < cutoff] / lambda           the normalised cut with some of them
    heat           exp(-time lambda)                    Kondor and Lafferty 2002
    ppr            (1 - a) / (1 - a + a lambda)         Zhou et al. 2004; personalised PageRank

The first three have no value at 0 and leave the null space of L out; `components` tells it.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from lib.seeding import generator
from lib.spectral import (
    csr_operator,
    normalized_affinity,
    null_space,
    positive_degrees,
    self_loop_choice,
)

TILE = 64  # columns at a time: their rows stay in cache during a product
TOLERANCE = 1e-4  # of conjugate gradients: residual over right-hand side
MAX_ITERATIONS = 2000

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphOperator:
    """What a filter needs of a graph.

    Attributes:
        product: N x m -> S x, N x m, for m up to `TILE` contiguous columns, float32.
        components: N, number of the connected component of each node.
        null: N, float32; inside a component its unit null vector, proportional to `root_degrees`.
        root_degrees: N, float32, square roots of the degrees in the Laplacian, 1 at an isolated node.
        seed_degrees: N, float64, all positive, the degrees that constraints are weighed with.
    """

    product: Product
    components: Tensor
    null: Tensor
    root_degrees: Tensor
    seed_degrees: np.ndarray

    @property
    def num_components(self) -> int:
        return int(self.components.max()) + 1

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """The smallest positive eigenvalue of L, from above, by inverse iteration; 2 where there is none."""
        if self.num_components == len(self.null):
            return 2.0
        columns = torch.randn(len(self.null), 4, generator=generator(0, "sample"))
        for _ in range(8):
            columns = _pseudo_inverse(self, columns)
            columns = columns / columns.norm(dim=0)
        quotient = (columns * (columns - self.product(columns))).sum(dim=0)
        return float(quotient.min())

    def along_null(self, columns: Tensor) -> Tensor:
        """Coefficients of the columns along the null vectors, components x m."""
        if self.num_components == 1:
            return (self.null @ columns)[None]
        sums = columns.new_zeros(self.num_components, columns.shape[1])
        return sums.index_add_(0, self.components, self.null[:, None] * columns)

    def without_null(self, columns: Tensor) -> Tensor:
        """The columns, their part in the null space of L taken out."""
        return columns - self.null[:, None] * self.along_null(columns)[self.components]

    def reached(self, labeled: Tensor) -> Tensor:
        """N, bool: whether the component of each node holds one of the nodes `labeled`."""
        holds = torch.zeros(self.num_components, dtype=torch.bool)
        holds[self.components[labeled]] = True
        return holds[self.components]


def graph_operator(affinity: sp.csr_matrix, *, self_loops: str = "published") -> GraphOperator:
    """The operator of a symmetric affinity matrix W.

    Args:
        affinity: N x N.
        self_loops: a key of `lib.spectral.SELF_LOOPS`.

    Raises:
        ValueError: for an unknown choice of self-loops.
    """
    in_laplacian, in_seeds = self_loop_choice(self_loops)
    components, null = null_space(affinity, self_loops=in_laplacian)
    degree = positive_degrees(affinity, self_loops=in_laplacian)
    return GraphOperator(
        csr_operator(normalized_affinity(affinity, self_loops=in_laplacian)),
        torch.from_numpy(components).long(),
        torch.from_numpy(null).float(),
        torch.from_numpy(np.sqrt(degree)).float(),
        positive_degrees(affinity, self_loops=in_seeds),
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
    solution, residual, direction = torch.zeros_like(columns), columns.clone(), columns.clone()
    square = residual.square().sum(dim=0)
    target = square * tolerance**2
    for _ in range(max_iterations):
        if (square <= target).all():
            return solution
        image = apply(direction)
        curvature = (direction * image).sum(dim=0)
        # a column that is done stands still: 0 / 0 there
        step = torch.where(
            (square > target) & (curvature > 0), square / curvature, torch.zeros_like(square)
        )
        solution += step * direction
        residual -= step * image
        before, square = square, residual.square().sum(dim=0)
        ratio = torch.where(before > 0, square / before, torch.zeros_like(square))
        direction = residual + ratio * direction
    worst = float((square / target.clamp_min(1e-37)).max().sqrt()) * tolerance
    warnings.warn(
        f"conjugate gradients stopped after {max_iterations} steps at a residual of {worst:.1e}; the "
        "graph is close to falling apart: take more neighbours per image, or another filter",
        stacklevel=2,
    )
    return solution


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


def _pseudo_inverse(operator: GraphOperator, columns: Tensor) -> Tensor:
    def laplacian(x: Tensor) -> Tensor:
        return operator.without_null(x - operator.product(x))

    return conjugate_gradients(laplacian, operator.without_null(columns))


def _powers(operator: GraphOperator, columns: Tensor, *, power: int = 20) -> Tensor:
    if power < 0:
        raise ValueError(f"power {power} of a filter: must not be negative")
    for _ in range(power):
        columns = operator.product(columns)
    return _pseudo_inverse(operator, columns)


def _smoothed_step(
    operator: GraphOperator, columns: Tensor, *, cutoff: float = 0.20, degree: int = 40
) -> Tensor:
    if not 0 < cutoff < 2 or degree < 1:
        raise ValueError(f"cut-off {cutoff} and degree {degree}: give 0 < cut-off < 2, degree >= 1")
    columns = operator.without_null(columns)
    low = chebyshev_filter(operator.product, step_coefficients(cutoff, degree), columns)
    return _pseudo_inverse(operator, low)


def _heat(operator: GraphOperator, columns: Tensor, *, time: float = 20.0) -> Tensor:
    if not 0 < time < math.inf:
        raise ValueError(f"time {time} of the heat kernel: must be positive")
    degree = 10 + math.ceil(6 * math.sqrt(time))  # what is left out is below 1e-6
    coefficients = chebyshev.chebinterpolate(lambda s: np.exp(time * (s - 1)), degree)
    return chebyshev_filter(operator.product, coefficients, columns)


def _ppr(operator: GraphOperator, columns: Tensor, *, alpha: float = 0.99) -> Tensor:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha}: must lie between 0 and 1")

    def restart(x: Tensor) -> Tensor:
        return x - alpha * operator.product(x)

    return conjugate_gradients(restart, (1 - alpha) * columns)


FILTERS: dict[str, Callable[..., Tensor]] = {
    "pseudo-inverse": _pseudo_inverse,
    "powers": _powers,
    "smoothed-step": _smoothed_step,
    "heat": _heat,
    "ppr": _ppr,
}
WITHOUT_NULL = ("pseudo-inverse", "powers", "smoothed-step")


def filter_columns(
    operator: GraphOperator, columns: Tensor, name: str = "smoothed-step", **parameters: float
) -> Tensor:
    """g(L) x for every column x, in tiles of `TILE` columns.

    The seeds of many label counts, stacked side by side, share their products.

    Args:
        columns: N x m, float32.
        name: a key of `FILTERS`.
        parameters: of that filter: power, cutoff and degree, time, or alpha.

    Returns:
        N x m, float32.

    Raises:
        ValueError: for an unknown filter or a parameter out of range.
    """
    if name not in FILTERS:
        raise ValueError(f"unknown filter {name!r}: take one of {', '.join(FILTERS)}")
    answers = [
        FILTERS[name](operator, tile.contiguous(), **parameters)
        for tile in columns.float().split(TILE, dim=1)
    ]
    return torch.cat(answers, dim=1)


def filter_each(
    operator: GraphOperator, columns: list[Tensor], name: str, **parameters: float
) -> list[Tensor]:
    """`filter_columns` of several N x m matrices, stacked so that they share their products."""
    widths = [c.shape[1] for c in columns]
    return list(
        filter_columns(operator, torch.cat(columns, 1), name, **parameters).split(widths, 1)
    )
