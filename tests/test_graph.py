"""Nearest neighbours and affinity matrices against loops over a dense matrix."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.graph
from lib.graph import (
    GROUP,
    PRESETS,
    GraphPreset,
    Neighbors,
    _top_k,
    affinity,
    build_graph,
    nearest_neighbors,
)


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


NAIVE = {  # PUBLISHED.md, section 1, the table of graphs; with 7 neighbours
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
    assert isinstance(W, sp.csr_matrix)
    assert W.dtype == np.float32
    assert abs(W - W.T).nnz == 0
    assert W.nnz <= 2 * len(features) * 7


def test_presets_have_the_published_numbers():
    assert {
        "cifar": GraphPreset(20, True, 2.0, 0.2, 0, "mean"),
        "local-scale": GraphPreset(20, False, 2.0, None, 20, "max"),
        "imagenet": GraphPreset(500, False, 1.0, None, 5000, "mean"),
    } == PRESETS


def test_scale_of_a_rank_beyond_the_neighbours_is_that_of_the_rank():
    features, _ = blobs(4, 15)
    preset = replace(PRESETS["imagenet"], num_neighbors=5, scale_rank=30)
    expected = naive_affinity(features, 5, **NAIVE["imagenet"] | {"rank": 30})
    np.testing.assert_allclose(build_graph(features, preset).toarray(), expected, atol=2e-5)


def test_self_loops_have_weight_one_where_the_image_is_its_own_neighbour():
    features, _ = blobs(4, 15)
    assert (build_graph(features, "cifar").diagonal() == 1).all()
    assert (build_graph(features, "local-scale").diagonal() == 0).all()
    assert (build_graph(features, "imagenet").diagonal() == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 7),
    groups=st.integers(16, 24),
    distinct=st.sampled_from([2, 5, 10**6]),
)
def test_top_k_by_group_maxima_equals_topk(seed, k, groups, distinct):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(distinct, (6, groups * GROUP), generator=generator).float()
    values[:, -GROUP // 2 :] = -torch.inf
    assert k * GROUP * 2 < values.shape[1]  # otherwise this would be topk against itself
    top, columns = _top_k(values, k)
    assert torch.equal(top, values.topk(k, dim=1).values)
    assert torch.equal(values.gather(1, columns), top)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_group_maxima_are_what_a_large_graph_is_made_from():
    features, _ = blobs(5, 205)
    found = nearest_neighbors(features, 8, include_self=False, scale_rank=9)
    cosines = features @ features.T
    cosines.fill_diagonal_(-torch.inf)
    values, columns = cosines.topk(9, dim=1)
    torch.testing.assert_close(found.similarities, values[:, :8])
    torch.testing.assert_close(found.scale_similarities, values[:, 8])
    assert (found.indexes == columns[:, :8]).float().mean() > 0.999


@pytest.mark.parametrize("n", [33, 1023])
def test_padding_is_never_a_neighbour(n):
    # all cosines are negative, below that of a row of zeros
    features = torch.nn.functional.normalize(torch.eye(n) - 1 / n)
    found = nearest_neighbors(features, 4, include_self=False)
    assert int(found.indexes.max()) < n
    torch.testing.assert_close(found.similarities, torch.full((n, 4), -1 / (n - 1)))


@pytest.mark.parametrize("include_self", [True, False])
def test_block_size_changes_nothing(include_self):
    features, _ = blobs(5, 41)
    whole = nearest_neighbors(features, 6, include_self=include_self, scale_rank=9)
    for block_bytes in (1, 4 * 224 * 7, 4 * 224 * 204):
        blocks = nearest_neighbors(
            features, 6, include_self=include_self, scale_rank=9, block_bytes=block_bytes
        )
        assert torch.equal(blocks.indexes, whole.indexes)
        torch.testing.assert_close(blocks.similarities, whole.similarities)
        torch.testing.assert_close(blocks.scale_similarities, whole.scale_similarities)


def test_similarities_in_memory_stay_below_their_bound(monkeypatch):
    seen = []

    def watched(similarities, k):
        seen.append(similarities.numel() * similarities.element_size())
        return _top_k(similarities, k)

    monkeypatch.setattr(lib.graph, "_top_k", watched)
    features, _ = blobs(5, 100)
    nearest_neighbors(features, 6, include_self=True, block_bytes=50_000)
    assert max(seen) <= 50_000
    assert len(seen) > 20


def test_image_comes_first_among_its_duplicates():
    features = torch.nn.functional.normalize(torch.ones(40, 8))
    found = nearest_neighbors(features, 5, include_self=True)
    assert found.indexes[:, 0].tolist() == list(range(40))
    assert all(len(set(row)) == 5 for row in found.indexes.tolist())


def test_image_left_out_is_left_out_among_its_duplicates():
    features = torch.nn.functional.normalize(torch.ones(40, 8))
    found = nearest_neighbors(features, 39, include_self=False)
    assert all(i not in row for i, row in enumerate(found.indexes.tolist()))


@pytest.mark.parametrize("preset", PRESETS)
def test_fewer_images_than_neighbours_are_all_neighbours(preset):
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


def test_number_of_neighbours_replaces_the_rank_of_a_scale_that_follows_it():
    features, _ = blobs(3, 20)
    W = build_graph(features, "local-scale", num_neighbors=5).toarray()
    # the farthest of its own five neighbours has weight exp(-2); "max" can only raise it
    assert np.sort(W, axis=1)[:, -5].min() >= np.exp(-2) - 1e-5
    assert W[W > 0].min() == pytest.approx(np.exp(-2), rel=1e-4)


def test_weight_that_underflows_is_no_edge():
    neighbors = Neighbors(
        torch.tensor([[1], [0], [0]]), torch.tensor([[1.0], [1.0], [0.0]]), torch.empty(0)
    )
    # exp(-103.2) is the smallest float32, and half of it is 0
    W = affinity(neighbors, GraphPreset(1, False, 2.0, 1 / 103.2, 0, "mean"))
    assert W.nnz == 2


@pytest.mark.parametrize(
    ("features", "options", "words"),
    [
        (torch.ones(1, 4), {}, "two images at least, not 1"),
        (torch.ones(0, 4), {}, "two images at least, not 0"),
        (torch.ones(5, 4), {"num_neighbors": 0}, "one neighbour per image at least, not 0"),
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
