"""Spectra against dense eigenvalues, loops and closed forms."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from conftest import blobs
from scipy.sparse.linalg import ArpackError

import lib.spectral
from lib.graph import build_graph
from lib.spectral import degrees, laplacian_spectrum, normalized_affinity, project


@pytest.fixture(params=["dense", "sparse"])
def solver(request, monkeypatch):
    """Both ways to the eigenvectors, whatever the size of the graph."""
    monkeypatch.setattr(lib.spectral, "DENSE_BELOW", 10**6 if request.param == "dense" else 0)
    return request.param


def graph_of(*edges, n):
    """Unit weights; edges (i, j), and (i, i) for a self-loop."""
    W = np.zeros((n, n), np.float32)
    for i, j in edges:
        W[i, j] = W[j, i] = 1
    return sp.csr_matrix(W)


def cliques(*sizes, self_loops=True):
    blocks = [np.ones((m, m), np.float32) - (not self_loops) * np.eye(m) for m in sizes]
    return sp.csr_matrix(scipy.linalg.block_diag(*blocks).astype(np.float32))


def dense_laplacian(affinity, self_loops):
    """I - D^-1/2 W D^-1/2 by loops in float64, for a graph without isolated nodes."""
    W = affinity.toarray().astype(np.float64)
    n = len(W)
    degree = [sum(W[i, j] for j in range(n) if self_loops or i != j) for i in range(n)]
    L = np.eye(n)
    for i in range(n):
        for j in range(n):
            if self_loops or i != j:
                L[i, j] -= W[i, j] / np.sqrt(degree[i] * degree[j])
    return L


@pytest.mark.parametrize("self_loops", ["published", "keep", "drop"])
def test_spectrum_equals_dense_eigh(solver, self_loops):
    features, _ = blobs(5, 24, spread=0.3)
    W = build_graph(features, "cifar", num_neighbors=12)
    spectrum = laplacian_spectrum(W, 40, self_loops=self_loops)
    values, vectors = np.linalg.eigh(dense_laplacian(W, self_loops == "keep"))
    assert spectrum.num_components == 1
    assert values[1] > 1e-3
    np.testing.assert_allclose(spectrum.values, values[1:41], atol=2e-5)
    # vectors are defined up to sign, and up to a rotation among near-equal eigenvalues: the
    # projection on the first m of them is compared, m where the gap is widest
    m = 20 + int(np.argmax(np.diff(values[21:40])))
    own, true = spectrum.vectors[:, :m], vectors[:, 1 : m + 1]
    np.testing.assert_allclose(own @ own.T, true @ true.T, atol=5e-3)
    np.testing.assert_allclose(np.abs(spectrum.null), np.abs(vectors[:, 0]), atol=1e-5)


def test_vectors_are_orthonormal_and_orthogonal_to_the_null_space(solver):
    features, _ = blobs(5, 24)
    spectrum = laplacian_spectrum(build_graph(features, "local-scale", num_neighbors=10), 30)
    V = spectrum.vectors
    np.testing.assert_allclose(V.T @ V, np.eye(30), atol=1e-5)
    np.testing.assert_allclose(spectrum.null @ V, 0, atol=1e-5)


def test_cycle_has_its_closed_form_eigenvalues(solver):
    n = 30
    W = graph_of(*[(i, (i + 1) % n) for i in range(n)], n=n)
    expected = np.sort(1 - np.cos(2 * np.pi * np.arange(n) / n))[1:13]
    spectrum = laplacian_spectrum(W, 12)
    np.testing.assert_allclose(spectrum.values, expected, atol=1e-5)
    np.testing.assert_allclose(spectrum.null, 1 / np.sqrt(n))


def test_star_has_its_closed_form_eigenvalues():
    spectrum = laplacian_spectrum(graph_of(*[(0, i) for i in range(1, 8)], n=8), 7)
    np.testing.assert_allclose(spectrum.values, [1, 1, 1, 1, 1, 1, 2], atol=1e-6)


def test_normalized_affinity_equals_the_naive_loops():
    features, _ = blobs(3, 12)
    W = build_graph(features, "cifar", num_neighbors=6)
    for self_loops in (True, False):
        S = normalized_affinity(W, self_loops=self_loops).toarray()
        np.testing.assert_allclose(S, np.eye(36) - dense_laplacian(W, self_loops), atol=1e-6)


def test_degrees_count_self_loops_only_where_asked():
    W = graph_of((0, 0), (0, 1), (1, 2), n=3)
    assert degrees(W, self_loops=True).tolist() == [2, 2, 1]
    assert degrees(W, self_loops=False).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("self_loops", "laplacian", "constraints"),
    [
        ("published", [1, 2, 1], [2, 2, 1]),
        ("keep", [2, 2, 1], [2, 2, 1]),
        ("drop", [1, 2, 1], [1, 2, 1]),
    ],
)
def test_self_loops_are_in_laplacian_and_degrees_as_named(self_loops, laplacian, constraints):
    W = graph_of((0, 0), (0, 1), (1, 2), n=3)
    spectrum = laplacian_spectrum(W, 2, self_loops=self_loops)
    assert spectrum.degrees.tolist() == constraints
    np.testing.assert_allclose(spectrum.null**2, np.array(laplacian) / sum(laplacian))
    expected = np.linalg.eigvalsh(dense_laplacian(W, self_loops == "keep"))
    np.testing.assert_allclose(spectrum.values, expected[1:], atol=1e-6)


def test_disconnected_graph_has_one_null_vector_per_component_and_warns(solver):
    with pytest.warns(UserWarning, match=r"3 components \(the largest holds 9 of 21"):
        spectrum = laplacian_spectrum(cliques(5, 7, 9), 18)
    assert spectrum.num_components == 3
    # a clique of m nodes has eigenvalue m / (m - 1), m - 1 times, and 0 once: no 0 is left
    expected = [m / (m - 1) for m in (9, 7, 5) for _ in range(m - 1)]
    np.testing.assert_allclose(spectrum.values, expected[: len(spectrum.values)], atol=1e-5)
    assert len(spectrum.values) >= (18 if solver == "dense" else 12)
    for m in (5, 7, 9):
        own = spectrum.null[spectrum.components == spectrum.components[{5: 0, 7: 5, 9: 12}[m]]]
        np.testing.assert_allclose(own, np.full(m, m**-0.5), rtol=1e-6)


@pytest.mark.parametrize("self_loops", ["published", "keep", "drop"])
def test_no_eigenvalue_of_a_disconnected_graph_is_close_to_zero(solver, self_loops):
    # `eigenvalues[1:]` of the published code left c - 1 zeros to divide by
    features, targets = blobs(6, 10, spread=0.02)
    with pytest.warns(UserWarning, match="6 components"):
        spectrum = laplacian_spectrum(
            build_graph(features, num_neighbors=9), 20, self_loops=self_loops
        )
    assert spectrum.values.min() > 0.1
    for label in range(6):
        assert len(set(spectrum.components[targets.numpy() == label])) == 1


@pytest.mark.parametrize("self_loops", ["published", "keep", "drop"])
@pytest.mark.parametrize("loop", [False, True])
def test_isolated_nodes_are_their_own_null_vectors(solver, self_loops, loop):
    W = graph_of((0, 1), (1, 2), (0, 2), *([(3, 3), (4, 4)] if loop else []), n=5)
    with pytest.warns(UserWarning, match="3 components"):
        spectrum = laplacian_spectrum(W, 199, self_loops=self_loops)
    np.testing.assert_allclose(spectrum.values, 1.5, atol=1e-6)
    assert spectrum.null[3:].tolist() == [1, 1]
    np.testing.assert_allclose(spectrum.vectors[3:], 0, atol=1e-6)
    assert np.isfinite(spectrum.vectors).all()


def test_graph_without_any_edge_has_no_vectors():
    with pytest.warns(UserWarning, match="4 components"):
        spectrum = laplacian_spectrum(sp.csr_matrix((4, 4), dtype=np.float32))
    assert spectrum.vectors.shape == (4, 0)
    assert spectrum.values.shape == (0,)


def test_repeated_eigenvalues_never_bring_the_null_space_back(monkeypatch):
    # Lanczos need not find all copies of a value that repeats often, and then fills up with the
    # null vectors, which were moved below it
    def forgetful(operator, k, **_):
        values, vectors = np.linalg.eigh(operator @ np.eye(operator.shape[0]))
        chosen = [0, *range(len(values) - k + 1, len(values))]
        return values[chosen], vectors[:, chosen]

    monkeypatch.setattr(lib.spectral, "DENSE_BELOW", 0)
    monkeypatch.setattr(lib.spectral, "eigsh", forgetful)
    with pytest.warns(UserWarning, match="10 components"):
        spectrum = laplacian_spectrum(cliques(*[2] * 10, self_loops=False), 8)
    np.testing.assert_allclose(spectrum.values, [2] * 7, atol=1e-5)
    assert spectrum.vectors.shape == (20, 7)


def test_failure_of_the_solver_is_an_error_that_says_what_to_do(monkeypatch):
    def failing(*_, **__):
        raise ArpackError(3)

    monkeypatch.setattr(lib.spectral, "DENSE_BELOW", 0)
    monkeypatch.setattr(lib.spectral, "eigsh", failing)
    with pytest.raises(ValueError, match="take more neighbours per image"):
        laplacian_spectrum(cliques(20), 5)


def test_more_vectors_than_there_are_are_cut_down():
    features, _ = blobs(2, 10)
    spectrum = laplacian_spectrum(build_graph(features))
    assert spectrum.vectors.shape == (20, 19)
    assert (np.diff(spectrum.values) >= 0).all()


@pytest.mark.parametrize("kind", ["blobs", "constant"])
def test_same_seed_gives_the_same_bytes(kind, monkeypatch):
    # on constant features Lanczos runs into an invariant space and restarts at random
    monkeypatch.setattr(lib.spectral, "DENSE_BELOW", 0)
    features, _ = blobs(3, 50)
    if kind == "constant":
        features = features[:1].repeat(150, 1)
    W = build_graph(features)
    one, two = (laplacian_spectrum(W, 40, seed=7) for _ in range(2))
    assert np.array_equal(one.vectors, two.vectors)
    assert np.array_equal(one.values, two.values)
    assert not np.array_equal(one.vectors, laplacian_spectrum(W, 40, seed=8).vectors)


def test_memory_stays_far_below_a_dense_matrix():
    features, _ = blobs(5, 400)
    W = build_graph(features)
    tracemalloc.start()
    laplacian_spectrum(W, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 2000 * 4 / 2


def test_project_equals_the_dense_product():
    rng = np.random.default_rng(0)
    components, null, columns = np.array([0, 1, 0, 2, 1]), rng.random(5), rng.random((5, 3))
    basis = np.zeros((5, 3))
    basis[np.arange(5), components] = null
    np.testing.assert_allclose(project(null, components, columns), basis.T @ columns)


def test_unknown_choice_of_self_loops_says_what_there_is():
    with pytest.raises(ValueError, match="take one of published, keep, drop"):
        laplacian_spectrum(sp.csr_matrix(torch.eye(3).numpy()), self_loops="both")


def test_weak_edges_beside_a_strong_self_loop_are_not_lost():
    W = sp.csr_matrix(np.array([[1, 1e-20], [1e-20, 1]], np.float32))
    np.testing.assert_allclose(degrees(W, self_loops=False), 1e-20, rtol=1e-6)
    spectrum = laplacian_spectrum(W, 1)
    np.testing.assert_allclose(spectrum.null, 0.5**0.5)
    np.testing.assert_allclose(spectrum.values, 2, rtol=1e-6)
