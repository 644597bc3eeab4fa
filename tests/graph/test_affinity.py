"""Affinity matrices against loops over a dense matrix, and graph files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import blobs
from graphs import build_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.files import checkpoint
from lib.graph.affinity import (
    PRESETS,
    SYMMETRIZE,
    GraphPreset,
    _symmetric_by_scipy,
    _symmetric_by_sorting,
    affinity_matrix,
)
from lib.graph.files import load_graph, save_graph
from lib.graph.neighbors import Neighbors, nearest_neighbors
from lib.graph.sparse import arrays, from_scipy, to_scipy
from lib.propagation.embedding_graph import EmbeddingGraph, GraphCache
from models.layers import l2_normalize


def naive_affinity(features, k, *, include_self, factor, scale, rank, symmetrize):
    """Row by row in float64; `scale` None is the distance of the `rank`-th other image."""
    points = features.double().numpy()
    n = len(points)
    directed = np.zeros((n, n))
    for i in range(n):
        distance = [(1 - float(points[i] @ points[j])) / 2 for j in range(n)]
        others = sorted((j for j in range(n) if j != i), key=lambda j: distance[j])
        near = ([i] if include_self else []) + others
        row_scale = distance[others[min(rank, n - 1) - 1]] if scale is None else scale
        for j in near[:k]:
            directed[i, j] = 1.0 if i == j else np.exp(-factor * distance[j] / row_scale)
    if symmetrize == "max":
        return np.maximum(directed, directed.T)
    return (directed + directed.T) / 2


NAIVE = {  # PUBLISHED.md, section 1, the table of graphs; with 7 neighbors
    "cifar": {"include_self": True, "factor": 2, "scale": 0.2, "rank": 0, "symmetrize": "mean"},
    "local-scale": {
        "include_self": False,
        "factor": 2,
        "scale": None,
        "rank": 7,
        "symmetrize": "max",
    },
    "imagenet": {
        "include_self": False,
        "factor": 1,
        "scale": None,
        "rank": 5000,
        "symmetrize": "mean",
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_graph_equals_the_naive_loops(preset):
    features, _ = blobs(4, 15)
    W = build_graph(features, preset, num_neighbors=7)
    expected = naive_affinity(features, 7, **NAIVE[preset])
    np.testing.assert_allclose(W.toarray(), expected, atol=2e-5)
    assert (W.toarray() > 0).tolist() == (expected > 0).tolist()
    assert EmbeddingGraph(features, preset, 7).affinity.layout == torch.sparse_csr
    assert W.dtype == np.float32
    assert abs(W - W.T).nnz == 0
    assert W.nnz <= 2 * len(features) * 7


@pytest.mark.parametrize("kind", SYMMETRIZE)
@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_sorting_as_on_a_gpu_makes_the_same_graph_as_transposing(kind, at_once):
    rng = torch.Generator().manual_seed(0)
    neighbors = torch.stack([torch.randperm(30, generator=rng)[:7] for _ in range(30)]).int()
    neighbors[neighbors == 3] = 29  # an image that is nobody's neighbor
    neighbors = torch.stack([row.unique()[:4] for row in neighbors])
    weights = torch.rand(30, 4, generator=rng)
    weights[5], weights[6, 0] = 0, 2.0**-149  # an image without an edge of its own, an underflow
    one = _symmetric_by_scipy(neighbors, weights, kind)
    other = _symmetric_by_sorting(neighbors, weights, kind, at_once)
    assert one.shape == other.shape == (30, 30)
    for expected, found in zip(arrays(one), arrays(other), strict=True):
        assert expected.dtype == found.dtype
        assert torch.equal(expected, found)


def literal_graph(features, preset):
    """Dense version of the notebooks nc (`cifar`) and nc-colorization (`local-scale`), in float64.

    Both take the 20 smallest distances of each row, its own among them. The first only has weights on a fixed
    scale; the second divides by the last of the 20, and then leaves out the first.
    """
    products = features.double() @ features.double().T
    distances, places = ((1 - products) / 2).topk(20, largest=False)
    if preset == "cifar":
        weights = torch.exp(-2 * distances / 0.2)
    else:
        weights = torch.exp(-2 * distances / distances[:, -1:])[:, 1:]
        places = places[:, 1:]
    directed = torch.zeros_like(products).scatter_(1, places, weights)
    return (
        (directed + directed.T) / 2 if preset == "cifar" else directed.maximum(directed.T)
    ).numpy()


@pytest.mark.parametrize("preset", ["cifar", "local-scale"])
def test_presets_give_the_graphs_of_the_published_notebooks(preset):
    features, _ = blobs(4, 30)
    W, expected = build_graph(features, preset).toarray(), literal_graph(features, preset)
    np.testing.assert_allclose(W, expected, atol=2e-5)
    assert (W > 0).tolist() == (expected > 0).tolist()


@pytest.mark.parametrize("preset", ["cifar", "local-scale"])
def test_features_off_the_unit_sphere_give_the_published_graph_of_their_products(preset):
    features, _ = blobs(4, 30, spread=0.1 if preset == "cifar" else 0.25)
    # where lengths differ more, not every row is among its own nearest, which local-scale leaves out
    lengths = (
        torch.linspace(0.6, 1.4, 120) if preset == "cifar" else torch.linspace(0.97, 1.03, 120)
    )
    features *= lengths[:, None]
    W, expected = build_graph(features, preset).toarray(), literal_graph(features, preset)
    np.testing.assert_allclose(W, expected, rtol=1e-4, atol=2e-5)
    assert (W > 0).tolist() == (expected > 0).tolist()
    if preset == "cifar":
        assert W.max() > 1  # a negative distance
        assert 0 < np.count_nonzero(W.diagonal() == 0) < 60
    assert not np.array_equal(W, build_graph(l2_normalize(features), preset).toarray())


def test_infinite_weights_of_features_off_the_unit_sphere_are_refused():
    with pytest.raises(ValueError, match="far off the unit sphere: scale"):
        build_graph(100 * blobs(4, 30)[0], "cifar")


def test_cells_are_not_searched_off_the_unit_sphere():
    features = 1.1 * blobs(4, 30)[0]
    with pytest.raises(ValueError, match="ivf needs features of unit length"):
        nearest_neighbors(features, 5, include_self=False, method="ivf")


def test_presets_have_the_published_numbers():
    assert {
        "cifar": GraphPreset(20, True, 2.0, 0.2, 0, "mean"),
        "local-scale": GraphPreset(19, False, 2.0, None, 19, "max"),
        "imagenet": GraphPreset(500, False, 1.0, None, 5000, "mean"),
    } == PRESETS


def test_scale_of_a_rank_beyond_the_neighbors_is_that_of_the_rank():
    features, _ = blobs(4, 15)
    preset = replace(PRESETS["imagenet"], num_neighbors=5, scale_rank=30)
    expected = naive_affinity(features, 5, **NAIVE["imagenet"] | {"rank": 30})
    np.testing.assert_allclose(build_graph(features, preset).toarray(), expected, atol=2e-5)


def test_self_loops_have_weight_one_where_the_image_is_its_own_neighbor():
    features, _ = blobs(4, 15)
    assert (build_graph(features, "cifar").diagonal() == 1).all()
    assert (build_graph(features, "local-scale").diagonal() == 0).all()
    assert (build_graph(features, "imagenet").diagonal() == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_fewer_images_than_neighbors_are_all_neighbors(preset):
    features, _ = blobs(2, 3)
    W = build_graph(features, preset).toarray()
    assert np.isfinite(W).all()
    assert (W[~np.eye(6, dtype=bool)] > 0).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["constant", "pairs", "zero rows"])
def test_degenerate_features_give_finite_weights(preset, kind):
    features, _ = blobs(3, 20)
    if kind == "constant":
        features = features[:1].repeat(60, 1)
    elif kind == "pairs":
        features = features[:30].repeat(2, 1)
    else:
        features[:25] = 0
    W = build_graph(features, preset)
    assert np.isfinite(W.data).all()
    assert (W.data > 0).all()
    assert (W.data <= 1).all()


def test_all_weights_of_duplicates_are_one_under_a_local_scale():
    features, _ = blobs(3, 1)
    W = build_graph(features.repeat_interleave(25, dim=0), "local-scale")
    np.testing.assert_allclose(W.data, 1, atol=0.05)  # not exp(-2): the scale is rounding here


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), preset=st.sampled_from(sorted(PRESETS)))
def test_permuted_images_give_the_permuted_graph(seed, preset):
    features, _ = blobs(3, 20, seed=seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    W = build_graph(features, preset, num_neighbors=6).toarray()
    permuted = build_graph(features[order], preset, num_neighbors=6).toarray()
    np.testing.assert_allclose(permuted, W[order][:, order], atol=1e-5)


def test_number_of_neighbors_replaces_the_rank_of_a_scale_that_follows_it():
    features, _ = blobs(3, 20)
    W = build_graph(features, "local-scale", num_neighbors=5).toarray()
    # the farthest of its own five neighbors has weight exp(-2); "max" can only raise it
    assert np.sort(W, axis=1)[:, -5].min() >= np.exp(-2) - 1e-5
    assert W[W > 0].min() == pytest.approx(np.exp(-2), rel=1e-4)


def test_weight_that_underflows_is_no_edge():
    neighbors = Neighbors(
        torch.tensor([[1], [0], [0]]), torch.tensor([[1.0], [1.0], [0.0]]), torch.empty(0)
    )
    # exp(-103.2) is the smallest float32, and half of it is 0
    W = affinity_matrix(neighbors, GraphPreset(1, False, 2.0, 1 / 103.2, 0, "mean"))
    assert len(W.values()) == 2


@pytest.mark.parametrize(
    ("features", "options", "words"),
    [
        (torch.ones(1, 4), {}, "two images at least, not 1"),
        (torch.ones(0, 4), {}, "two images at least, not 0"),
        (torch.ones(5, 4), {"num_neighbors": 0}, "one neighbor per image at least, not 0"),
        (torch.ones(5, 4), {"preset": "cifar-10"}, "take one of cifar, local-scale, imagenet"),
        (
            torch.ones(5, 4),
            {"preset": replace(PRESETS["cifar"], symmetrize="min")},
            "take mean or max",
        ),
    ],
)
def test_impossible_graph_says_why(features, options, words):
    with pytest.raises(ValueError, match=words):
        build_graph(features, **options)


def test_graph_file_gives_the_same_graph_back(tmp_path):
    W = build_graph(blobs(3, 20)[0], num_neighbors=6)
    save_graph(from_scipy(W), tmp_path / "graph.pth.tar", {"recall": 1.0})
    again, meta = load_graph(tmp_path / "graph.pth.tar")
    assert (to_scipy(again) != W).nnz == 0
    assert again.dtype == torch.float32
    assert meta["recall"] == 1.0
    assert meta["git_commit"]


def test_graph_file_is_used_only_for_its_own_features_and_choices(tmp_path, monkeypatch):
    built, said = [], []

    def counted(*args, **options):
        built.append(1)
        return nearest_neighbors(*args, **options)

    monkeypatch.setattr("lib.propagation.embedding_graph.nearest_neighbors", counted)
    features, _ = blobs(3, 20)
    cache = GraphCache(graph=tmp_path / "graph.pth.tar", log=said.append)
    first = build_graph(features, num_neighbors=6, cache=cache)
    again = build_graph(features, num_neighbors=6, cache=cache)
    assert len(built) == 1
    assert ["built" in line for line in said] == [True, False]
    assert "read from" in said[1]
    assert (first != again).nnz == 0
    build_graph(features, num_neighbors=6, cache=replace(cache, reuse=False))
    assert len(built) == 2
    for changed, options in (
        (features.flip(0), {"num_neighbors": 6}),
        (features, {"num_neighbors": 7}),
        (features, {"num_neighbors": 7, "preset": "imagenet"}),
        (features, {"num_neighbors": 7, "preset": "imagenet", "search": {"precision": "bf16"}}),
    ):
        before = len(built)
        other = build_graph(changed, cache=cache, **options)
        assert len(built) == before + 1
        assert (other != build_graph(changed, **options)).nnz == 0


def test_meta_of_a_graph_holds_every_choice(tmp_path):
    features, _ = blobs(3, 20)
    path, digests = tmp_path / "graph.pth.tar", set()
    for rows in (features, -features):
        build_graph(rows, "local-scale", num_neighbors=5, cache=GraphCache(graph=path))
        meta = load_graph(path)[1]
        assert meta["preset"]["num_neighbors"] == meta["preset"]["scale_rank"] == 5
        assert (meta["method"], meta["precision"], meta["recall"]) == ("auto", "auto", 1.0)
        digests.add(meta["features_digest"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": torch.tensor([1.0, float("nan")])}, "values holds NaN or infinity"),
        ({"values": torch.tensor([1.0, -1.0])}, "values holds -1.0, below 0"),
        ({"values": torch.tensor([1.0, 0.5])}, "not symmetric"),
        ({"values": torch.ones(2, dtype=torch.float64)}, "values is a float64 tensor"),
        ({"values": torch.ones(3)}, "not one per value"),
        ({"col": torch.tensor([1, 2])}, "out of range"),
        ({"col": torch.tensor([-1, 0])}, "col holds -1, below 0"),
        ({"col": torch.tensor([0, 0])}, "not symmetric"),
        ({"col": torch.ones(2)}, "col is a float32 tensor of shape"),
        ({"crow": torch.tensor([0, 2, 1])}, "does not rise"),
        ({"crow": torch.tensor([0, 2])}, "for 1 rows"),
        ({"crow": [0, 1, 2]}, "crow is a list"),
        ({"shape": [2, 3]}, "for 2 rows"),
        ({"shape": "2"}, "shape is '2', not a list of 2"),
        ({"meta": 3}, "meta is 3, not a dict of plain values"),
    ],
)
def test_damaged_graph_file_is_refused(change, words, tmp_path):
    state = {
        "crow": torch.tensor([0, 1, 2]),
        "col": torch.tensor([1, 0]),
        "values": torch.ones(2),
        "shape": [2, 2],
        "meta": {},
    }
    path = tmp_path / "graph.pth.tar"
    checkpoint.save(state, path)
    assert load_graph(path)[0].to_dense().tolist() == [[0, 1], [1, 0]]
    checkpoint.save(state | change, path)
    with pytest.raises(ValueError, match=words):
        load_graph(path)
