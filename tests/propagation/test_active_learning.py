"""The choice of images to label, against naive greedy loops."""

import pytest
import torch
from conftest import blobs

from lib.propagation import active_learning
from lib.propagation.active_learning import max_herding, typiclust


def naive_herding(features, budget, labeled=(), weights=None):
    """The greedy sum over all pairs, in float64, as the paper writes it."""
    x = features.double()
    kernel = (-torch.cdist(x, x).square()).exp()
    w = torch.ones(len(x)).double() if weights is None else weights.double()
    chosen = list(labeled)
    for _ in range(budget):
        free = [n for n in range(len(x)) if n not in labeled]
        m = kernel[:, chosen].amax(dim=1) if chosen else torch.zeros(len(x)).double()
        gains = {}
        for n in free:
            if n not in chosen:
                rises = (kernel[:, n] - m).clamp_min(0) * w
                gains[n] = float(rises[free].sum())
        chosen.append(max(gains, key=gains.get))
    return chosen[len(labeled) :]


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("case", ["first round", "later round", "weighted"])
def test_the_choice_is_the_naive_greedy_one(case, rows, monkeypatch):
    monkeypatch.setattr(active_learning, "ROWS", rows)
    features, _ = blobs(4, 30, dim=8, spread=0.4)
    labeled = [3, 50, 77] if case == "later round" else []
    weights = torch.rand(len(features)) if case == "weighted" else None
    found = max_herding(
        features, 12, labeled=torch.tensor(labeled, dtype=torch.int64), weights=weights
    )
    assert found.tolist() == naive_herding(features, 12, labeled, weights)


@pytest.mark.parametrize("choose", [max_herding, typiclust])
def test_every_cluster_gets_a_label_before_any_gets_two(choose):
    features, targets = blobs(8, 40, dim=32, spread=0.15)
    assert sorted(targets[choose(features, 8)].tolist()) == list(range(8))
    first = choose(features, 3)
    more = choose(features, 5, labeled=first)
    assert sorted(targets[torch.cat([first, more])].tolist()) == list(range(8))


def test_the_typical_image_is_that_of_the_smallest_mean_distance():
    points, _ = blobs(1, 60, dim=8, spread=0.5)
    distances = torch.cdist(points.double(), points.double())
    nearest = distances.sort(dim=1).values[:, 1:21].mean(dim=1)
    assert active_learning._most_typical(points) == int(nearest.argmin())


@pytest.mark.parametrize("choose", [max_herding, typiclust])
def test_a_sample_stands_for_all_images(choose, monkeypatch):
    monkeypatch.setattr(active_learning, "COVERED", 60)
    monkeypatch.setattr(active_learning, "CLUSTERED", 60)
    features, targets = blobs(4, 100, dim=16, spread=0.15)
    chosen = choose(features, 4, seed=3)
    assert sorted(targets[chosen].tolist()) == [0, 1, 2, 3]
    assert torch.equal(chosen, choose(features, 4, seed=3))


@pytest.mark.parametrize("choose", [max_herding, typiclust])
@pytest.mark.parametrize("budget", [0, 9])
def test_a_budget_that_cannot_be_spent_is_refused(choose, budget):
    with pytest.raises(ValueError, match=f"{budget} images to choose among 8 without a label"):
        choose(blobs(2, 5)[0], budget, labeled=torch.tensor([1, 2]))
