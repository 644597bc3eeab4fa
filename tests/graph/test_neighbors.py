"""Nearest neighbors against a dense matrix of cosines: exact, by cells, by FAISS."""

import sys
import types

import numpy as np
import pytest
import torch
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.graph.cells
import lib.graph.neighbors
import lib.graph.search
from lib.graph.neighbors import nearest_neighbors
from lib.graph.search import GROUP, top_k


def dense_neighbors(features, k):
    """Cosines and columns of the k nearest others."""
    cosines = features.double() @ features.double().T
    cosines.fill_diagonal_(-torch.inf)
    return cosines.topk(k, dim=1)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


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
    top, columns = top_k(values, k)
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
def test_columns_outside_of_any_group_are_neighbors_as_well(n):
    features = torch.nn.functional.normalize(torch.eye(n) - 1 / n)
    found = nearest_neighbors(features, 4, include_self=False)
    assert 0 <= int(found.indexes.min()) <= int(found.indexes.max()) < n
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
        return top_k(similarities, k)

    monkeypatch.setattr(lib.graph.search, "top_k", watched)
    features, _ = blobs(5, 100)
    nearest_neighbors(features, 6, include_self=True, block_bytes=50_000)
    assert max(seen) <= 50_000
    assert len(seen) >= 20


def test_image_comes_first_among_its_duplicates():
    features = torch.nn.functional.normalize(torch.ones(40, 8))
    found = nearest_neighbors(features, 5, include_self=True)
    assert found.indexes[:, 0].tolist() == list(range(40))
    assert all(len(set(row)) == 5 for row in found.indexes.tolist())


def test_image_left_out_is_left_out_among_its_duplicates():
    features = torch.nn.functional.normalize(torch.ones(40, 8))
    found = nearest_neighbors(features, 39, include_self=False)
    assert all(i not in row for i, row in enumerate(found.indexes.tolist()))


@pytest.mark.parametrize("tile", [256, 300])
def test_tiles_of_columns_change_nothing(tile, monkeypatch):
    features, _ = blobs(5, 205)
    whole = nearest_neighbors(features, 2, include_self=True, scale_rank=1)
    monkeypatch.setattr(lib.graph.search, "TILE", tile)
    tiles = nearest_neighbors(features, 2, include_self=True, scale_rank=1)
    assert torch.equal(tiles.indexes, whole.indexes)
    torch.testing.assert_close(tiles.similarities, whole.similarities)
    torch.testing.assert_close(tiles.scale_similarities, whole.scale_similarities)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_threads_change_nothing_and_leave_their_number_as_it_was(method, monkeypatch):
    features, _ = blobs(5, 100)
    monkeypatch.setattr(lib.graph.search, "ROWS", 16)
    two = nearest_neighbors(features, 5, include_self=False, method=method)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one = nearest_neighbors(features, 5, include_self=False, method=method)
    assert torch.equal(one.indexes, two.indexes)
    torch.testing.assert_close(one.similarities, two.similarities)


@pytest.mark.usefixtures("two_threads")
def test_failure_inside_a_thread_is_not_lost(monkeypatch):
    def failing(*_):
        raise MemoryError

    monkeypatch.setattr(lib.graph.search, "top_k", failing)
    with pytest.raises(MemoryError):
        nearest_neighbors(blobs(5, 40)[0], 5, include_self=False)


@pytest.mark.parametrize("include_self", [True, False])
def test_bfloat16_products_are_ranked_again_in_float32(include_self):
    features, _ = blobs(5, 200)
    exact = nearest_neighbors(features, 8, include_self=include_self)
    half = nearest_neighbors(features, 8, include_self=include_self, precision="bf16")
    assert exact.recall == 1
    assert 0.95 < half.recall <= 1
    same = half.indexes == exact.indexes
    assert same.float().mean() > 0.95
    # to the rounding of float32, where bfloat16 would be 1e-2 off
    torch.testing.assert_close(half.similarities[same], exact.similarities[same])


