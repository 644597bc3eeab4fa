"""Smallest eigenvalues of the normalized Laplacian and their eigenvectors, the null space taken exactly.

The smallest eigenvalues of L = I - S are the largest ones of S, and Lanczos finds those without solving
any linear system; both matrices have the same eigenvectors. ARPACK solves small graphs, the block solver
of lib/graph/eigensolver.py large ones.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from lib.graph import eigensolver
from lib.graph.laplacian import (
    Operator,
    csr_operator,
    normalized_affinity,
    null_projection,
    null_space,
    positive_degrees,
    self_loop_choice,
)

SOLVERS = ("auto", "arpack", "block")
DENSE_BELOW = 400  # nodes; LAPACK solves smaller problems at once
BLOCK_FROM = 5_000  # nodes from which "auto" takes the block solver
TOLERANCE = 1e-4  # relative accuracy of ARPACK's eigenvalues of S (published: 1e-2)
LARGE_RESIDUAL = 0.02  # residual of an eigenvector; on real features it is below 1e-3
NULL_BELOW = -1.5  # eigenvalues of S lie above, null vectors that were moved to -2 below
EPS = float(np.finfo(np.float32).eps)
SEEDED_RESTARTS = "rng" in inspect.signature(eigsh).parameters  # scipy 1.17 draws them at random


@dataclass(frozen=True)
class Spectrum:
    """Lower end of the spectrum of L, without its null space.

    Attributes:
        values: k eigenvalues of L, rising, all positive.
        vectors: N x k, float32, orthonormal columns.
        components: N, number of the connected component of each node.
        null: N, the null space: entry i belongs to the unit null vector of component[i], which is
            proportional to sqrt(degree) inside the component and zero outside.
        degrees: N, float64, all positive, the degrees that weigh the constraints on this graph.
        residual: largest norm |L v - value v| of a vector.
    """

    values: np.ndarray
    vectors: np.ndarray
    components: np.ndarray
    null: np.ndarray
    degrees: np.ndarray
    residual: float = 0.0

    @property
    def num_components(self) -> int:
        return int(self.components.max()) + 1


def laplacian_spectrum(
    affinity: sp.csr_matrix,
    num_vectors: int = 199,
    *,
    self_loops: str = "published",
    tolerance: float | None = None,
    seed: int = 0,
    solver: str = "auto",
    device: torch.device | str = "cpu",
    basis_bytes: int = eigensolver.BASIS_BYTES,
    product: Operator | None = None,
) -> Spectrum:
    """Find the eigenvectors of smallest positive eigenvalue of the normalized Laplacian.

    A graph with c components has c eigenvalues 0, whose vectors are known in closed form. They are
    moved to the other end of the spectrum before the solver starts, so that neither their number nor
    the accuracy of the solver decides what counts as zero.

    Args:
        affinity: symmetric W, N x N.
        num_vectors: k, cut down to N - c. Published: 200 including the constant one, so 199. Fewer
            come back where an eigenvalue repeats so often that Lanczos does not find all its vectors.
        self_loops: a key of `lib.graph.laplacian.SELF_LOOPS`. The published code leaves the diagonal of W
            out of the Laplacian and counts it in the degrees of the constraints.
        tolerance: for "arpack", relative tolerance of the eigenvalues of S (`TOLERANCE`); for "block",
            that of `largest_eigenvectors` (`lib.graph.eigensolver.TOLERANCE`); None takes these.
        seed: seed of the start vectors; the same seed gives the same vectors.
        solver: "arpack" (Lanczos, CPU, one core), "block" (`largest_eigenvectors`), or "auto": block from
            `BLOCK_FROM` nodes on. Very small problems are dense whatever is chosen.
        device: device of the products and of the block solver.
        basis_bytes: bound of the basis of the block solver.
        product: products with S on `device`, where they exist already or its rows are divided among
            processes; None makes them here.

    Raises:
        ValueError: for an unknown choice of self-loops or solver, or where ARPACK fails (a graph in
            shreds).

    Warns:
        UserWarning: where the graph falls apart, naming the number of components; where the vectors are not
            accurate.
    """
    in_laplacian, in_constraints = self_loop_choice(self_loops)
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: take one of {', '.join(SOLVERS)}")
    degrees = positive_degrees(affinity, self_loops=in_constraints)
    components, null = null_space(affinity, self_loops=in_laplacian)
    n, count = len(null), int(components.max()) + 1
    _warn_of_components(components, count)
    k = min(num_vectors, n - count)
    if k < 1:
        return Spectrum(np.empty(0), np.empty((n, 0), np.float32), components, null, degrees)
    if product is None:
        product = csr_operator(normalized_affinity(affinity, self_loops=in_laplacian), device)
    solver = _solver_for(solver, n, k)
    if solver == "block":
        values, vectors, residual = _by_blocks(
            product, null, components, k, tolerance, seed, device, basis_bytes
        )
    else:
        on_host, exact = _on_host(product, device), solver == "dense"
        values, vectors = _deflated_eigh(on_host, null, components, k, exact, tolerance, seed)
        residual = _residual(on_host, values, vectors)
    _warn_of_residual(residual)
    # Rounding can put an almost disconnected part at 0 or below.
    values = np.maximum(1 - values.astype(np.float64), EPS)
    return Spectrum(values, vectors, components, null, degrees, residual)


def _warn_of_components(components: np.ndarray, count: int) -> None:
    if count > 1:
        warnings.warn(
            f"the graph has {count} components (the largest holds {np.bincount(components).max()} of "
            f"{len(components)} images); an image whose component holds no label gets confidence 0. More "
            "neighbors per image join them",
            stacklevel=3,
        )


def _warn_of_residual(residual: float) -> None:
    if residual > LARGE_RESIDUAL:
        warnings.warn(
            f"the eigenvectors are known to a residual of {residual:.1e} only, for want of a gap between "
            "eigenvalues: take another number of eigenvectors, or a larger basis",
            stacklevel=3,
        )


def _on_host(product: Operator, device: torch.device | str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the same products for a solver of scipy: N x m (or N) float32 arrays."""

    def apply(x: np.ndarray) -> np.ndarray:
        columns = torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32))
        return product(columns.to(device)).cpu().numpy().reshape(x.shape)

    return apply


