"""Smallest eigenvalues of the normalized Laplacian and their eigenvectors, the null space taken exactly.

They are the largest ones of S = I - L, which Lanczos finds without solving any linear system. ARPACK solves
small graphs, the block solver of lib/graph/eigensolver.py large ones.
"""

import inspect
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from lib.graph import eigensolver
from lib.graph.laplacian import EPS, GraphOperator
from models.layers import l2_normalize

SOLVERS = ("auto", "arpack", "block")
DENSE_BELOW = 400  # nodes; LAPACK solves smaller problems at once
BLOCK_FROM = 5_000  # nodes from which "auto" takes the block solver
TOLERANCE = 1e-4  # relative accuracy of ARPACK's eigenvalues of S (published: 1e-2)
LARGE_RESIDUAL = 0.02  # residual of an eigenvector; on real features it is below 1e-3
NULL_BELOW = -1.5  # eigenvalues of S lie above, null vectors that were moved to -2 below
SEEDED_RESTARTS = "rng" in inspect.signature(eigsh).parameters  # scipy 1.17 draws them at random


@dataclass(frozen=True)
class Spectrum:
    """Lower end of the spectrum of L, without its null space, for a graph of N nodes."""

    values: (
        np.ndarray
    )  # k eigenvalues of L, rising, all positive; the rest lies on the graph's device
    vectors: Tensor  # N x k, float32, orthonormal columns
    components: Tensor  # the connected component of each node, int64
    # The unit null vector of the component of each node there, float64; proportional to sqrt(degree).
    null: Tensor
    degrees: Tensor  # float64, all positive, the degrees that weigh the constraints
    residual: float = 0.0  # largest norm |L v - value v| of a vector

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    @cached_property
    def num_components(self) -> int:
        return int(self.components.max()) + 1

    def first(self, num_vectors: int) -> "Spectrum":
        """Return the first of these eigenvectors."""
        values, vectors = self.values[:num_vectors], self.vectors[:, :num_vectors]
        return replace(self, values=values, vectors=vectors)

    def rows(self, images: Tensor | None = None) -> Tensor:
        """Compute the unit rows of U diag(1 / sqrt(lambda)) at some images, or at all: M x k, as published.

        The products before the scaling are those of the pseudo-inverse of L, which the normalized cut spreads
        labels by.
        """
        vectors = self.vectors if images is None else self.vectors[images.to(self.device)]
        return l2_normalize(vectors * torch.from_numpy(self.values).to(vectors).rsqrt())

    def to(self, device: torch.device | str) -> "Spectrum":
        names = ("vectors", "components", "null", "degrees")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def laplacian_spectrum(
    graph: GraphOperator,
    num_vectors: int = 199,
    *,
    solver: str = "auto",
    basis_bytes: int = eigensolver.BASIS_BYTES,
) -> Spectrum:
    """Find the eigenvectors of smallest positive eigenvalue of the normalized Laplacian.

    A graph with c components has c eigenvalues 0, whose vectors are known in closed form. They are taken out
    before the solver starts, so that neither their number nor the accuracy of the solver decides what counts
    as zero. The same graph gives the same bits again on a CPU, and
    on a GPU with deterministic algorithms.

    Args:
        num_vectors: k, cut down to N - c. Published: 200 including the constant one, so 199. Fewer
            come back where an eigenvalue repeats so often that Lanczos does not find all its vectors.
        solver: "arpack" (Lanczos, CPU, one core), "block" (`largest_eigenvectors`, on the graph's device),
            or "auto": block from `BLOCK_FROM` nodes on. Very small problems are dense whatever is chosen.
        basis_bytes: bound of the basis of the block solver.

    Raises:
        ValueError: for an unknown solver, or where ARPACK fails (a graph in shreds).

    Warns:
        UserWarning: where the graph falls apart, or the vectors are not accurate.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: take one of {', '.join(SOLVERS)}")
    n, count = len(graph), graph.num_components
    if count > 1:
        largest = int(torch.bincount(graph.components).max())
        warnings.warn(
            f"the graph has {count} components (the largest holds {largest} of "
            f"{n} images); an image whose component holds no label gets confidence 0. More neighbors per "
            "image join them",
            stacklevel=2,
        )
    of_graph = graph.components, graph.exact_null, graph.degrees
    k = min(num_vectors, n - count)
    if k < 1:
        return Spectrum(np.empty(0), torch.empty(n, 0, device=graph.device), *of_graph)
    dense = n < DENSE_BELOW or (k > n // 2 and (solver == "arpack" or n < BLOCK_FROM))
    if not dense and (solver == "block" or (solver == "auto" and n >= BLOCK_FROM)):
        values, vectors, residual = _by_blocks(graph, k, basis_bytes)
    else:
        values, vectors, residual = _by_scipy(graph, k, dense)
    if residual > LARGE_RESIDUAL:
        warnings.warn(
            f"the eigenvectors are known to a residual of {residual:.1e} only, for want of a gap between "
            "eigenvalues: take another number of eigenvectors, or a larger basis",
            stacklevel=2,
        )
    # Rounding can put an almost disconnected part at 0 or below.
    values = np.maximum(1 - values.astype(np.float64), EPS)
    return Spectrum(values, vectors, *of_graph, residual)


def _by_blocks(graph: GraphOperator, k: int, basis_bytes: int) -> tuple[np.ndarray, Tensor, float]:
    """Find the largest eigenvalues of S, falling, their vectors and largest residual by the block solver."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(len(graph), eigensolver.BLOCK, generator=rng).to(graph.device)
    rank = len(graph) - graph.num_components
    values, vectors, residual = eigensolver.largest_eigenvectors(
        graph.product, graph.project_out, start, k, rank=rank, basis_bytes=basis_bytes
    )
    return values.numpy(), vectors, residual


