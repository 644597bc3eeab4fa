"""Spectrum of the normalised Laplacian of a sparse graph, its null space taken exactly.

L = I - S with S = D^-1/2 W D^-1/2. The smallest eigenvalues of L are the largest of S, and Lanczos
finds the largest ones without solving any linear system; both matrices have the same eigenvectors.
"""

import inspect
import warnings
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

DENSE_BELOW = 400  # nodes; smaller problems are solved at once by LAPACK
SELF_LOOPS = {  # name: (self-loops in the Laplacian, self-loops in the degrees of the constraints)
    "published": (False, True),
    "keep": (True, True),
    "drop": (False, False),
}
TOLERANCE = 1e-4  # of Lanczos, relative to the eigenvalues of S (published: 1e-2)
NULL_BELOW = -1.5  # eigenvalues of S lie above, the null vectors that were moved to -2 below
SEEDED_RESTARTS = "rng" in inspect.signature(eigsh).parameters  # scipy 1.17 draws them at random


@dataclass(frozen=True)
class Spectrum:
    """The lower end of the spectrum of L, without its null space.

    Attributes:
        values: k eigenvalues of L, rising, all positive.
        vectors: N x k, float32, orthonormal columns.
        components: N, number of the connected component of each node.
        null: N, the null space: entry i belongs to the unit null vector of component[i], which is
            proportional to sqrt(degree) inside the component and zero outside.
        degrees: N, float64, all positive, the degrees that constraints on this graph are weighed with.
    """

    values: np.ndarray
    vectors: np.ndarray
    components: np.ndarray
    null: np.ndarray
    degrees: np.ndarray

    @property
    def num_components(self) -> int:
        return int(self.components.max()) + 1


def _without_self_loops(affinity: sp.csr_matrix) -> sp.csr_matrix:
    return affinity - sp.diags(affinity.diagonal(), dtype=affinity.dtype)


def degrees(affinity: sp.csr_matrix, *, self_loops: bool) -> np.ndarray:
    """Row sums of W, with or without its diagonal; N, float64."""
    # off before the sum: weak edges beside a strong self-loop would be lost in the difference
    kept = affinity if self_loops else _without_self_loops(affinity)
    return np.asarray(kept.sum(axis=1, dtype=np.float64)).ravel()


def normalized_affinity(affinity: sp.csr_matrix, *, self_loops: bool) -> sp.csr_matrix:
    """S = D^-1/2 W D^-1/2; the row and column of an isolated node are zero."""
    if not self_loops:
        affinity = _without_self_loops(affinity)
    degree = degrees(affinity, self_loops=True)
    inverse_root = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    scaling = sp.diags(inverse_root.astype(np.float32))
    return (scaling @ affinity @ scaling).tocsr()


def _null_space(affinity: sp.csr_matrix, *, self_loops: bool) -> tuple[np.ndarray, np.ndarray]:
    """Component of each node, and each node's entry of its component's null vector."""
    _, components = connected_components(affinity, directed=False)
    degree = degrees(affinity, self_loops=self_loops)
    size = np.bincount(components)
    degree[size[components] == 1] = 1  # an isolated node: its null vector is its own unit vector
    mass = np.bincount(components, weights=degree)
    return components, np.sqrt(degree / mass[components])


def project(null: np.ndarray, components: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Coefficients of `columns` (N x m) along the null vectors: c x m."""
    count = int(components.max()) + 1
    basis = sp.csr_matrix((null, (components, np.arange(len(null)))), (count, len(null)))
    return np.asarray(basis @ columns)


def laplacian_spectrum(
    affinity: sp.csr_matrix,
    num_vectors: int = 199,
    *,
    self_loops: str = "published",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Spectrum:
    """The eigenvectors of smallest positive eigenvalue of the normalised Laplacian.

    A graph with c components has c eigenvalues 0, whose vectors are known in closed form. They are
    moved to the other end of the spectrum before the solver starts, so that neither their number nor
    the solver's accuracy decides what counts as zero.

    Args:
        affinity: symmetric W, N x N.
        num_vectors: k, cut down to N - c. Published: 200 including the constant one, so 199. Fewer
            come back where an eigenvalue repeats so often that Lanczos does not find all its vectors.
        self_loops: a key of `SELF_LOOPS`. The published code leaves W's diagonal out of the Laplacian
            and counts it in the degrees of the constraints.
        tolerance: relative accuracy of the eigenvalues of S (all at most 1).
        seed: of the start vector; the same seed gives the same vectors.

    Raises:
        ValueError: for an unknown choice of self-loops, or where Lanczos fails (a graph in shreds).

    Warns:
        UserWarning: where the graph falls apart, naming the number of components.
    """
    if self_loops not in SELF_LOOPS:
        raise ValueError(f"unknown self-loops {self_loops!r}: take one of {', '.join(SELF_LOOPS)}")
    in_laplacian, in_degrees = SELF_LOOPS[self_loops]
    seed_degrees = degrees(affinity, self_loops=in_degrees)
    seed_degrees[seed_degrees == 0] = 1  # an isolated image weighs what its self-loop would
    components, null = _null_space(affinity, self_loops=in_laplacian)
    n, count = len(null), int(components.max()) + 1
    if count > 1:
        warnings.warn(
            f"the graph has {count} components (the largest holds {np.bincount(components).max()} of {n} "
            "images); an image whose component holds no label gets confidence 0. More neighbours "
            "per image join them",
            stacklevel=2,
        )
    s = normalized_affinity(affinity, self_loops=in_laplacian)
    num_vectors = min(num_vectors, n - count)
    if num_vectors < 1:
        empty = np.empty((n, 0), np.float32)
        return Spectrum(np.empty(0), empty, components, null, seed_degrees)
    basis = sp.csr_matrix((null.astype(np.float32), (np.arange(n), components)), (n, count))

    def deflated(x: np.ndarray) -> np.ndarray:
        # eigenvalue 1 of the null vectors becomes -2, below every other one (they are >= -1)
        return s @ x - 3 * (basis @ (basis.T @ x))

    if n < DENSE_BELOW or num_vectors > n // 2:
        values, vectors = np.linalg.eigh(deflated(np.eye(n)))
    else:
        rng = np.random.default_rng(seed)
        start = rng.standard_normal(n).astype(np.float32)
        operator = LinearOperator((n, n), matvec=deflated, matmat=deflated, dtype=np.float32)
        restarts = {"rng": rng} if SEEDED_RESTARTS else {}
        try:
            values, vectors = eigsh(
                operator, num_vectors, which="LA", v0=start, tol=tolerance, **restarts
            )
        except ArpackError as error:
            raise ValueError(
                f"the eigenvectors of this graph of {count} components cannot be found ({error}); take "
                "more neighbours per image or fewer eigenvectors"
            ) from error
    order = np.argsort(-values)[:num_vectors]
    order = order[values[order] > NULL_BELOW]
    laplacian_values = 1 - values[order].astype(np.float64)
    # rounding can put an almost disconnected part at 0 or below
    floor = np.finfo(np.float32).eps
    return Spectrum(
        np.maximum(laplacian_values, floor),
        vectors[:, order].astype(np.float32),
        components,
        null,
        seed_degrees,
    )
