"""Graph filters against the dense eigendecomposition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from conftest import blobs
from graphs import (
    alone,
    build_graph,
    filter_columns,
    graph_of,
    graph_operator,
    laplacian_spectrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.graph.filters
import lib.graph.laplacian
from lib.graph.filters import (
    FILTERS,
    LabelVectors,
    apply_filter,
    chebyshev_filter,
    filter_by_eigenvectors,
    step_coefficients,
)
from lib.graph.laplacian import conjugate_gradients
from lib.propagation.normalized_cut import propagate_filter

RESPONSE = {  # g(lambda); without a value at 0 where the null space is left out
    "pseudo-inverse": (lambda x: 1 / x, {}),
    "powers": (lambda x: (1 - x) ** 7 / x, {"power": 7}),
    "heat": (lambda x: np.exp(-4 * x), {"time": 4.0}),
    "ppr": (lambda x: 0.05 / (1 - 0.95 * (1 - x)), {"alpha": 0.95}),
}
KEEP_NULL = {"heat", "ppr"}


def random_graph(sizes, seed):
    """A weighted graph with one component per size, nodes shuffled."""
    rng = np.random.default_rng(seed)
    blocks = []
    for m in sizes:
        block = rng.uniform(0.2, 1, (m, m)) * (rng.random((m, m)) < 0.6)
        block += np.diag(np.full(m - 1, 0.5), 1)  # a chain holds it together
        blocks.append(np.triu(block, 1) + np.triu(block, 1).T)
    order = rng.permutation(sum(sizes))
    return scipy.linalg.block_diag(*blocks)[np.ix_(order, order)]


def dense_filter(affinity, respond, keep_null):
    """g(L) in float64 by eigh, the null space of L either kept or left out; no self-loops in W."""
    degree = affinity.sum(axis=1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    values, vectors = np.linalg.eigh(np.eye(len(root)) - root[:, None] * affinity * root)
    null = values < 1e-10
    gains = np.where(null, respond(np.zeros(1)) if keep_null else 0, 0.0)
    gains[~null] = respond(values[~null])
    isolated = degree == 0
    if not keep_null:  # its own unit vector is the null vector of an isolated node
        vectors = vectors * ~isolated[:, None]
    return vectors @ np.diag(gains) @ vectors.T


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(RESPONSE)),
)
def test_filters_equal_the_dense_eigendecomposition(sizes, seed, name):
    W = random_graph(sizes, seed)
    columns = torch.randn(len(W), 3, generator=torch.Generator().manual_seed(seed))
    respond, parameters = RESPONSE[name]
    operator = graph_operator(sp.csr_matrix(W.astype(np.float32)), self_loops="drop")
    answer = filter_columns(operator, columns, name, **parameters)
    expected = dense_filter(W, respond, name in KEEP_NULL) @ columns.double().numpy()
    assert operator.num_components == len(sizes)
    np.testing.assert_allclose(answer.numpy(), expected, atol=2e-3 * np.abs(expected).max() + 1e-6)


def test_smoothed_step_equals_its_polynomial_over_lambda():
    W = random_graph([30], 3)
    columns = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    operator = graph_operator(sp.csr_matrix(W.astype(np.float32)), self_loops="drop")
    answer = filter_columns(operator, columns, "smoothed-step", cutoff=0.7, degree=12)
    coefficients = step_coefficients(0.7, 12)

    def respond(x):
        return np.polynomial.chebyshev.chebval(1 - x, coefficients) / x

    expected = dense_filter(W, respond, False) @ columns.double().numpy()
    np.testing.assert_allclose(answer.numpy(), expected, atol=2e-3 * np.abs(expected).max())


@settings(max_examples=25, deadline=None)
@given(cutoff=st.floats(0.05, 1.9), degree=st.integers(20, 120))
def test_smoothed_step_passes_below_the_cutoff_stops_above_and_never_overshoots(cutoff, degree):
    angle = np.linspace(0, math.pi, 2001)
    passed = np.polynomial.chebyshev.chebval(np.cos(angle), step_coefficients(cutoff, degree))
    edge = math.acos(1 - cutoff)
    width = 2.5 * math.pi / degree
    assert passed.max() < 1.001
    assert passed.min() > -0.001
    assert (passed[angle < edge - width] > 0.97).all()
    assert (passed[angle > edge + width] < 0.03).all()
    assert passed[np.abs(angle - edge).argmin()] == pytest.approx(0.5, abs=0.1)


def test_chebyshev_recurrence_equals_the_matrix_function():
    W = random_graph([20], 1)
    S = torch.from_numpy(W / np.linalg.norm(W, 2)).float()
    columns = torch.eye(20)
    coefficients = np.array([0.3, -1.2, 0.5, 0.25])
    answer = chebyshev_filter(lambda x: S @ x, coefficients, columns)
    values, vectors = np.linalg.eigh(S.double().numpy())
    expected = vectors @ np.diag(np.polynomial.chebyshev.chebval(values, coefficients)) @ vectors.T
    np.testing.assert_allclose(answer.numpy(), expected, atol=1e-5)


def test_conjugate_gradients_solve_every_column_and_leave_a_zero_column_zero(monkeypatch):
    monkeypatch.setattr(lib.graph.laplacian, "TOLERANCE", 1e-5)
    rng = np.random.default_rng(0)
    root = rng.standard_normal((15, 15))
    A = torch.from_numpy(root @ root.T + np.eye(15)).float()
    b = torch.from_numpy(rng.standard_normal((15, 3)) * [1, 0, 1e4]).float()
    x = conjugate_gradients(lambda v: A @ v, b)
    expected = np.linalg.solve(A.double().numpy(), b.double().numpy())
    assert (x[:, 1] == 0).all()
    for column in (0, 2):
        error = np.abs(x[:, column].numpy() - expected[:, column]).max()
        assert error < 1e-3 * np.abs(expected[:, column]).max()


def test_conjugate_gradients_that_stop_too_early_say_so(monkeypatch):
    monkeypatch.setattr(lib.graph.laplacian, "MAX_ITERATIONS", 3)
    A = torch.diag(torch.logspace(0, 4, 50))
    with pytest.warns(UserWarning, match="stopped after 3 steps"):
        conjugate_gradients(lambda v: A @ v, torch.ones(50, 1))


@pytest.mark.parametrize("name", FILTERS)
def test_tiles_and_stacking_change_nothing(name, monkeypatch):
    features, _ = blobs(3, 30)
    operator = graph_operator(build_graph(features, num_neighbors=8))
    columns = torch.randn(90, 7, generator=torch.Generator().manual_seed(0))
    whole = filter_columns(operator, columns, name)
    monkeypatch.setattr(lib.graph.filters, "TILE", 3)
    everywhere = torch.arange(90)
    vectors = [
        LabelVectors(everywhere, columns[:, :2]),
        LabelVectors(everywhere.flip(0), columns[:, 2:].flip(0)),
    ]
    parts = apply_filter(operator, vectors, name)
    assert [p.shape[1] for p in parts] == [2, 5]
    scale = float(whole.abs().max())
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-3 * scale, rtol=0)


@pytest.mark.parametrize("name", FILTERS)
def test_a_product_by_rows_gives_the_same(name):
    # as when the rows of the graph lie in several processes
    features, _ = blobs(3, 30)
    operator = graph_operator(build_graph(features, num_neighbors=8))
    columns = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    widths = []

    def by_rows(x):
        widths.append(x.shape[1])
        image = operator.product(x)
        return torch.cat([image[:40], image[40:]])

    spread = replace(operator, product=by_rows)
    torch.testing.assert_close(
        filter_columns(spread, columns, name), filter_columns(operator, columns, name)
    )
    assert set(widths) == {3}


def test_columns_are_zero_where_no_label_is():
    features, _ = blobs(2, 20)
    operator = graph_operator(build_graph(features, num_neighbors=8))
    few = LabelVectors(torch.tensor([3, 17]), torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
    columns = torch.zeros(40, 2)
    columns[few.nodes] = few.values
    torch.testing.assert_close(
        apply_filter(operator, [few], "heat")[0], filter_columns(operator, columns, "heat")
    )


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_null_vectors_are_projected_out_exactly(sizes, seed):
    W = random_graph(sizes, seed)
    operator = graph_operator(sp.csr_matrix(W.astype(np.float32)), self_loops="drop")
    columns = torch.randn(len(W), 4, generator=torch.Generator().manual_seed(seed))
    within = operator.project_out(columns.clone())
    basis = torch.zeros(len(W), operator.num_components)
    basis[torch.arange(len(W)), operator.components] = operator.null
    left = basis.T @ within
    np.testing.assert_allclose(left, 0, atol=1e-5)
    again = operator.project_out(within.clone())
    torch.testing.assert_close(again, within, atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_smallest_positive_eigenvalue_equals_the_dense_one(sizes, seed):
    W = random_graph(sizes, seed)
    operator = graph_operator(sp.csr_matrix(W.astype(np.float32)), self_loops="drop")
    degree = W.sum(axis=1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    values = np.linalg.eigvalsh(np.diag(degree > 0) - root[:, None] * W * root)
    expected = min(values[values > 1e-8], default=2.0)
    assert operator.smallest_eigenvalue == pytest.approx(expected, rel=0.1)
    assert operator.smallest_eigenvalue > expected * (1 - 1e-4)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("wavelet", {}, "unknown filter 'wavelet': take one of pseudo-inverse"),
        ("powers", {"power": -1}, "must not be negative"),
        ("smoothed-step", {"cutoff": 0.0}, "0 < cut-off < 2"),
        ("smoothed-step", {"degree": 0}, "degree >= 1"),
        ("heat", {"time": math.nan}, "must be positive"),
        ("ppr", {"alpha": 1.0}, "between 0 and 1"),
        ("heat", {"cutoff": 0.3}, "the filter heat has no parameter cutoff"),
    ],
)
def test_impossible_filters_say_why(name, parameters, words):
    features, _ = blobs(2, 10)
    operator = graph_operator(build_graph(features, num_neighbors=5))
    with pytest.raises(ValueError, match=words):
        filter_columns(operator, torch.ones(20, 1), name, **parameters)


def test_unknown_self_loops_are_refused():
    with pytest.raises(ValueError, match="unknown self-loops"):
        graph_operator(sp.csr_matrix(np.eye(3, dtype=np.float32)), self_loops="some")


@pytest.mark.parametrize("name", FILTERS)
def test_all_eigenvectors_give_what_products_give_and_nothing_is_left_out(name):
    W = random_graph([30, 8, 1], 2)
    matrix = sp.csr_matrix(W.astype(np.float32))
    vectors = [
        LabelVectors(torch.tensor([3, 30, 38]), torch.randn(3, 4)),
        LabelVectors(torch.tensor([5]), torch.ones(1, 1)),
    ]
    operator = graph_operator(matrix, self_loops="drop")
    with pytest.warns(UserWarning, match="3 components"):
        spectrum = laplacian_spectrum(matrix, 38, self_loops="drop")
    exact, bound = filter_by_eigenvectors(spectrum, vectors, name)
    assert bound < 1e-2
    for one, two in zip(exact, apply_filter(operator, vectors, name), strict=True):
        torch.testing.assert_close(one, two, atol=3e-3 * float(two.abs().max()), rtol=0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(FILTERS)), k=st.integers(1, 25))
def test_what_few_eigenvectors_leave_out_is_within_the_bound(seed, name, k):
    matrix = sp.csr_matrix(random_graph([30], seed).astype(np.float32))
    vectors = [LabelVectors(torch.tensor([3, 17]), torch.randn(2, 2))]
    spectrum = laplacian_spectrum(matrix, k, self_loops="drop")
    part, bound = filter_by_eigenvectors(spectrum, vectors, name)
    whole = apply_filter(graph_operator(matrix, self_loops="drop"), vectors, name)[0]
    left_out = ((whole - part[0]).norm(dim=0) / part[0].norm(dim=0)).max()
    assert float(left_out) <= bound + 5e-3


@pytest.mark.parametrize("weight", [1e-8, 1e-10])
@pytest.mark.parametrize("name", [name for name in FILTERS if not FILTERS[name].keeps_null])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_components_that_nearly_fall_apart_give_finite_scores(name, weight):
    clique = np.ones((6, 6)) - np.eye(6)
    affinity = scipy.linalg.block_diag(clique, clique, clique)
    affinity[0, 6] = affinity[6, 0] = weight
    graph = graph_of(affinity, self_loops="published")
    labeled, labels = torch.tensor([0, 6, 12]), torch.arange(3)
    scores = alone(propagate_filter, graph, labeled, labels, 3, filter=name)
    assert torch.isfinite(scores).all()
    assert graph.operator.smallest_eigenvalue > 0
    assert scores[12:].argmax(dim=1).tolist() == [2] * 6  # the component that is apart