def _by_scipy(graph: GraphOperator, k: int, dense: bool) -> tuple[np.ndarray, Tensor, float]:
    """Find the same by LAPACK if `dense`, else by ARPACK."""
    n, count = len(graph), graph.num_components
    places = np.arange(n), graph.components.cpu().numpy()
    basis = sp.csr_matrix((graph.null.cpu().numpy(), places), (n, count))

    def multiply(x: np.ndarray) -> np.ndarray:
        columns = torch.from_numpy(np.ascontiguousarray(x.reshape(n, -1), dtype=np.float32))
        return graph.product(columns.to(graph.device)).cpu().numpy().reshape(x.shape)

    def deflated(x: np.ndarray) -> np.ndarray:
        # Eigenvalue 1 of the null vectors becomes -2, below all others, which are at least -1.
        return multiply(x) - 3 * (basis @ (basis.T @ x))

    if dense:
        values, vectors = np.linalg.eigh(deflated(np.eye(n)))
    else:
        rng = np.random.default_rng(0)
        start = rng.standard_normal(n).astype(np.float32)
        operator = LinearOperator((n, n), matvec=deflated, matmat=deflated, dtype=np.float32)
        restarts = {"rng": rng} if SEEDED_RESTARTS else {}
        try:
            values, vectors = eigsh(operator, k, which="LA", v0=start, tol=TOLERANCE, **restarts)
        except ArpackError as error:
            raise ValueError(
                f"the eigenvectors of this graph of {count} components cannot be found ({error}); take "
                "more neighbors per image or fewer eigenvectors"
            ) from error
    order = np.argsort(-values)[:k]
    order = order[values[order] > NULL_BELOW]
    values, vectors = values[order], vectors[:, order].astype(np.float32)
    errors = [0.0]
    for first in range(0, len(values), eigensolver.BLOCK):
        tile = slice(first, first + eigensolver.BLOCK)
        rest = multiply(vectors[:, tile]) - vectors[:, tile] * values[tile]
        errors.append(float(np.linalg.norm(rest, axis=0).max()))
    return values, torch.from_numpy(vectors).to(graph.device), max(errors)
