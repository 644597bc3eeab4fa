"""What holds for every method on any features, by hypothesis: few examples, tiny sets."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from conftest import blobs
from graphs import graph_of, laplacian_spectrum, normalized_cut
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lib.graph.eigensolver
import lib.graph.filters
import lib.graph.sparse
import lib.graph.spectrum
from lib.graph.filters import FILTERS
from lib.labels.confidence import from_scores
from lib.labels.split import Split, labeled_split
from lib.propagation import METHODS, EmbeddingGraph, propagate
from lib.propagation.algorithms import ALGORITHMS

FEW = settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 10**6)
CLEAR = 0.02  # a difference of two probabilities that rounding does not turn round
K = 8  # neighbors of each image


def answer(
    metric: EmbeddingGraph, method: str, split: Split, labels: torch.Tensor, classes: int, **more
):
    """Probabilities N x C; warnings of falling graphs are no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return propagate(metric, method, split, labels, classes, **more).scores.softmax(dim=1)


def task(seed: int, per_class: int = 14, spread: float = 0.4, **choices):
    """EmbeddingGraph, split, labels and all targets; every image's neighbors are clear of rounding."""
    features, targets = blobs(3, per_class, spread=spread, seed=seed)
    closest = (features.double() @ features.double().T).topk(K + 2, dim=1).values
    # K neighbors, with or without the image itself, and the next one: a tie is nobody's choice
    assume((closest[:, K - 1 : K + 1] - closest[:, K : K + 2] > 1e-5).all())
    split = labeled_split(targets, 9, 3, seed)
    return (
        EmbeddingGraph(features, num_neighbors=K, **choices),
        split,
        targets[split.labeled],
        targets,
    )


def assert_same_labels(one: torch.Tensor, two: torch.Tensor) -> None:
    top = one.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > CLEAR
    assert torch.equal(one.argmax(1)[clear], two.argmax(1)[clear])
    torch.testing.assert_close(one, two, atol=CLEAR / 2, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(seed=SEEDS)
def test_permuting_the_images_permutes_their_labels(method, seed):
    metric, split, labels, _ = task(seed)
    n = len(metric.features)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    moved = replace(metric, features=metric.features[order])
    # all eigenvectors: none is cut off inside a cluster of near-equal values
    more = {"num_eigenvectors": n} if method == "nc" else {}
    one = answer(metric, method, split, labels, 3, **more)
    two = answer(
        moved, method, Split(place[split.labeled], place[split.unlabeled]), labels, 3, **more
    )
    assert_same_labels(one[order], two)


@FEW
@given(seed=SEEDS, clamp=st.booleans())
def test_signs_and_rotations_inside_equal_eigenvalues_change_nothing(seed, clamp):
    rng = np.random.default_rng(seed)
    # a cycle: every eigenvalue but the ends comes twice
    n = 24
    ring = sp.csr_matrix(np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0), dtype=np.float32)
    spectrum = laplacian_spectrum(ring, 14)
    turned = spectrum.vectors.numpy().copy()
    groups = np.split(np.arange(14), np.flatnonzero(np.diff(spectrum.values) > 1e-4) + 1)
    assert max(map(len, groups)) == 2
    for group in groups:
        rotation = np.linalg.qr(rng.standard_normal((len(group), len(group))))[0]
        turned[:, group] = turned[:, group] @ rotation.astype(np.float32)
    labeled, labels = torch.tensor([0, 7, 13, 18]), torch.tensor([0, 1, 2, 1])
    one, two = (
        normalized_cut(s, labeled, labels, 3, clamp=clamp)
        for s in (spectrum, replace(spectrum, vectors=torch.from_numpy(turned)))
    )
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ALGORITHMS)
@FEW
@given(seed=SEEDS, tile=st.integers(1, 5), block=st.integers(1, 2**14))
def test_the_size_of_blocks_changes_nothing(method, seed, tile, block, monkeypatch):
    metric, split, labels, _ = task(seed)
    one = answer(metric, method, split, labels, 3)
    with monkeypatch.context() as patch:
        patch.setattr(lib.graph.filters, "TILE", tile)
        patch.setattr(lib.propagation.normalized_cut, "ROWS", tile)
        patch.setattr(lib.propagation.diffusion, "ROWS", tile)
        patch.setattr(lib.graph.sparse, "ROWS", tile)
        patch.setattr(lib.graph.eigensolver, "ROWS", tile)
        small = replace(metric, search={"block_bytes": block})
        assert_same_labels(one, answer(small, method, split, labels, 3))