@pytest.mark.parametrize("method", ["exact", "ivf"])
@pytest.mark.parametrize("include_self", [True, False])
def test_rows_put_together_are_the_whole(method, include_self):
    features, _ = blobs(5, 60)
    options = {"include_self": include_self, "scale_rank": 7, "method": method}
    whole = nearest_neighbors(features, 5, **options)
    parts = [
        nearest_neighbors(features, 5, rows=rows, **options)
        for rows in (slice(0, 110), slice(110, 111), slice(111, None))
    ]
    assert torch.equal(torch.cat([p.indexes for p in parts]), whole.indexes)
    torch.testing.assert_close(torch.cat([p.similarities for p in parts]), whole.similarities)
    torch.testing.assert_close(
        torch.cat([p.scale_similarities for p in parts]), whole.scale_similarities
    )


@pytest.mark.parametrize("include_self", [True, False])
def test_cells_find_what_they_say_they_find(include_self, monkeypatch):
    monkeypatch.setattr(lib.graph.cells, "RECALL", 0.9)
    features, _ = blobs(8, 250, spread=0.2)
    found = nearest_neighbors(features, 6, include_self=include_self, method="ivf")
    others = found.indexes[:, int(include_self) :]
    _, columns = dense_neighbors(features, others.shape[1])
    naive = np.mean(
        [len(set(a) & set(b)) for a, b in zip(others.tolist(), columns.tolist(), strict=True)]
    )
    assert naive / others.shape[1] == pytest.approx(found.recall, abs=0.03)
    assert found.recall > 0.85
    if include_self:
        assert found.indexes[:, 0].tolist() == list(range(2000))
    assert all(len(set(row)) == 6 for row in found.indexes.tolist())
    cosines = (features @ features.T).gather(1, found.indexes.long()).clamp(-1, 1)
    torch.testing.assert_close(found.similarities, cosines, atol=1e-5, rtol=0)
    assert (found.similarities.diff(dim=1) <= 1e-6).all()


def test_all_cells_searched_are_exact(monkeypatch):
    monkeypatch.setattr(lib.graph.cells, "PROBES", 10**6)
    monkeypatch.setattr(
        lib.graph.cells, "WORTHWHILE", 2.0
    )  # otherwise exact search would take over
    features, _ = blobs(5, 60)
    found = nearest_neighbors(features, 7, include_self=False, method="ivf")
    values, columns = dense_neighbors(features, 7)
    assert torch.equal(found.indexes.long(), columns)
    torch.testing.assert_close(found.similarities, values.float())
    assert found.recall == 1


@pytest.fixture
def many_rounds(monkeypatch):
    """Cells searched in two rounds, however small the features."""
    monkeypatch.setattr(lib.graph.cells, "PROBES", 2)
    monkeypatch.setattr(lib.graph.cells, "TARGETS", 7)
    monkeypatch.setattr(lib.graph.cells, "WORTHWHILE", 2.0)
    calls = []
    second = lib.graph.cells._second_round
    monkeypatch.setattr(lib.graph.cells, "_second_round", lambda *a: calls.append(1) or second(*a))
    yield
    assert calls


@pytest.mark.usefixtures("many_rounds")
@pytest.mark.parametrize("include_self", [True, False])
def test_second_round_that_may_lose_nothing_finds_every_neighbor(include_self, monkeypatch):
    monkeypatch.setattr(lib.graph.cells, "SAMPLED_ROWS", 10**6)  # the margin of all rows
    monkeypatch.setattr(lib.graph.cells, "RECALL", 1.0)
    features, _ = blobs(4, 150, spread=0.5)
    found = nearest_neighbors(features, 7, include_self=include_self, method="ivf")
    exact = nearest_neighbors(features, 7, include_self=include_self)
    assert torch.equal(found.indexes, exact.indexes)
    torch.testing.assert_close(found.similarities, exact.similarities)


