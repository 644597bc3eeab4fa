"""The estimate of what pseudo-labels gain, against a naive version and where the answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lib.labels.gain import Gain
from lib.labels.split import Split
from lib.propagation import EmbeddingGraph, estimate_gain, propagate
from lib.propagation.choose import make_folds
from lib.propagation.gain import PENALTY


def task(features, targets, num_labeled):
    """A graph of points in the order of the labels, and the split whose first points are labeled."""
    labeled = torch.arange(num_labeled)
    split = Split(labeled, torch.arange(num_labeled, len(targets)))
    return EmbeddingGraph(features, num_neighbors=5), split, targets[labeled]


def blobs(spread, seed=0):
    rng = torch.Generator().manual_seed(seed)
    targets = torch.arange(60) % 3
    centers = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    return centers[targets] + spread * torch.randn(60, 4, generator=rng), targets


def fitted(features, examples):
    """Logistic regression by scipy in float64, from (image, class, weight); a function to classes."""
    center, scale = features.mean(0), features.var(0).mean().sqrt()
    images, classes, weights = zip(*examples, strict=True)
    x = ((features - center) / scale).double()[list(images)]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def loss(flat):
        flat = torch.from_numpy(flat).requires_grad_()
        matrix = flat.view(-1, 3)
        own = (x @ matrix[1:] + matrix[0]).log_softmax(1)[range(len(x)), list(classes)]
        total = PENALTY * matrix[1:].square().sum() - shares @ own
        total.backward()
        return total.item(), flat.grad.numpy()

    start = np.zeros(3 * (x.shape[1] + 1))
    best = torch.from_numpy(minimize(loss, start, jac=True, method="BFGS").x).view(-1, 3)
    return lambda rows: (((rows - center) / scale).double() @ best[1:] + best[0]).argmax(dim=1)


def naive(graph, split, labels, ratios, calibration):
    """Held-out accuracy by loops over images."""
    right, count = dict.fromkeys(ratios, 0), 0
    for out in make_folds(labels, 0):
        kept = [i for i in range(len(labels)) if i not in out.tolist()]
        fold = Split(split.labeled[kept], split.unlabeled)
        scores = propagate(graph, "poisson", fold, labels[kept], 3).scores
        margins, probabilities = {}, (scores / calibration).softmax(dim=1)
        for i in split.unlabeled.tolist():
            first, second = scores[i].topk(2).values
            margins[i] = -math.expm1(float(second - first))  # 1 - p2 / p1
        for ratio in ratios:
            true = zip(kept, fold.labeled.tolist(), strict=True)
            examples = [(i, int(labels[p]), 1 / len(kept)) for p, i in true]
            chosen = []
            for c in range(3):
                members = [i for i in split.unlabeled.tolist() if scores[i].argmax() == c]
                members.sort(key=margins.get, reverse=True)
                chosen += [(i, c) for i in members[: math.ceil(ratio * len(members) - 1e-9)]]
            total = sum(float(probabilities[i, c]) for i, c in chosen)
            examples += [(i, c, float(probabilities[i, c]) / total) for i, c in chosen]
            found = fitted(graph.features, examples)
            answers = found(graph.features[split.labeled[out]])
            right[ratio] += int((answers == labels[out]).sum())
        count += len(out)
    return {ratio: 100 * hits / count for ratio, hits in right.items()}


@pytest.mark.parametrize(("temperature", "calibration"), [(1.0, 0.5), (2.0, 0.25)])
def test_the_estimate_equals_a_naive_loop(temperature, calibration):
    graph, split, labels = task(*blobs(1.0), 15)
    given = {"temperature": temperature, "calibration": calibration, "confidence": "margin"}
    found = estimate_gain(graph, "poisson", split, labels, 3, ratios=(0.2, 1.0), **given)
    expected = naive(graph, split, labels, (0.0, 0.2, 1.0), 0.5)
    assert found.accuracy == pytest.approx(expected)
    assert len(set(expected.values())) == 3  # another one for every share
    assert found.num_held_out == 15


def arcs():
    """Two half circles, each a class, labeled here and there: only the graph tells them apart."""
    angle = torch.linspace(0, math.pi, 60)
    outer = torch.stack([angle.cos(), angle.sin()], dim=1)
    inner = torch.stack([1 - angle.cos(), 0.4 - angle.sin()], dim=1)
    points = torch.stack([outer, inner], dim=1).flatten(0, 1)
    return (-4 * torch.cdist(points, points[::6])).exp(), torch.arange(120) % 2


def test_pseudo_labels_gain_where_they_follow_the_shape_of_the_classes():
    features, targets = arcs()
    order = torch.tensor([0, 1, 20, 21, 60, 61, 118, 119])
    rest = torch.tensor([i for i in range(120) if i not in order.tolist()])
    order = torch.cat([order, rest])
    graph, split, labels = task(features[order], targets[order], 8)
    gain = estimate_gain(graph, "poisson", split, labels, 2)
    assert gain.ratio > 0
    assert gain.accuracy[gain.ratio] > gain.accuracy[0.0] + 5


def test_labels_alone_are_best_where_the_graph_says_nothing():
    features, targets = blobs(0.2)
    # a graph of points that have nothing to do with the classes
    other = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    graph, split, labels = task(features, targets, 24)
    misled = replace(graph, given=EmbeddingGraph(other, num_neighbors=5).affinity)
    gain = estimate_gain(misled, "poisson", split, labels, 3)
    assert gain.ratio == 0
    assert gain.accuracy.pop(0.0) == 100 > max(gain.accuracy.values())
    sound = estimate_gain(graph, "poisson", split, labels, 3)
    assert set(sound.accuracy.values()) == {100}


def test_nothing_is_estimated_where_no_label_can_be_held_out():
    graph, split, labels = task(*blobs(0.5), 3)
    assert estimate_gain(graph, "poisson", split, labels, 3) == Gain({}, 0)
