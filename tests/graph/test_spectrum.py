"""Spectra against dense eigenvalues, loops and closed forms."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.sparse as sp
import torch
from conftest import blobs
from graphs import build_graph, graph_operator
from graphs import laplacian_spectrum as spectrum_of
from scipy.sparse.linalg import ArpackError
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lib.graph.spectrum
from lib.graph import eigensolver
from lib.graph.eigensolver import largest_eigenvectors
from lib.graph.laplacian import (
    csr_operator,
    degrees,
    normalized_affinity,
    null_space,
    reordered_operator,
)
from lib.graph.sparse import from_scipy, rows_of, to_scipy


@pytest.fixture(params=["dense", "arpack", "block"])
def solver(request, monkeypatch):
    """All ways to the eigenvectors, whatever the size of the graph."""
    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 10**6 if request.param == "dense" else 0)
    monkeypatch.setattr(lib.graph.spectrum, "BLOCK_FROM", 0 if request.param == "block" else 10**6)
    return request.param


def laplacian_spectrum(affinity, *words, **more):
    """The spectrum with arrays of numpy, to compare with."""
    found = spectrum_of(affinity, *words, **more)
    names = ("vectors", "components", "null", "degrees")
    return replace(found, **{name: getattr(found, name).numpy() for name in names})


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
        S = to_scipy(normalized_affinity(from_scipy(W), self_loops=self_loops)).toarray()
        np.testing.assert_allclose(S, np.eye(36) - dense_laplacian(W, self_loops), atol=1e-6)


def test_degrees_count_self_loops_only_where_asked():
    W = graph_of((0, 0), (0, 1), (1, 2), n=3)
    assert degrees(from_scipy(W), self_loops=True).tolist() == [2, 2, 1]
    assert degrees(from_scipy(W), self_loops=False).tolist() == [1, 2, 1]


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
    assert len(spectrum.values) >= (12 if solver == "arpack" else 18)
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

    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 0)
    monkeypatch.setattr(lib.graph.spectrum, "eigsh", forgetful)
    with pytest.warns(UserWarning, match="10 components"):
        spectrum = laplacian_spectrum(cliques(*[2] * 10, self_loops=False), 8)
    np.testing.assert_allclose(spectrum.values, [2] * 7, atol=1e-5)
    assert spectrum.vectors.shape == (20, 7)


def test_failure_of_the_solver_is_an_error_that_says_what_to_do(monkeypatch):
    def failing(*_, **__):
        raise ArpackError(3)

    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 0)
    monkeypatch.setattr(lib.graph.spectrum, "eigsh", failing)
    with pytest.raises(ValueError, match="take more neighbors per image"):
        laplacian_spectrum(cliques(20), 5)


def test_more_vectors_than_there_are_are_cut_down():
    features, _ = blobs(2, 10)
    spectrum = laplacian_spectrum(build_graph(features))
    assert spectrum.vectors.shape == (20, 19)
    assert (np.diff(spectrum.values) >= 0).all()


@pytest.mark.parametrize("kind", ["blobs", "constant"])
def test_the_same_graph_gives_the_same_bytes(kind, monkeypatch):
    # on constant features Lanczos runs into an invariant space and restarts at random
    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 0)
    features, _ = blobs(3, 50)
    if kind == "constant":
        features = features[:1].repeat(150, 1)
    W = build_graph(features)
    one, two = (laplacian_spectrum(W, 40) for _ in range(2))
    assert np.array_equal(one.vectors, two.vectors)
    assert np.array_equal(one.values, two.values)


def test_memory_stays_far_below_a_dense_matrix():
    features, _ = blobs(5, 400)
    W = build_graph(features)
    largest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for one in pytree.tree_leaves(made):
                if isinstance(one, torch.Tensor) and one.layout == torch.strided:
                    largest = max(largest, one.untyped_storage().nbytes())
            return made

    tracemalloc.start()  # which sees numpy's arrays
    with Watched():
        laplacian_spectrum(W, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < max(peak, largest) < 2000 * 2000 * 4 / 2


def test_unknown_choice_of_self_loops_says_what_there_is():
    with pytest.raises(ValueError, match="take one of published, keep, drop"):
        laplacian_spectrum(sp.csr_matrix(torch.eye(3).numpy()), self_loops="both")


def test_weak_edges_beside_a_strong_self_loop_are_not_lost():
    W = sp.csr_matrix(np.array([[1, 1e-20], [1e-20, 1]], np.float32))
    np.testing.assert_allclose(degrees(from_scipy(W), self_loops=False), 1e-20, rtol=1e-6)
    spectrum = laplacian_spectrum(W, 1)
    np.testing.assert_allclose(spectrum.null, 0.5**0.5)
    np.testing.assert_allclose(spectrum.values, 2, rtol=1e-6)


@pytest.fixture(scope="module")
def overlapping():
    """A graph of 600 images that needs the filter, its exact values and vectors, falling."""
    W = build_graph(blobs(8, 75, dim=24, spread=0.5)[0], num_neighbors=15)
    S = np.eye(600) - dense_laplacian(W, self_loops=False)
    values, vectors = np.linalg.eigh(S)
    return W, 1 - values[::-1][1:], vectors[:, ::-1][:, 1:]


def test_block_solver_reaches_the_exact_eigenvalues_of_a_large_graph(overlapping):
    W, values, _ = overlapping
    spectrum = laplacian_spectrum(W, 40, solver="block")
    np.testing.assert_allclose(spectrum.values, values[:40], rtol=1e-3)
    V = spectrum.vectors
    np.testing.assert_allclose(V.T @ V, np.eye(40), atol=1e-5)
    np.testing.assert_allclose(spectrum.null @ V, 0, atol=1e-5)


@pytest.mark.parametrize("solver", ["block", "arpack"])
def test_residual_is_that_of_the_vectors(overlapping, solver):
    W, _, _ = overlapping
    spectrum = laplacian_spectrum(W, 40, solver=solver)
    error = dense_laplacian(W, False) @ spectrum.vectors - spectrum.vectors * spectrum.values
    assert spectrum.residual == pytest.approx(np.linalg.norm(error, axis=0).max(), rel=0.05)
    assert spectrum.residual < 0.02


def test_smaller_tolerance_of_the_block_solver_gives_a_smaller_residual(overlapping, monkeypatch):
    W, values, vectors = overlapping
    found = []
    for tolerance in (0.1, 1e-4):
        monkeypatch.setattr(eigensolver, "TOLERANCE", tolerance)
        found.append(laplacian_spectrum(W, 40, solver="block"))
    coarse, fine = found
    assert fine.residual < coarse.residual / 10
    np.testing.assert_allclose(fine.values, values[:40], rtol=1e-5)
    m = 20 + int(np.argmax(np.diff(values[19:40])))
    own, true = fine.vectors[:, :m], vectors[:, :m]
    np.testing.assert_allclose(own @ own.T, true @ true.T, atol=1e-3)


def test_basis_within_its_bound_restarts_and_arrives_at_the_same_eigenvalues(
    overlapping, monkeypatch
):
    W, values, _ = overlapping
    sizes, krylov = [], eigensolver._Krylov

    class Watched(krylov):
        def rotate(self, coordinates):
            sizes.append(coordinates.shape)
            super().rotate(coordinates)

    monkeypatch.setattr(eigensolver, "_Krylov", Watched)
    monkeypatch.setattr(eigensolver, "BLOCK", 8)
    monkeypatch.setattr(eigensolver, "TOLERANCE", 1e-3)
    spectrum = laplacian_spectrum(W, 40, solver="block", basis_bytes=1)
    np.testing.assert_allclose(spectrum.values, values[:40], rtol=1e-3)
    assert len(sizes) >= 2  # a restart, and the end
    assert max(rows for rows, _ in sizes) <= 40 + 3 * 8
    assert sizes[-1][1] == 40


def test_block_solver_finds_all_copies_of_an_eigenvalue_that_repeats_more_often_than_a_block_is_wide():
    with pytest.warns(UserWarning, match="25 components"):
        spectrum = laplacian_spectrum(cliques(*[20] * 20, *[30] * 5), 100, solver="block")
    # eigenvalue m / (m - 1), m - 1 times for each clique: 145 copies of 30/29 come first
    np.testing.assert_allclose(spectrum.values, 30 / 29, atol=1e-4)
    assert spectrum.vectors.shape == (550, 100)
    np.testing.assert_allclose(np.abs(spectrum.vectors[:400]).max(), 0, atol=1e-3)


def flat_spectrum_agreement() -> float:
    """Share of 2000 labels that the block solver leaves as exact eigenvectors give them.

    300 near-equal eigenvalues, 1e-6 apart, lie on both sides of the 75th, and the others far below. The exact
    eigenvectors are cosines.
    """
    n, k = 2000, 75
    rng = torch.Generator().manual_seed(0)
    values = torch.cat(
        [0.73 - 0.0003 * torch.linspace(0, 1, 300), 0.6 * torch.rand(n - 300, generator=rng) - 0.3]
    )

    def product(x):
        weighted = values[:, None].numpy() * scipy.fft.dct(x.numpy(), norm="ortho", axis=0)
        return torch.from_numpy(scipy.fft.idct(weighted, norm="ortho", axis=0))

    start = torch.randn(n, 32, generator=rng)
    found, vectors, _ = largest_eigenvectors(product, lambda x: x, start, k, rank=n)
    constraints = torch.randn(n, 10, generator=rng).double()
    basis = torch.from_numpy(scipy.fft.idct(np.eye(n, k), norm="ortho", axis=0))
    exact = (basis / (1 - values[:k].double())) @ (basis.T @ constraints)
    ours = (vectors.double() / (1 - found)) @ (vectors.double().T @ constraints)
    return float((ours.argmax(dim=1) == exact.argmax(dim=1)).double().mean())


def test_labels_of_a_flat_spectrum_are_those_of_the_exact_eigenvectors(monkeypatch):
    assert flat_spectrum_agreement() > 0.995
    monkeypatch.setattr(eigensolver, "MIXING", 1.0)  # residuals alone
    assert flat_spectrum_agreement() < 0.8


def test_vectors_that_cannot_be_told_apart_in_time_are_reported(monkeypatch):
    monkeypatch.setattr(eigensolver, "RESTARTS", 1)
    with pytest.warns(UserWarning, match="not told from those beyond the last one .mixing 0"):
        flat_spectrum_agreement()


def test_mixing_is_a_bound_by_residuals_and_gaps():
    values, norms = np.array([3.0, 2.0, 1.5, 1.0]), np.array([0.2, 0.3])
    expected = np.sqrt(((0.2 / 1.5) ** 2 + (0.3 / 0.5) ** 2) / 2)
    assert eigensolver._mixing(values, norms) == pytest.approx(expected)
    assert eigensolver._mixing(values[:2], norms) == pytest.approx(np.sqrt((0.05**2 + 0.1**2) / 2))
    assert eigensolver._mixing(np.array([1.0, 1.0]), np.array([0.5])) == 1


def test_block_solver_takes_any_product_in_place_of_the_matrix():
    W = build_graph(blobs(5, 100)[0], num_neighbors=12)
    S = normalized_affinity(from_scipy(W), self_loops=False)
    # as two processes would hold them
    halves = [csr_operator(rows_of(S, rows)) for rows in (slice(250), slice(250, 500))]
    start = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    values, vectors, residual = largest_eigenvectors(
        lambda x: torch.cat([half(x) for half in halves]),
        graph_operator(W, self_loops="drop").project_out,
        start,
        20,
        rank=499,
    )
    expected = np.linalg.eigvalsh(to_scipy(S).toarray().astype(np.float64))[::-1][1:21]
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert vectors.shape == (500, 20)
    assert residual < 0.02


def test_null_projection_takes_the_null_vectors_out():
    W = cliques(5, 7, 9)
    components, null = null_space(from_scipy(W), self_loops=True)
    x = np.random.default_rng(0).standard_normal((21, 4)).astype(np.float32)
    basis = np.zeros((21, 3))
    basis[np.arange(21), components] = null
    result = graph_operator(W, self_loops="keep").project_out(torch.from_numpy(x.copy()))
    np.testing.assert_allclose(result, x - basis @ (basis.T @ x), atol=1e-5)


def test_large_graphs_take_the_block_solver_and_small_ones_arpack(monkeypatch):
    W = build_graph(blobs(5, 100)[0])
    called, by_blocks = [], lib.graph.spectrum._by_blocks
    monkeypatch.setattr(
        lib.graph.spectrum, "_by_blocks", lambda *a: called.append(len(a[0])) or by_blocks(*a)
    )
    laplacian_spectrum(W, 5)
    assert called == []
    monkeypatch.setattr(lib.graph.spectrum, "BLOCK_FROM", 500)
    laplacian_spectrum(W, 5)
    assert called == [500]


def test_affinity_is_left_as_it_was():
    for loops in (True, False):
        W = cliques(20, self_loops=loops)
        before = W.copy()
        for self_loops in (True, False):
            normalized_affinity(from_scipy(W), self_loops=self_loops)
            degrees(from_scipy(W), self_loops=self_loops)
        laplacian_spectrum(W, 5)
        assert (before != W).nnz == 0
        assert W.nnz == before.nnz


def test_unknown_solver_says_what_there_is():
    with pytest.raises(ValueError, match="take one of auto, arpack, block"):
        laplacian_spectrum(cliques(5), solver="lobpcg")


def test_few_eigenvectors_of_many_close_eigenvalues_are_found():
    # the share of 5 in 3000 is below the resolution of the density, and the gaps are 1e-5
    n = 3000
    offsets = np.r_[np.arange(-20, 0), np.arange(1, 21)]
    rows = np.repeat(np.arange(n), 40)
    columns = (rows + np.tile(offsets, n)) % n
    W = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)))
    angles = 2 * np.pi * np.arange(n) / n
    exact = 1 - np.cos(angles[:, None] * np.arange(1, 21)).mean(axis=1)
    spectrum = laplacian_spectrum(W, 5, solver="block")
    np.testing.assert_allclose(spectrum.values, np.sort(exact)[1:6], atol=3e-6)


def test_products_in_another_order_are_the_same_products():
    matrix = sp.random(60, 60, 0.2, format="csr", dtype=np.float32, random_state=0)
    before = matrix.copy()
    order = torch.randperm(60)
    made = []

    def make(turned):
        made.append(to_scipy(turned))
        return csr_operator(turned)

    product = reordered_operator(from_scipy(matrix), order, make)
    (turned,) = made
    naive = matrix.toarray()[order.numpy()][:, order.numpy()]
    np.testing.assert_array_equal(turned.toarray(), naive)
    assert turned.has_sorted_indices
    assert (turned.indices.dtype, abs(matrix - before).nnz) == (matrix.indices.dtype, 0)
    x = torch.randn(60, 3)
    torch.testing.assert_close(product(x), torch.from_numpy(matrix @ x.numpy()))


def test_eigenvectors_that_are_not_accurate_are_announced(monkeypatch):
    monkeypatch.setattr(eigensolver, "RESTARTS", 0)
    graph = build_graph(blobs(5, 200, spread=2.0)[0], "cifar", num_neighbors=5)
    told = pytest.warns(UserWarning, match="not told from those")
    with told, pytest.warns(UserWarning, match="known to a residual of"):
        found = laplacian_spectrum(graph, 60, solver="block", basis_bytes=1)
    assert found.residual > lib.graph.spectrum.LARGE_RESIDUAL
