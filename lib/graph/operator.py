"""Graph operator: products with S, the null space of L = I - S, and the solution of L x = b.

The product is a function, so that its rows may be spread over several processes.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib.graph.laplacian import (
    Operator,
    csr_operator,
    normalized_affinity,
    null_projection,
    null_space,
    positive_degrees,
    self_loop_choice,
)
from lib.runtime.seeding import generator

TOLERANCE = 1e-4  # residual of conjugate gradients over the norm of the right-hand side
MAX_ITERATIONS = 2000
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class GraphOperator:
    """What a filter needs of a graph; its vectors are on the CPU.

    Attributes:
        product: N x m -> S x, N x m contiguous columns, float32, on `device`.
        components: N, number of the connected component of each node.
        null: N, float32; inside a component its unit null vector, proportional to `root_degrees`.
        root_degrees: N, float32, square roots of the degrees in the Laplacian, 1 at an isolated node.
        degrees: N, float64, all positive, the degrees that weigh the constraints.
        device: device of the products.
    """

    product: Operator
    components: Tensor
    null: Tensor
    root_degrees: Tensor
    degrees: np.ndarray
    device: torch.device | str = "cpu"

    @property
    def num_components(self) -> int:
        return int(self.components.max()) + 1

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """Smallest positive eigenvalue of L, from above, by inverse iteration; 2 where there is none."""
        if self.num_components == len(self.null):
            return 2.0
        columns = torch.randn(len(self.null), 4, generator=generator(0, "sample")).to(self.device)
        for _ in range(8):
            columns = self.solve(columns)
            columns = columns / columns.norm(dim=0)
        quotient = (columns * (columns - self.product(columns))).sum(dim=0)
        # Rounding can put an almost disconnected part at 0 or below.
        return max(float(torch.nan_to_num(quotient).min()), EPS)

    @cached_property
    def project_out(self) -> Operator:
        """Projection that takes the null space of L out of columns on `device`, in place."""
        return null_projection(self.null.numpy(), self.components.numpy(), self.device)

    def without_null(self, columns: Tensor) -> Tensor:
        """Copy the columns without their part in the null space of L."""
        return self.project_out(columns.clone())

    def solve(self, columns: Tensor) -> Tensor:
        """Apply the pseudo-inverse of L to columns on `device`."""

        def laplacian(x: Tensor) -> Tensor:
            return self.project_out(x - self.product(x))

        return conjugate_gradients(laplacian, self.without_null(columns))

    def reached(self, labeled: Tensor) -> Tensor:
        """Tell for each node whether its component holds one of the nodes `labeled`: N, bool."""
        holds = torch.zeros(self.num_components, dtype=torch.bool)
        holds[self.components[labeled]] = True
        return holds[self.components]


def graph_operator(
    affinity: sp.csr_matrix,
    *,
    self_loops: str = "published",
    product: Operator | None = None,
    device: torch.device | str = "cpu",
) -> GraphOperator:
    """Make the operator of a symmetric affinity matrix W.

    Args:
        affinity: W, N x N.
        self_loops: a key of `lib.graph.laplacian.SELF_LOOPS`.
        product: products with S, where they exist already.
        device: device of the products.

    Raises:
        ValueError: for an unknown choice of self-loops.
    """
    in_laplacian, in_constraints = self_loop_choice(self_loops)
    components, null = null_space(affinity, self_loops=in_laplacian)
    degree = positive_degrees(affinity, self_loops=in_laplacian)
    if product is None:
        product = csr_operator(normalized_affinity(affinity, self_loops=in_laplacian), device)
    return GraphOperator(
        product,
        torch.from_numpy(components).long(),
        torch.from_numpy(null).float(),
        torch.from_numpy(np.sqrt(degree)).float(),
        positive_degrees(affinity, self_loops=in_constraints),
        device,
    )


def conjugate_gradients(
    apply: Operator,
    columns: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Solve A x = b for every column b, each with its own step lengths (Hestenes and Stiefel 1952).

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
    # Right-hand sides have unit norm: float32 would lose the squares of small ones.
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
    worst = float((square / target.clamp_min(1e-37)).max().sqrt()) * tolerance
    warnings.warn(
        f"conjugate gradients stopped after {steps} steps at a residual of {worst:.1e}; the "
        "graph is close to falling apart: take more neighbors per image, or another filter",
        stacklevel=2,
    )
    return solution * size
