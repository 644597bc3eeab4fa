"""The normalized Laplacian L = I - S of a sparse graph: products with S, null space, solution of L x = b.

S = D^-1/2 W D^-1/2 for an affinity matrix W with degrees D. L has an eigenvalue 0 for every connected
component of the graph; its null vector is proportional to sqrt(degree) inside the component and zero
outside, so that the null space is known without any solver. Products are functions, so that the rows of S
may be spread over several processes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lib.graph.sparse import (
    arrays,
    csr,
    entries,
    from_scipy,
    product_in_order,
    row_sums,
    to_scipy,
)
from lib.runtime.seeding import generator

Operator = Callable[[Tensor], Tensor]  # N x m, contiguous -> N x m
SELF_LOOPS = {  # name: (self-loops in the Laplacian, self-loops in the degrees of the constraints)
    "published": (False, True),
    "keep": (True, True),
    "drop": (False, False),
}
TOLERANCE = 1e-4  # residual of conjugate gradients over the norm of the right-hand side
MAX_ITERATIONS = 2000  # of conjugate gradients
EPS = torch.finfo(torch.float32).eps


def self_loop_choice(name: str) -> tuple[bool, bool]:
    """Look up a key of `SELF_LOOPS`; ValueError for another name."""
    if name not in SELF_LOOPS:
        raise ValueError(f"unknown self-loops {name!r}: take one of {', '.join(SELF_LOOPS)}")
    return SELF_LOOPS[name]


def _copied(affinity: Tensor, *, self_loops: bool) -> Tensor:
    """Copy W, which shares rows and columns; without self-loops the diagonal holds zeros."""
    crow, col, values = arrays(affinity)
    values = values.clone()
    if not self_loops:
        for part, rows in entries(affinity):
            values[part].masked_fill_(col[part] == rows, 0)
    return csr(crow, col, values, len(crow) - 1)


def degrees(affinity: Tensor, *, self_loops: bool) -> Tensor:
    """Sum the rows of W, with or without its diagonal: N, float64.

    An isolated image has 1, the weight that its self-loop would have.
    """
    # The diagonal leaves before the sum: weak edges beside a strong self-loop would be lost in a difference.
    found = row_sums(affinity if self_loops else _copied(affinity, self_loops=False))
    return found.masked_fill_(found == 0, 1)


def normalized_affinity(affinity: Tensor, *, self_loops: bool) -> Tensor:
    """Compute S = D^-1/2 W D^-1/2 in one copy of W; an isolated node has a row and column of zeros."""
    plain = _copied(affinity, self_loops=self_loops)
    inverse_root = (1 / degrees(plain, self_loops=True).sqrt()).float()
    _, col, values = arrays(plain)
    for part, rows in entries(plain):
        values[part] *= inverse_root[rows]
        values[part] *= inverse_root[col[part]]
    return plain


def null_space(affinity: Tensor, *, self_loops: bool) -> tuple[Tensor, Tensor]:
    """Find the component of each node, and each node's entry of its component's null vector.

    The components are found on the CPU, whatever the device of W.
    """
    # Strongly connected is the same in a symmetric graph, and needs no transposed copy.
    _, components = connected_components(to_scipy(affinity), connection="strong")
    degree = degrees(affinity, self_loops=self_loops)
    mass = torch.from_numpy(np.bincount(components, weights=degree.cpu().numpy()))
    components = torch.from_numpy(components).long().to(degree.device)
    return components, (degree / mass.to(degree.device)[components]).sqrt()


def csr_operator(matrix: Tensor) -> Operator:
    """Return products with a sparse matrix, on its device."""
    if matrix.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return lambda x: product_in_order(matrix, x)
    return lambda x: matrix @ x


def reordered_operator(
    matrix: Tensor, order: Tensor, make: Callable[[Tensor], Operator]
) -> Operator:
    """Return products with a square matrix on the CPU, by those that `make` makes of it in another order."""
    place = torch.argsort(order)
    turned = to_scipy(matrix)[order.numpy()]
    turned.indices = place.numpy().astype(turned.indices.dtype)[turned.indices]
    turned.has_sorted_indices = False
    turned.sort_indices()
    product = make(from_scipy(turned))
    return lambda x: product(x[order])[place]


@dataclass(frozen=True)
class GraphOperator:
    """What solvers and filters need of a graph of N nodes."""

    product: Operator  # x -> S x, float32, on the device of all that follows
    components: Tensor  # the connected component of each node, int64
    # The unit null vector of L of the component of each node there, float64; proportional to `root_degrees`.
    exact_null: Tensor
    root_degrees: Tensor  # float32, of the degrees in the Laplacian; 1 at an isolated node
    degrees: Tensor  # float64, all positive, the degrees that weigh the constraints

    def __len__(self) -> int:
        return len(self.components)

    @property
    def device(self) -> torch.device:
        return self.components.device

    @cached_property
    def null(self) -> Tensor:
        return self.exact_null.float()

    @cached_property
    def num_components(self) -> int:
        return int(self.components.max()) + 1

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """Smallest positive eigenvalue of L, from above, by inverse iteration; 2 where there is none."""
        if self.num_components == len(self):
            return 2.0
        columns = torch.randn(len(self), 4, generator=generator(0, "sample")).to(self.device)
        for _ in range(8):
            columns = self.solve(columns)
            columns = columns / columns.norm(dim=0)
        quotient = (columns * (columns - self.product(columns))).sum(dim=0)
        # Rounding can put an almost disconnected part at 0 or below.
        return max(float(torch.nan_to_num(quotient).min()), EPS)

    @cached_property
    def project_out(self) -> Operator:
        """Projection that takes the null space of L out of columns, in place."""
        count, of, null = self.num_components, self.components, self.null[:, None]

        def project_out(x: Tensor) -> Tensor:
            if count == 1:
                return x.addmm_(null, null.T @ x, alpha=-1)
            sums = torch.zeros(count, x.shape[1], device=x.device).index_add_(0, of, null * x)
            return x.sub_(null * sums[of])

        return project_out

    def solve(self, columns: Tensor) -> Tensor:
        """Apply the pseudo-inverse of L to columns."""
        return conjugate_gradients(
            lambda x: self.project_out(x - self.product(x)), self.project_out(columns.clone())
        )

    def reached(self, labeled: Tensor) -> Tensor:
        """Tell for each node whether its component holds one of the nodes `labeled`: N, bool."""
        holds = torch.zeros(self.num_components, dtype=torch.bool, device=self.device)
        holds[self.components[labeled]] = True
        return holds[self.components]


def conjugate_gradients(apply: Operator, columns: Tensor) -> Tensor:
    """Solve A x = b for every column b of N x m, each with its own step lengths (Hestenes and Stiefel 1952).

    Args:
        apply: x -> A x, symmetric and positive on the space that the columns span under A.
        columns: right-hand sides; a column of zeros has the solution zero.

    Warns:
        UserWarning: where a residual stays above `TOLERANCE` times the norm of its column.
    """
    size = columns.norm(dim=0)
    # Right-hand sides have unit norm: float32 would lose the squares of small ones.
    residual = torch.where(size > 0, columns / size, torch.zeros_like(columns))
    solution, direction = torch.zeros_like(columns), residual.clone()
    square = residual.square().sum(dim=0)
    target = square * TOLERANCE**2
    steps = 0
    while steps < MAX_ITERATIONS:
        steps += 1
        if (square <= target).all():
            return solution * size
        image = apply(direction)
        curvature = (direction * image).sum(dim=0)
        # A column stands still when it is done, and where A x is rounding, which would blow it up.
        alive = (square > target) & (curvature > EPS * direction.square().sum(dim=0))
        if not alive.any():
            break
        step = torch.where(alive, square / curvature, torch.zeros_like(square))
        solution += step * direction
        residual -= step * image
        before, square = square, residual.square().sum(dim=0)
        ratio = torch.where(alive, square / before, torch.zeros_like(square))
        direction = residual + ratio * direction
    worst = float((square / target.clamp_min(1e-37)).max().sqrt()) * TOLERANCE
    warnings.warn(
        f"conjugate gradients stopped after {steps} steps at a residual of {worst:.1e}; the "
        "graph is close to falling apart: take more neighbors per image, or another filter",
        stacklevel=2,
    )
    return solution * size
