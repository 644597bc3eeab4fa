"""Phase 2 with everything on a GPU, pretended where there is none: nothing mixes devices, nothing differs."""

from dataclasses import replace

import pytest
import torch
from conftest import blobs
from pretended import DEVICE, Csr, Pretended, Pretending, prepare
from torch import Tensor

import lib.graph.neighbors
import lib.graph.spectrum
from lib.graph.filters import FILTERS
from lib.labels.split import Split, labeled_split
from lib.propagation import METHODS, EmbeddingGraph, propagate
from lib.propagation.active_learning import METHODS as CHOICES
from lib.propagation.active_learning import choose
from lib.propagation.algorithms import ALGORITHMS
from lib.propagation.embedding_graph import GraphCache
from lib.report import plots


@pytest.fixture
def pretending(monkeypatch):
    monkeypatch.setattr(lib.graph.neighbors, "has_fast_bf16", lambda _: True)
    monkeypatch.setattr(lib.graph.neighbors, "HALF_FROM", 0)
    prepare(monkeypatch)
    with Pretending():
        yield


def task(parts: int = 1) -> tuple[Tensor, Tensor]:
    """Features of 3 classes, in `parts` that no edge joins."""
    features, targets = blobs(3, 60, spread=0.4)
    wide = [torch.zeros(len(features), features.shape[1] * parts) for _ in range(parts)]
    for number, one in enumerate(wide):
        one.unflatten(1, (parts, -1))[:, number] = features
    return torch.cat(wide), targets.repeat(parts)


@pytest.mark.filterwarnings("ignore:the graph has")
@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [
        *((method, {}, 1) for method in METHODS),
        *((method, {"class_prior": [0.3, 0.3, 0.4]}, 2) for method in ALGORITHMS),
        *(("nc", {"num_eigenvectors": 20, "clamp": True}, parts) for parts in (1, 2)),
        *(("filter", {"filter": name}, 2) for name in FILTERS),
        ("filter", {"filter": "heat", "filter_by": "eigenvectors"}, 2),
    ],
)
def test_labels_spread_there_as_on_the_cpu(method, options, parts, pretending):
    features, targets = task(parts)
    split = labeled_split(targets, 30, 3, 0)
    labels = targets[split.labeled]
    found = [
        propagate(EmbeddingGraph(on), method, split, labels, 3, **options)
        for on in (features, features.to(DEVICE))
    ]
    assert isinstance(found[1].scores, Pretended)
    one, other = (answer.pseudo_labels(split) for answer in found)
    for tensor in (other.indexes, other.labels, other.confidence, other.probabilities):
        assert not isinstance(tensor, Pretended)
    order = [answer.indexes.argsort() for answer in (one, other)]
    same = one.labels[order[0]] == other.labels[order[1]]
    assert same.double().mean() > 0.98
    torch.testing.assert_close(
        one.probabilities[order[0]], other.probabilities[order[1]], atol=2e-2, rtol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_a_label_is_left_out_there(method, pretending):
    features, targets = task()
    split = labeled_split(targets, 30, 3, 0)
    some = split.labeled[targets[split.labeled] != 1]
    space = EmbeddingGraph(features.to(DEVICE))
    options = {"class_prior": [0.3, 0.3, 0.4]}
    found = propagate(space, method, Split(some, split.unlabeled), targets[some], 3, **options)
    assert isinstance(found.scores, Pretended)
    assert set(found.scores.argmax(dim=1).cpu().tolist()) == {0, 2}


@pytest.mark.parametrize("method", CHOICES)
def test_images_to_label_are_chosen_there_as_on_the_cpu(method, pretending):
    features, targets = task()
    options = {"targets": targets, "num_classes": 3, "labeled": torch.tensor([3, 5, 9])}
    options |= {"weights": torch.rand(len(features))}
    one, other = (choose(method, on, 6, **options) for on in (features, features.to(DEVICE)))
    assert not isinstance(other, Pretended)
    assert torch.equal(one, other)


@pytest.mark.parametrize("graph", ["cifar", "local-scale", "imagenet"])
@pytest.mark.parametrize("solver", ["arpack", "block"])
def test_graph_and_spectrum_are_made_there_and_kept(
    graph, solver, pretending, tmp_path, monkeypatch
):
    monkeypatch.setattr(lib.graph.spectrum, "DENSE_BELOW", 0)
    features, targets = task()
    lines = []
    cache = GraphCache(tmp_path, log=lines.append)
    space = EmbeddingGraph(
        features.to(DEVICE), graph, 12, "keep", solver={"solver": solver}, cache=cache
    )
    spectrum = space.spectrum(20)
    assert space.affinity.device == spectrum.device == space.operator.device == DEVICE
    assert 0 < space.operator.smallest_eigenvalue <= float(spectrum.values[0]) * 1.01
    there = EmbeddingGraph(features, graph, 12, "keep", solver={"solver": solver})
    assert there.spectrum(20).values == pytest.approx(spectrum.values, abs=2e-3)
    again = replace(space)
    assert torch.equal(again.spectrum(20).vectors.cpu(), spectrum.vectors.cpu())
    assert [("read from" in line) for line in lines] == [False, False, True, True]
    assert plots.spectral_matrix(spectrum, targets)


def test_deterministic_products_do_not_use_the_one_that_changes_from_call_to_call(
    pretending, monkeypatch
):
    features, _ = task()
    expected = EmbeddingGraph(features).spectrum(20).values
    monkeypatch.setattr(Csr, "__matmul__", None)
    torch.use_deterministic_algorithms(True)
    try:
        found = EmbeddingGraph(features.to(DEVICE)).spectrum(20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.values == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("method", ["ivf", "exact"])
def test_neighbors_are_found_there(method, pretending):
    features = task()[0]
    found = [
        lib.graph.neighbors.nearest_neighbors(
            on, 5, include_self=True, scale_rank=9, method=method, precision="fp32"
        )
        for on in (features, features.to(DEVICE))
    ]
    assert isinstance(found[1].indexes, Pretended)
    torch.testing.assert_close(found[0].similarities, found[1].similarities.cpu())
    torch.testing.assert_close(found[0].scale_similarities, found[1].scale_similarities.cpu())