def _solver_for(solver: str, n: int, k: int) -> str:
    if n < DENSE_BELOW or (k > n // 2 and (solver == "arpack" or n < BLOCK_FROM)):
        return "dense"
    if solver == "auto":
        return "block" if n >= BLOCK_FROM else "arpack"
    return solver


def _by_blocks(
    product: Operator,
    null: np.ndarray,
    components: np.ndarray,
    k: int,
    tolerance: float | None,
    seed: int,
    device: torch.device | str,
    basis_bytes: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(len(null), eigensolver.BLOCK, generator=rng).to(device)
    values, vectors, residual = eigensolver.largest_eigenvectors(
        product,
        null_projection(null, components, device),
        start,
        k,
        rank=len(null) - int(components.max()) - 1,
        tolerance=tolerance or eigensolver.TOLERANCE,
        basis_bytes=basis_bytes,
        seed=seed,
    )
    return values.numpy(), vectors.cpu().numpy(), residual


def _deflated_eigh(
    product: Callable[[np.ndarray], np.ndarray],
    null: np.ndarray,
    components: np.ndarray,
    k: int,
    exact: bool,
    tolerance: float | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the largest eigenvalues, falling, and their vectors: by LAPACK if `exact`, else by ARPACK."""
    n, count = len(null), int(components.max()) + 1
    basis = sp.csr_matrix((null.astype(np.float32), (np.arange(n), components)), (n, count))

    def deflated(x: np.ndarray) -> np.ndarray:
        # Eigenvalue 1 of the null vectors becomes -2, below all others, which are at least -1.
        return product(x) - 3 * (basis @ (basis.T @ x))

    if exact:
        values, vectors = np.linalg.eigh(deflated(np.eye(n)))
    else:
        rng = np.random.default_rng(seed)
        start = rng.standard_normal(n).astype(np.float32)
        operator = LinearOperator((n, n), matvec=deflated, matmat=deflated, dtype=np.float32)
        restarts = {"rng": rng} if SEEDED_RESTARTS else {}
        tolerance = tolerance or TOLERANCE
        try:
            values, vectors = eigsh(operator, k, which="LA", v0=start, tol=tolerance, **restarts)
        except ArpackError as error:
            raise ValueError(
                f"the eigenvectors of this graph of {count} components cannot be found ({error}); take "
                "more neighbors per image or fewer eigenvectors"
            ) from error
    order = np.argsort(-values)[:k]
    order = order[values[order] > NULL_BELOW]
    return values[order], vectors[:, order].astype(np.float32)


def _residual(
    product: Callable[[np.ndarray], np.ndarray], values: np.ndarray, vectors: np.ndarray
) -> float:
    """Return the largest norm |S v - value v| of a vector."""
    worst = 0.0
    for start in range(0, len(values), eigensolver.BLOCK):
        tile = slice(start, start + eigensolver.BLOCK)
        errors = product(vectors[:, tile]) - vectors[:, tile] * values[tile]
        worst = max(worst, float(np.linalg.norm(errors, axis=0).max()))
    return worst