@pytest.mark.usefixtures("many_rounds")
def test_second_round_reaches_the_recall_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(lib.graph.cells, "RECALL", 0.96)
    features, _ = blobs(4, 500, spread=0.5)
    found = nearest_neighbors(features, 9, include_self=False, method="ivf")
    assert 0.94 < found.recall < 0.98  # a margin too wide would be a waste


@pytest.mark.usefixtures("many_rounds")
def test_second_round_of_some_rows_is_that_of_all_of_them(monkeypatch):
    monkeypatch.setattr(lib.graph.cells, "RECALL", 0.9)
    features, _ = blobs(4, 150, spread=0.5)
    options = {"include_self": False, "method": "ivf"}
    whole = nearest_neighbors(features, 5, **options)
    parts = [
        nearest_neighbors(features, 5, rows=rows, **options)
        for rows in (slice(0, 333), slice(333, None))
    ]
    assert torch.equal(torch.cat([p.indexes for p in parts]), whole.indexes)


def test_candidates_are_merged_into_the_neighbors_of_their_rows():
    found = lib.graph.cells.Found(
        torch.tensor([[0.9, 0.1], [0.5, 0.4], [0.3, 0.2]]), torch.zeros(3, 2).int(), 0
    )
    rows, values = torch.tensor([0, 2, 2, 2]), torch.tensor([0.5, 0.1, 0.6, 0.7])
    lib.graph.cells._merge(found, rows, values, torch.tensor([7, 8, 9, 10]).int())
    assert found.values.tolist() == torch.tensor([[0.9, 0.5], [0.5, 0.4], [0.7, 0.6]]).tolist()
    assert found.places.tolist() == [[0, 7], [0, 0], [10, 9]]


@pytest.mark.parametrize("kind", ["constant", "two points", "more neighbors than a cell holds"])
def test_cells_of_degenerate_features_have_neighbors_enough(kind, monkeypatch):
    monkeypatch.setattr(
        lib.graph.cells, "WORTHWHILE", 2.0
    )  # otherwise exact search would take over
    features, _ = blobs(2, 20, spread=0.05)
    if kind == "constant":
        features = features[:1].repeat(40, 1)
    elif kind == "two points":
        features = features[:2].repeat(20, 1)
    found = nearest_neighbors(features, 30, include_self=False, method="ivf")
    assert all(len(set(row) - {i}) == 30 for i, row in enumerate(found.indexes.tolist()))
    assert torch.isfinite(found.similarities).all()


def test_search_that_misses_neighbors_warns(monkeypatch):
    # one cell each where the groups overlap
    monkeypatch.setattr(lib.graph.cells, "PROBES", 1)
    monkeypatch.setattr(lib.graph.cells, "RECALL", 0.0)
    features, _ = blobs(1, 900, dim=32, spread=5.0)
    with pytest.warns(UserWarning, match="ivf search found"):
        found = nearest_neighbors(features, 5, include_self=False, method="ivf")
    assert found.recall < 0.95


def test_auto_is_exact_for_few_rows_and_by_cells_for_many(monkeypatch):
    features, _ = blobs(5, 60)
    assert nearest_neighbors(features, 5, include_self=False).recall == 1
    called = []
    by_cells = lib.graph.neighbors.search_cells
    monkeypatch.setattr(
        lib.graph.neighbors, "search_cells", lambda *a, **b: called.append(1) or by_cells(*a, **b)
    )
    monkeypatch.setattr(lib.graph.neighbors, "EXACT_BELOW", {"cpu": 200})
    nearest_neighbors(features, 5, include_self=False)
    assert called == [1]


