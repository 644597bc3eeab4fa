"""The constrained normalized cut against a literal dense version of the published formulas."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from conftest import blobs
from graphs import build_graph, laplacian_spectrum, normalized_cut
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.graph.spectrum
from lib.graph.affinity import PRESETS
from lib.labels.confidence import from_scores
from lib.labels.split import labeled_split
from lib.propagation.normalized_cut import between_components, constraint_vectors

K = {"cifar": 12, "local-scale": 10, "imagenet": 30}


def literal_affinity(features, preset, k):
    """PUBLISHED.md, the table of graphs: dense, float64."""
    points = features.double().numpy()
    n = len(points)
    d = (1 - np.clip(points @ points.T, -1, 1)) / 2
    np.fill_diagonal(d, 0)
    order = np.argsort(d, axis=1, kind="stable")
    W = np.zeros((n, n))
    for i in range(n):
        others = order[i][order[i] != i]
        if preset == "cifar":
            for j in [i, *others[: k - 1]]:
                W[i, j] = np.exp(-2 * d[i, j] / 0.2)
        elif preset == "local-scale":
            for j in others[:k]:
                W[i, j] = np.exp(-2 * d[i, j] / d[i, others[k - 1]])
        else:
            for j in others[:k]:
                W[i, j] = np.exp(-d[i, j] / d[i, others[min(5000, n - 1) - 1]])
    return np.maximum(W, W.T) if preset == "local-scale" else (W + W.T) / 2


def literal_scores(affinity, labeled, labels, num_classes, num_eigenvectors):
    """PUBLISHED.md, section 1, phase 2: the Laplacian without self-loops, the degrees with them."""
    W = affinity
    n = len(W)
    d = W.sum(axis=1)
    A = W - np.diag(np.diag(W))
    root = np.sqrt(A.sum(axis=1))
    L = np.eye(n) - A / root[:, None] / root[None, :]
    eigenvalues, V = scipy.linalg.eigh(L)
    eigenvalues, V = eigenvalues[1:num_eigenvectors], V[:, 1:num_eigenvectors]
    columns = []
    for label in range(num_classes):
        u = np.zeros(n)
        u[labeled] = -1
        u[labeled[labels == label]] = 1
        p = d * (np.abs(u) + u) / 2
        q = d * (np.abs(u) - u) / 2
        r = p.sum() / q.sum()
        s = np.sqrt(p / r) - np.sqrt(q * r)
        s = s / np.linalg.norm(s)
        z = V @ np.diag(1 / eigenvalues) @ V.T @ s
        columns.append(z / np.linalg.norm(z) * np.sqrt(n))
    Z = np.stack(columns, axis=1)
    return Z - Z.max(axis=1, keepdims=True)


def assert_same_scores(scores, expected, atol):
    np.testing.assert_allclose(scores.numpy(), expected, atol=atol)
    runner_up = np.sort(expected, axis=1)[:, -2]
    clear = runner_up < -2 * atol
    assert clear.mean() > 0.9
    assert (scores.argmax(dim=1).numpy() == expected.argmax(axis=1))[clear].all()


@pytest.mark.parametrize("solver", ["dense", "sparse"])
@pytest.mark.parametrize("preset", PRESETS)
def test_scores_equal_a_literal_implementation(preset, solver, monkeypatch):
    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 10**6 if solver == "dense" else 0)
    features, targets = blobs(5, 40, spread=0.35)
    labeled = labeled_split(targets, 20, 5).labeled
    num_eigenvectors = 60
    W = build_graph(features, preset, num_neighbors=K[preset])
    spectrum = laplacian_spectrum(W, num_eigenvectors - 1)
    assert spectrum.num_components == 1

    scores = normalized_cut(spectrum, labeled, targets[labeled], 5)

    expected = literal_scores(
        literal_affinity(features, preset, K[preset]),
        labeled.numpy(),
        targets[labeled].numpy(),
        5,
        num_eigenvectors,
    )
    assert_same_scores(scores, expected, atol=5e-3 if solver == "dense" else 2e-2)
    assert (expected.argmax(axis=1) == targets.numpy()).mean() > 0.6  # the task is no toss-up


def test_keeping_the_self_loops_is_another_result_than_published():
    features, targets = blobs(5, 40, spread=0.35)
    labeled = labeled_split(targets, 20, 5).labeled
    W = build_graph(features, "cifar", num_neighbors=12)
    published, keep = (
        normalized_cut(laplacian_spectrum(W, 59, self_loops=choice), labeled, targets[labeled], 5)
        for choice in ("published", "keep")
    )
    assert (published - keep).abs().max() > 0.05


@pytest.mark.parametrize("self_loops", ["keep", "drop"])
def test_degrees_with_and_without_self_loops_are_not_mixed(self_loops):
    # constraints weighed with the Laplacian's own degrees have no part along its null vector
    features, targets = blobs(4, 20)
    labeled = labeled_split(targets, 12, 4).labeled
    spectrum = laplacian_spectrum(build_graph(features), 10, self_loops=self_loops)
    constraints = constraint_vectors(spectrum.degrees, labeled, targets[labeled], 4)
    np.testing.assert_allclose(spectrum.null[labeled] @ constraints.values, 0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(2, 5), per_class=st.integers(1, 4))
def test_constraint_vectors_equal_the_published_formula(seed, num_classes, per_class):
    rng = np.random.default_rng(seed)
    degree = rng.uniform(0.5, 20, 40)
    labeled = torch.from_numpy(rng.permutation(40)[: num_classes * per_class])
    labels = torch.arange(num_classes).repeat(per_class)
    constraints = constraint_vectors(torch.from_numpy(degree), labeled, labels, num_classes)
    constraints = constraints.values.numpy()
    for label in range(num_classes):
        u = np.zeros(40)
        u[labeled] = np.where(labels == label, 1, -1)
        p, q = degree * (np.abs(u) + u) / 2, degree * (np.abs(u) - u) / 2
        r = p.sum() / q.sum()
        s = np.sqrt(p / r) - np.sqrt(q * r)
        np.testing.assert_allclose(
            constraints[:, label], (s / np.linalg.norm(s))[labeled], atol=1e-12
        )
    np.testing.assert_allclose(np.sqrt(degree)[labeled] @ constraints, 0, atol=1e-10)


def two_cliques(m, bridge=True):
    W = scipy.linalg.block_diag(np.ones((m, m)), np.ones((m, m))).astype(np.float32)
    if bridge:
        W[m - 1, m] = W[m, m - 1] = 1
    return sp.csr_matrix(W)


@pytest.mark.parametrize("self_loops", ["published", "keep", "drop"])
@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_two_cliques_joined_by_one_edge_are_told_apart(solver, self_loops, monkeypatch):
    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 10**6 if solver == "dense" else 0)
    spectrum = laplacian_spectrum(two_cliques(20), 5, self_loops=self_loops)
    scores = normalized_cut(spectrum, torch.tensor([3, 30]), torch.tensor([0, 1]), 2)
    assert scores.argmax(dim=1).tolist() == [0] * 20 + [1] * 20
    # the bridge's own nodes are the least certain of their sides
    margin = -scores.amin(dim=1)
    assert {int(margin[:20].argmin()), 20 + int(margin[20:].argmin())} == {19, 20}


def test_winner_has_score_zero_and_the_others_less():
    features, targets = blobs()
    labeled = labeled_split(targets, 10, 5).labeled
    spectrum = laplacian_spectrum(build_graph(features), 50)
    scores = normalized_cut(spectrum, labeled, targets[labeled], 5)
    assert scores.dtype == torch.float32
    assert (scores.amax(dim=1) == 0).all()
    assert (scores.argmax(dim=1) == targets).float().mean() > 0.95


def test_component_without_a_label_has_confidence_zero_and_nothing_is_infinite():
    W = sp.csr_matrix(
        scipy.linalg.block_diag(*[np.ones((m, m)) for m in (6, 7, 5)]).astype(np.float32)
    )
    with pytest.warns(UserWarning, match="3 components"):
        spectrum = laplacian_spectrum(W, 199)
    scores = normalized_cut(spectrum, torch.tensor([0, 7]), torch.tensor([1, 0]), 2)
    assert torch.isfinite(scores).all()
    assert scores[:13].argmax(dim=1).tolist() == [1] * 6 + [0] * 7
    assert (scores[13:] == 0).all()
    split = labeled_split(torch.tensor([1] + [-1] * 6 + [0] + [-1] * 10), 2, 2)
    pseudo = from_scores(scores, split)
    assert sorted(pseudo.indexes[pseudo.confidence == 0].tolist()) == [13, 14, 15, 16, 17]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=6),
    seed=st.integers(0, 10**6),
    self_loops=st.sampled_from(["published", "keep", "drop"]),
)
def test_component_with_labels_of_one_class_is_labeled_with_it(sizes, seed, self_loops):
    rng = np.random.default_rng(seed)
    blocks = []
    for m in sizes:
        block = rng.uniform(0.1, 1, (m, m))
        blocks.append((block + block.T) / 2)
    W = sp.csr_matrix(scipy.linalg.block_diag(*blocks).astype(np.float32))
    first = np.cumsum([0, *sizes[:-1]])
    classes = np.array([0, 1, *rng.integers(0, 2, len(sizes) - 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spectrum = laplacian_spectrum(W, 199, self_loops=self_loops)
    scores = normalized_cut(spectrum, torch.from_numpy(first), torch.from_numpy(classes), 2)
    assert torch.isfinite(scores).all()
    assert scores.argmax(dim=1).tolist() == np.repeat(classes, sizes).tolist()


def test_component_with_labels_of_two_classes_is_divided_inside():
    W = scipy.linalg.block_diag(two_cliques(8).toarray(), np.ones((5, 5))).astype(np.float32)
    with pytest.warns(UserWarning, match="2 components"):
        spectrum = laplacian_spectrum(sp.csr_matrix(W), 199)
    labeled, labels = torch.tensor([0, 15, 16]), torch.tensor([0, 1, 1])
    scores = normalized_cut(spectrum, labeled, labels, 2)
    assert scores.argmax(dim=1).tolist() == [0] * 8 + [1] * 8 + [1] * 5


def test_vectors_mixed_over_equal_components_reach_no_component_without_a_label():
    # equal cliques share one eigenvalue; any rotation of its vectors is as good, and may be cut off
    W = sp.csr_matrix(scipy.linalg.block_diag(*[np.ones((6, 6))] * 3).astype(np.float32))
    with pytest.warns(UserWarning, match="3 components"):
        spectrum = laplacian_spectrum(W, 15)
    np.testing.assert_allclose(spectrum.values, 1.2, rtol=1e-5)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((15, 15)))[0]
    mixed = spectrum.vectors @ torch.from_numpy(rotation[:, :7]).float()
    spectrum = replace(spectrum, values=spectrum.values[:7], vectors=mixed)
    scores = normalized_cut(spectrum, torch.tensor([0, 7]), torch.tensor([1, 0]), 2)
    assert (scores[12:] == 0).all()


def test_no_class_is_preferred_by_a_component_of_large_degree():
    # the published constraints, weighed with self-loops, have a part along sqrt(degree) left
    W = scipy.linalg.block_diag(np.ones((3, 3)), np.full((8, 8), 0.5)).astype(np.float32)
    W[0, 0] = 5
    with pytest.warns(UserWarning, match="2 components"):
        spectrum = laplacian_spectrum(sp.csr_matrix(W), 4)
    labeled, labels = torch.tensor([0, 1, 5]), torch.tensor([0, 1, 1])
    constraints = constraint_vectors(spectrum.degrees, labeled, labels, 2)
    inside = between_components(spectrum, constraints, 2 / spectrum.values[0])
    between = spectrum.null[:, None] * inside[spectrum.components]
    mass = torch.tensor([W[:3].sum(), W[3:].sum()], dtype=torch.float64)
    direction = mass.sqrt()[spectrum.components] * spectrum.null
    assert between.abs().max() > 0.1
    np.testing.assert_allclose(direction @ between, 0, atol=1e-6)


def test_isolated_images_keep_their_own_label_and_give_none():
    W = two_cliques(6).toarray()
    W = scipy.linalg.block_diag(W, np.zeros((3, 3))).astype(np.float32)
    with pytest.warns(UserWarning, match="4 components"):
        spectrum = laplacian_spectrum(sp.csr_matrix(W), 199, self_loops="drop")
    labeled, labels = torch.tensor([0, 11, 12]), torch.tensor([0, 1, 1])
    scores = normalized_cut(spectrum, labeled, labels, 2)
    assert torch.isfinite(scores).all()
    assert scores[:12].argmax(dim=1).tolist() == [0] * 6 + [1] * 6
    assert (scores[13:] == 0).all()


@pytest.mark.filterwarnings("ignore:the graph has")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["constant", "pairs", "zero rows", "no noise"])
def test_degenerate_features_give_finite_scores(preset, kind):
    features, targets = blobs(3, 40, spread=0 if kind == "no noise" else 0.25)
    if kind == "constant":
        features = features[:1].repeat(120, 1)
    elif kind == "pairs":
        features = features[:60].repeat(2, 1)
    elif kind == "zero rows":
        features[:30] = 0
    labeled = labeled_split(targets, 6, 3).labeled
    spectrum = laplacian_spectrum(build_graph(features, preset), 199)
    scores = normalized_cut(spectrum, labeled, targets[labeled], 3)
    assert torch.isfinite(scores).all()
    pseudo = from_scores(scores, labeled_split(targets, 6, 3))
    assert torch.isfinite(pseudo.confidence).all()
    if kind == "no noise":
        assert (scores.argmax(dim=1) == targets).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permuted_images_give_the_permuted_scores(seed):
    features, targets = blobs(3, 25, spread=0.4, seed=seed)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(seed))
    place = torch.empty(75, dtype=torch.int64)
    place[order] = torch.arange(75)
    labeled = labeled_split(targets, 9, 3, seed).labeled
    labels = targets[labeled]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # all eigenvectors, so that none is cut off inside a cluster of near-equal values
        one = laplacian_spectrum(build_graph(features, num_neighbors=10), 74)
        two = laplacian_spectrum(build_graph(features[order], num_neighbors=10), 74)
    scores = normalized_cut(one, labeled, labels, 3)
    permuted = normalized_cut(two, place[labeled], labels, 3)
    torch.testing.assert_close(permuted, scores[order], atol=5e-3, rtol=0)


def test_order_of_the_labels_changes_nothing():
    features, targets = blobs(3, 30)
    labeled = labeled_split(targets, 12, 3).labeled
    spectrum = laplacian_spectrum(build_graph(features), 30)
    back = labeled.flip(0)
    torch.testing.assert_close(
        normalized_cut(spectrum, back, targets[back], 3),
        normalized_cut(spectrum, labeled, targets[labeled], 3),
        atol=1e-5,
        rtol=1e-5,
    )


def test_spectrum_without_vectors_still_tells_components_apart():
    with pytest.warns(UserWarning, match="3 components"):
        spectrum = laplacian_spectrum(sp.csr_matrix(np.eye(3, dtype=np.float32)))
    scores = normalized_cut(spectrum, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    assert scores.argmax(dim=1)[:2].tolist() == [0, 1]
    assert (scores[2] == 0).all()


@pytest.mark.parametrize(
    ("labeled", "labels", "num_classes", "words"),
    [
        ([0, 1], [0, 1], 3, r"none of class \[.*2"),
        ([0, 1], [0, 0], 1, "needs two classes"),
        ([0, 1], [0], 2, "2 labeled images with 1 labels"),
        ([], [], 2, "0 labeled images"),
        ([0, 0], [0, 1], 2, "named twice"),
        ([0, 40], [0, 1], 2, r"must lie in 0 \.\.\. 39"),
        ([0, -1], [0, 1], 2, r"must lie in 0 \.\.\. 39"),
        ([0, 1], [0, 2], 2, r"labels must lie in 0 \.\.\. 1"),
        ([0, 1], [0, -1], 2, r"labels must lie in 0 \.\.\. 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labeled, labels, num_classes, words):
    spectrum = laplacian_spectrum(two_cliques(20), 5)
    labeled, labels = (torch.tensor(x, dtype=torch.int64) for x in (labeled, labels))
    with pytest.raises(ValueError, match=words):
        normalized_cut(spectrum, labeled, labels, num_classes)


def test_presets_differ_in_more_than_their_number_of_neighbors():
    features, _ = blobs(3, 20)
    graphs = [
        build_graph(features, replace(p, num_neighbors=8)).toarray() for p in PRESETS.values()
    ]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        off = ~np.eye(60, dtype=bool)
        assert np.abs(graphs[one] - graphs[two])[off].max() > 0.05
