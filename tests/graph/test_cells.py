"""Parts of the search by cells that a run of it cannot show."""

import pytest
import torch

import lib.graph.cells


def merge_naive(values, places, rows, new_values, new_places):
    k = values.shape[1]
    for row in range(len(values)):
        pairs = list(zip(values[row].tolist(), places[row].tolist(), strict=True))
        mine = rows == row
        pairs += zip(new_values[mine].tolist(), new_places[mine].tolist(), strict=True)
        yield sorted(pairs, reverse=True)[:k]


@pytest.mark.parametrize("num_bytes", [1, 2000, 2**30])
def test_merging_takes_no_more_memory_than_it_may_and_gives_the_same(num_bytes, monkeypatch):
    monkeypatch.setattr(lib.graph.cells, "MERGE_BYTES", num_bytes)
    areas, full = [], torch.full

    def noted(size, *rest, **more):
        areas.append((size[0], 8 * size[0] * size[1]))
        return full(size, *rest, **more)

    values = torch.rand(30, 3).sort(descending=True).values
    found = lib.graph.cells.Found(values.clone(), torch.arange(90).view(30, 3).int(), 0)
    counts = torch.ones(30).long()
    counts[[4, 17]], counts[9] = 100, 0  # crowded rows, and one without candidates
    rows = torch.arange(30).repeat_interleave(counts)
    new_values, new_places = torch.rand(len(rows)), torch.arange(100, 100 + len(rows)).int()
    expected = list(merge_naive(values, found.places.clone(), rows, new_values, new_places))
    monkeypatch.setattr(torch, "full", noted)
    lib.graph.cells._merge(found, rows, new_values, new_places)
    pairs = [
        list(zip(v, p, strict=True))
        for v, p in zip(found.values.tolist(), found.places.tolist(), strict=True)
    ]
    assert pairs == expected
    assert all(area <= num_bytes or height == 1 for height, area in areas)
