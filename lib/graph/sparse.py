"""Sparse matrices: torch's CSR format, on the device of the work; scipy's view of them on a CPU."""

import warnings
from collections.abc import Callable, Iterator

import scipy.sparse as sp
import torch
from torch import Tensor

ROWS = 8192  # rows of a matrix worked on at a time


def csr(crow: Tensor, col: Tensor, values: Tensor, num_columns: int) -> Tensor:
    """Make a CSR matrix of its three arrays, which it shares; they are not checked."""
    with warnings.catch_warnings():
        # Some versions warn once in a process, whatever check_invariants is.
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        shape = len(crow) - 1, num_columns
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def arrays(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `csr` takes: where rows start, the columns and the values of the entries."""
    return matrix.crow_indices(), matrix.col_indices(), matrix.values()


def from_scipy(matrix: sp.csr_matrix) -> Tensor:
    """Return the same matrix for torch; the arrays are shared."""
    shared = (torch.from_numpy(x) for x in (matrix.indptr, matrix.indices, matrix.data))
    return csr(*shared, matrix.shape[1])


def to_scipy(matrix: Tensor) -> sp.csr_matrix:
    """Return the same matrix for scipy; the arrays of a matrix on the CPU are shared."""
    crow, col, values = (x.cpu().numpy() for x in arrays(matrix))
    return sp.csr_matrix((values, col, crow), tuple(matrix.shape))


def rows_of(matrix: Tensor, rows: slice) -> Tensor:
    """Return some rows, whose values and columns are shared."""
    crow, col, values = arrays(matrix)
    crow = crow[rows.start : rows.stop + 1]
    part = slice(int(crow[0]), int(crow[-1]))
    return csr(crow - crow[0], col[part], values[part], matrix.shape[1])


def blocks(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield some rows at a time, and where their entries lie."""
    crow = matrix.crow_indices()
    starts = range(0, len(crow) - 1, ROWS)
    bounds = [*crow[:-1:ROWS].tolist(), int(crow[-1])]
    for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
        yield slice(start, min(start + ROWS, len(crow) - 1)), slice(first, last)


def entries(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some entries at a time, and the row of each: those of all would take more than the matrix."""
    crow = matrix.crow_indices()
    for rows, part in blocks(matrix):
        counts = crow[rows.start : rows.stop + 1].diff()
        numbers = torch.arange(rows.start, rows.stop, device=crow.device)
        yield part, numbers.repeat_interleave(counts, output_size=part.stop - part.start)


def _summed(matrix: Tensor, terms: Callable[[slice], Tensor]) -> Tensor:
    """Add up the terms of each row from left to right; `terms` gives one for each of some entries."""
    crow, sums = matrix.crow_indices(), []
    for rows, part in blocks(matrix):
        own = crow[rows.start : rows.stop + 1]
        options = {"offsets": own - own[0], "initial": 0.0}
        sums.append(torch.segment_reduce(terms(part), "sum", **options))
    return torch.cat(sums)


def product_in_order(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the matrix by N x m columns, always in the same order.

    CUDA's own product adds in an order that changes from call to call, whatever is asked of it.
    """
    _, col, values = arrays(matrix)
    return _summed(matrix, lambda part: values[part, None] * x[col[part]])


def row_sums(matrix: Tensor) -> Tensor:
    """Sum each row in float64, always in the same order."""
    values = matrix.values()
    return _summed(matrix, lambda part: values[part].double())
