"""The normalized Laplacian L = I - S of a sparse graph, its null space, and products with S.

S = D^-1/2 W D^-1/2 for an affinity matrix W with degrees D. L has an eigenvalue 0 for every connected
component of the graph; its null vector is proportional to sqrt(degree) inside the component and zero
outside, so that the null space is known without any solver.
"""

import warnings
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # N x m, contiguous -> N x m
SELF_LOOPS = {  # name: (self-loops in the Laplacian, self-loops in the degrees of the constraints)
    "published": (False, True),
    "keep": (True, True),
    "drop": (False, False),
}
ROWS = 8192  # rows of the graph changed at a time


def self_loop_choice(name: str) -> tuple[bool, bool]:
    """Look up whether self-loops count in the Laplacian, and in the degrees of the constraints.

    Raises:
        ValueError: for a name that is not a key of `SELF_LOOPS`.
    """
    if name not in SELF_LOOPS:
        raise ValueError(f"unknown self-loops {name!r}: take one of {', '.join(SELF_LOOPS)}")
    return SELF_LOOPS[name]


def _without_self_loops(affinity: sp.csr_matrix) -> sp.csr_matrix:
    """Copy W without its diagonal; return W itself where it has none."""
    if not affinity.diagonal().any():
        return affinity
    plain = affinity.copy()
    for start in range(0, affinity.shape[0], ROWS):  # a row number for every entry would double it
        pointers = plain.indptr[start : start + ROWS + 1]
        rows = np.repeat(np.arange(start, start + len(pointers) - 1), np.diff(pointers))
        part = slice(pointers[0], pointers[-1])
        plain.data[part][plain.indices[part] == rows] = 0
    plain.eliminate_zeros()
    return plain


def degrees(affinity: sp.csr_matrix, *, self_loops: bool) -> np.ndarray:
    """Sum the rows of W, with or without its diagonal: N, float64."""
    # The diagonal leaves before the sum: weak edges beside a strong self-loop would be lost in a difference.
    kept = affinity if self_loops else _without_self_loops(affinity)
    return np.asarray(kept.sum(axis=1, dtype=np.float64)).ravel()


def positive_degrees(affinity: sp.csr_matrix, *, self_loops: bool) -> np.ndarray:
    """Compute `degrees`, with 1 for an isolated image: the weight that its self-loop would have."""
    found = degrees(affinity, self_loops=self_loops)
    found[found == 0] = 1
    return found


def normalized_affinity(affinity: sp.csr_matrix, *, self_loops: bool) -> sp.csr_matrix:
    """Compute S = D^-1/2 W D^-1/2 in one copy of W; an isolated node has a row and column of zeros."""
    plain = affinity if self_loops else _without_self_loops(affinity)
    degree = degrees(plain, self_loops=True)
    s = plain.copy() if plain is affinity else plain
    inverse_root = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    inverse_root = inverse_root.astype(np.float32)
    for start in range(0, s.shape[0], ROWS):
        pointers = s.indptr[start : start + ROWS + 1]
        part = slice(pointers[0], pointers[-1])
        s.data[part] *= np.repeat(inverse_root[start : start + ROWS], np.diff(pointers))
        s.data[part] *= inverse_root[s.indices[part]]
    return s


def null_space(affinity: sp.csr_matrix, *, self_loops: bool) -> tuple[np.ndarray, np.ndarray]:
    """Find the component of each node, and each node's entry of its component's null vector."""
    _, components = connected_components(affinity, directed=False)
    degree = degrees(affinity, self_loops=self_loops)
    size = np.bincount(components)
    degree[size[components] == 1] = 1  # the null vector of an isolated node is its own unit vector
    mass = np.bincount(components, weights=degree)
    return components, np.sqrt(degree / mass[components])


def null_projection(
    null: np.ndarray, components: np.ndarray, device: torch.device | str = "cpu"
) -> Operator:
    """Return the projection that takes the null vectors out of the columns of a matrix, in place."""
    count = int(components.max()) + 1
    entries = torch.from_numpy(null.astype(np.float32)).to(device)[:, None]
    of = torch.from_numpy(components.astype(np.int64)).to(device)

    def project_out(x: Tensor) -> Tensor:
        if count == 1:
            return x.addmm_(entries, entries.T @ x, alpha=-1)
        sums = torch.zeros(count, x.shape[1], device=x.device).index_add_(0, of, entries * x)
        return x.sub_(entries * sums[of])

    return project_out


def csr_operator(matrix: sp.csr_matrix, device: torch.device | str = "cpu") -> Operator:
    """Return products with a sparse matrix in torch; on the CPU its arrays are shared, not copied."""
    with warnings.catch_warnings():
        # Some versions warn once in a process, whatever check_invariants is.
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        held = torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr),
            torch.from_numpy(matrix.indices),
            torch.from_numpy(matrix.data),
            matrix.shape,
            check_invariants=False,
        ).to(device)
    return lambda x: held @ x


def reordered(matrix: sp.csr_matrix, order: np.ndarray) -> sp.csr_matrix:
    """Copy a square matrix with its rows and columns in the order `order`."""
    place = np.empty(len(order), dtype=matrix.indices.dtype)
    place[order] = np.arange(len(order), dtype=place.dtype)
    answer = matrix[order]
    answer.indices = place[answer.indices]
    answer.has_sorted_indices = False
    answer.sort_indices()
    return answer


def reordered_operator(product: Operator, order: Tensor) -> Operator:
    """Return products with a matrix, made by those with `reordered(matrix, order)`."""
    place = torch.argsort(order)
    return lambda x: product(x[order])[place]
