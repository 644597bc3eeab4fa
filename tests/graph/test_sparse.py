"""Sparse matrices against dense ones, some rows at a time."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from lib.graph import sparse


@pytest.fixture(params=[1, 7, 8192])
def matrix(request, monkeypatch) -> torch.Tensor:
    """A matrix with empty rows, worked on by one, seven or all rows."""
    monkeypatch.setattr(sparse, "ROWS", request.param)
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((40, 40)) * (rng.random((40, 40)) < 0.1)
    dense[:3] = dense[20] = dense[39] = 0
    return sparse.from_scipy(sp.csr_matrix(dense.astype(np.float32)))


def test_entries_name_the_row_of_each(matrix):
    parts = list(sparse.entries(matrix))
    rows = torch.cat([rows for _, rows in parts])
    assert torch.equal(rows, matrix.to_dense().nonzero()[:, 0])
    assert [part.start for part, _ in parts[1:]] == [part.stop for part, _ in parts[:-1]]


def test_sums_and_ordered_products_are_those_of_the_dense_matrix(matrix):
    dense, x = matrix.to_dense().double(), torch.randn(40, 5)
    torch.testing.assert_close(sparse.row_sums(matrix), dense.sum(dim=1))
    found = sparse.product_in_order(matrix, x)
    torch.testing.assert_close(found.double(), dense @ x.double(), atol=1e-6, rtol=1e-5)


def test_rows_of_a_matrix_are_a_matrix(matrix):
    part = sparse.rows_of(matrix, slice(5, 33))
    assert torch.equal(part.to_dense(), matrix.to_dense()[5:33])
    assert part.shape == (28, 40)