class FlatIndex:
    """Stands for faiss.IndexFlatIP, and hides each image from itself among its duplicates."""

    def __init__(self, dim):
        self.dim = dim

    def add(self, points):
        self.points = points

    def search(self, queries, k):
        products = queries @ self.points.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(products, order, 1), order


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kind", ["blobs", "constant"])
def test_faiss_gives_the_same_neighbors(include_self, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(IndexFlatIP=FlatIndex))
    features, _ = blobs(3, 30)
    if kind == "constant":
        features = features[:1].repeat(90, 1)
    found = nearest_neighbors(features, 5, include_self=include_self, method="faiss")
    exact = nearest_neighbors(features, 5, include_self=include_self)
    torch.testing.assert_close(found.similarities, exact.similarities)
    assert all(len(set(row)) == 5 for row in found.indexes.tolist())
    own = [i in row for i, row in enumerate(found.indexes.tolist())]
    assert own == [include_self] * 90
    if kind == "blobs":
        assert torch.equal(found.indexes, exact.indexes)


def test_missing_faiss_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="install faiss-cpu, or take the method exact or ivf"):
        nearest_neighbors(blobs(2, 5)[0], 3, include_self=False, method="faiss")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "hnsw"}, "take one of auto, exact, ivf, faiss"),
        ({"precision": "fp16"}, "take one of auto, fp32, bf16"),
        ({"rows": slice(4, 4)}, "one row at least"),
        ({"rows": slice(0, 4, 2)}, "step 1"),
    ],
)
def test_impossible_search_says_why(options, words):
    with pytest.raises(ValueError, match=words):
        nearest_neighbors(blobs(2, 5)[0], 3, include_self=False, **options)


def test_automatic_precision_is_bfloat16_for_many_rows_where_it_is_fast(monkeypatch):
    asked = []
    search = lib.graph.neighbors.exact_search
    monkeypatch.setattr(
        lib.graph.neighbors,
        "exact_search",
        lambda *a, **b: asked.append(b.get("precision")) or search(*a, **b),
    )
    for fast, enough, wanted in ((True, 50, "bf16"), (True, 1000, "fp32"), (False, 50, "fp32")):
        monkeypatch.setattr(lib.graph.neighbors, "has_fast_bf16", lambda _, fast=fast: fast)
        monkeypatch.setattr(lib.graph.neighbors, "HALF_FROM", enough)
        asked.clear()
        nearest_neighbors(blobs(2, 50)[0], 3, include_self=False)
        assert asked[0] == wanted


def test_crowds_that_bfloat16_cannot_tell_apart_are_searched_in_float32(monkeypatch):
    monkeypatch.setattr(lib.graph.neighbors, "has_fast_bf16", lambda _: True)
    monkeypatch.setattr(lib.graph.neighbors, "HALF_FROM", 0)
    features, _ = blobs(1, 400, dim=16, spread=0.003)
    half = nearest_neighbors(features, 5, include_self=False, precision="bf16")
    assert half.recall < 0.9  # or this would show nothing
    found = nearest_neighbors(features, 5, include_self=False)
    exact = nearest_neighbors(features, 5, include_self=False, precision="fp32")
    assert torch.equal(found.indexes, exact.indexes)
    assert found.recall == 1


def test_far_neighbors_that_only_set_the_scale_are_not_kept(monkeypatch):
    features, _ = blobs(5, 60)
    whole = nearest_neighbors(features, 4, include_self=True, scale_rank=200)
    sizes = []
    search = lib.graph.neighbors.exact_search
    monkeypatch.setattr(
        lib.graph.neighbors,
        "exact_search",
        lambda q, *a, **b: sizes.append(len(q)) or search(q, *a, **b),
    )
    monkeypatch.setattr(lib.graph.neighbors, "KEPT_BYTES", 12 * 201 * 70)
    parts = nearest_neighbors(features, 4, include_self=True, scale_rank=200)
    assert sizes == [70, 70, 70, 70, 20]
    assert torch.equal(parts.indexes, whole.indexes)
    torch.testing.assert_close(parts.scale_similarities, whole.scale_similarities)


def test_more_neighbors_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(lib.graph.neighbors.os, "sysconf", lambda _: 100)  # 10,000 bytes
    with pytest.raises(ValueError, match=r"GiB.*chunks"):
        nearest_neighbors(blobs(5, 60)[0], 9, include_self=False, method="ivf")