@FEW
@given(seed=SEEDS)
def test_dense_and_sparse_eigenvectors_agree(seed):
    metric, split, labels, _ = task(seed, per_class=20)
    answers = []
    for below, solver in ((10**6, "auto"), (0, "arpack"), (0, "block")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lib.graph.spectrum, "DENSE_BELOW", below)
            patch.setattr(lib.graph.spectrum, "BLOCK_FROM", 0)
            for module in (lib.graph.spectrum, lib.graph.eigensolver):
                patch.setattr(module, "TOLERANCE", 1e-6)
            own = replace(metric, solver={"solver": solver})
            # cut where the gap is widest: which vectors of a cluster come first is nobody's choice
            values = own.spectrum(59).values
            k = 5 + int(np.diff(values[5:25]).argmax()) + 1
            answers.append(answer(own, "nc", split, labels, 3, num_eigenvectors=k + 1))
    for other in answers[1:]:
        assert_same_labels(answers[0], other)


def finite_answer(
    metric: EmbeddingGraph, method: str, split: Split, labels: torch.Tensor, classes: int
):
    """Probabilities, proved to be finite and to make pseudo-labels, which check themselves."""
    probabilities = answer(metric, method, split, labels, classes)
    assert torch.isfinite(probabilities).all()
    pseudo = from_scores(probabilities.log().clamp_min(-80), split)
    assert torch.isfinite(pseudo.confidence).all()
    return probabilities


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(seed=SEEDS, copies=st.integers(2, 6))
def test_duplicates_get_the_label_of_each_other(method, seed, copies):
    features, targets = blobs(3, 8, spread=0.2, seed=seed)
    split = labeled_split(targets.repeat(copies), 6, 3, seed)
    metric = EmbeddingGraph(features.repeat(copies, 1), num_neighbors=3 * copies)
    found = finite_answer(metric, method, split, targets.repeat(copies)[split.labeled], 3)
    predicted = found.argmax(dim=1).view(copies, -1)
    # one copy may hold the label and the others not, at the edge of a class
    assert (predicted == predicted.mode(dim=0).values).double().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("graph", ["cifar", "local-scale", "imagenet"])
def test_constant_features_give_finite_answers(method, graph):
    split = Split(torch.tensor([0, 1, 2]), torch.arange(3, 20))
    metric = EmbeddingGraph(torch.ones(20, 4) / 2, graph, 5)
    finite_answer(metric, method, split, torch.tensor([0, 1, 2]), 3)


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(seed=SEEDS, n=st.integers(4, 12), k=st.integers(12, 500))
def test_more_neighbors_than_images_are_all_images(method, seed, n, k):
    features, _ = blobs(2, 6, seed=seed)
    split = Split(torch.tensor([0, 1]), torch.arange(2, n))
    metric = EmbeddingGraph(features[:n], num_neighbors=k)
    found = finite_answer(metric, method, split, torch.tensor([0, 1]), 2)
    exactly = answer(
        EmbeddingGraph(features[:n], num_neighbors=n), method, split, torch.tensor([0, 1]), 2
    )
    assert torch.equal(found, exactly)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "knn"])
@FEW
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    zeros=st.integers(1, 3),
    seed=SEEDS,
)
def test_isolated_images_get_confidence_zero_and_the_rest_an_answer(method, sizes, zeros, seed):
    rng = np.random.default_rng(seed)
    blocks = [rng.uniform(0.2, 1, (m, m)) for m in (6, 7, *sizes)]
    W = scipy.linalg.block_diag(*[b + b.T for b in blocks], np.zeros((zeros, zeros)))
    n = len(W)
    metric = graph_of(W, "published")
    split = Split(torch.tensor([0, 6]), torch.tensor([i for i in range(n) if i not in (0, 6)]))
    found = answer(metric, method, split, torch.tensor([1, 0]), 2)
    assert torch.isfinite(found).all()
    assert found[:13].argmax(dim=1).tolist() == [1] * 6 + [0] * 7
    torch.testing.assert_close(found[13:], torch.full((n - 13, 2), 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(seed=SEEDS, missing=st.integers(0, 2))
def test_a_class_without_a_label_is_predicted_for_nobody(method, seed, missing):
    metric, split, labels, _ = task(seed)
    some = labels != missing
    split = Split(split.labeled[some], torch.cat([split.unlabeled, split.labeled[~some]]))
    found = answer(metric, method, split, labels[some], 3)
    assert torch.isfinite(found).all()
    assert (found.argmax(dim=1) != missing).all()


@pytest.mark.parametrize("name", FILTERS)
@FEW
@given(seed=SEEDS)
def test_every_filter_is_finite_on_any_graph(name, seed):
    rng = np.random.default_rng(seed)
    W = rng.uniform(0, 1, (20, 20)) * (rng.random((20, 20)) < 0.08) * 10.0 ** rng.integers(-8, 8)
    metric = graph_of(W + W.T, "published")
    split = Split(torch.tensor([0, 1, 2]), torch.arange(3, 20))
    found = answer(metric, "filter", split, torch.tensor([0, 1, 0]), 2, filter=name)
    assert torch.isfinite(found).all()
