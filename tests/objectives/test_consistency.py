"""Consistency training against a loop over images, and closed forms of its parts."""

import math

import pytest
import torch
from torch import nn

from lib.loading.batches import Batch
from lib.objectives.consistency import (
    GRAPH_SHARE,
    GRAPH_UNTIL,
    MOMENTUM,
    UNLABELED_WEIGHT,
    Consistency,
    cut_mix,
)

NUM_CLASSES, LABELED, RATIO = 3, 4, 2


def images(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=rng, dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, NUM_CLASSES)).double()


def objective(**words):
    torch.manual_seed(1)
    posteriors = torch.rand(20, NUM_CLASSES).double().softmax(dim=1)
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    words = {"ratio": RATIO, "num_batches": 100} | words
    return Consistency(labels, posteriors, **words).double()


def batch_of(made, place=3, total=LABELED):
    views = images(LABELED * RATIO, 1), images(LABELED * RATIO, 2)
    positions = torch.tensor([7, 3, 19, 0, 11, 2, 5, 8])
    others = Batch(views, positions + 50, 0, total * RATIO, positions)
    drawn = made.draw(total, place)
    own = torch.tensor([5, 0, 3, 1])
    return Batch((images(LABELED, 0),), own + 9, 0, total, own, drawn=drawn, unlabeled=others)


def cross_entropy(logits, label):
    return float(logits.logsumexp(0) - logits[label])


@pytest.mark.parametrize("kind", ["softmatch", "freematch"])
def test_the_loss_is_that_of_a_naive_loop(kind):
    made, net = objective(weights=kind), network().requires_grad_(False)
    batch = batch_of(made)
    prior, before = made.mean_probabilities.clone(), float(made.mean_confidence)
    spread = float(made.confidence_variance)
    found, _ = made(net, batch)
    supervised = 0.0
    for image, position in zip(batch.images, batch.positions.tolist(), strict=True):
        supervised += cross_entropy(net(image[None])[0], int(made.labels[position])) / LABELED

    weak, strong = batch.unlabeled.views
    own = net(weak).softmax(dim=1)
    prior = MOMENTUM * prior + (1 - MOMENTUM) * own.mean(dim=0)
    share = GRAPH_SHARE * (1 - 3 / 100 / GRAPH_UNTIL)
    confidences, targets = [], []
    for row, position in zip(own, batch.unlabeled.positions.tolist(), strict=True):
        aligned = (row / prior) / (row / prior).sum()
        target = share * made.posteriors[position] + (1 - share) * aligned
        targets.append(int(target.argmax()))
        confidences.append(float(target.max()))
    n = len(targets)
    mean = sum(confidences) / n
    variance = sum((c - mean) ** 2 for c in confidences) / (n - 1)
    mean = MOMENTUM * before + (1 - MOMENTUM) * mean
    variance = MOMENTUM * spread + (1 - MOMENTUM) * variance
    weights = [math.exp(-(min(c - mean, 0) ** 2) / (2 * variance / 4)) for c in confidences]
    if kind == "freematch":
        thresholds = [mean * float(prior[t] / prior.max()) for t in targets]
        weights = [float(c >= t) for c, t in zip(confidences, thresholds, strict=True)]
    boxes = batch.drawn[0].reshape(n, 3)
    consistency = 0.0
    for i in range(n):
        j = i ^ 1
        stays, y, x = boxes[i].tolist()
        half = math.sqrt(1 - stays) * 6 / 2
        mixed, taken = weak[i].clone(), 0
        for row in range(6):
            for column in range(6):
                if abs(row + 0.5 - y * 6) < half and abs(column + 0.5 - x * 6) < half:
                    mixed[:, row, column] = weak[j, :, row, column]
                    taken += 1
        part = 1 - taken / 36
        logits = net(mixed[None])[0]
        loss = part * weights[i] * cross_entropy(logits, targets[i])
        loss += (1 - part) * weights[j] * cross_entropy(logits, targets[j])
        loss += weights[i] * cross_entropy(net(strong[i][None])[0], targets[i])
        consistency += loss / 2 / n
    measured = {name: float(value) for name, value in found.items()}
    assert measured["supervised"] == pytest.approx(supervised)
    assert measured["consistency"] == pytest.approx(consistency)
    assert measured["loss"] == pytest.approx(supervised + UNLABELED_WEIGHT * consistency)
    assert measured["weight"] == pytest.approx(sum(weights) / n)
    assert measured["used"] == pytest.approx(100 * sum(w > 0.5 for w in weights) / n)


def test_no_gradient_reaches_a_target():
    made, net = objective(), network()
    batch = batch_of(made)
    weak, _ = batch.unlabeled.views
    weak.requires_grad_(True)
    boxes = batch.drawn[0].clone()
    boxes[..., 0] = 1.0  # nothing is mixed in
    batch = Batch(**(vars(batch) | {"drawn": (boxes, batch.drawn[1])}))
    found, _ = made(net, batch)
    assert not found["consistency"].requires_grad
    found["loss"].backward()
    assert weak.grad.abs().sum() > 0  # through the mixed view, which is the weak one here


@pytest.mark.parametrize(("place", "share"), [(0, 0.9), (20, 0.45), (40, 0.0), (99, 0.0)])
def test_the_share_of_the_graph_falls_to_zero(place, share):
    boxes, drawn = objective().draw(5, place)
    assert boxes.shape == (5, RATIO, 3)
    assert drawn.tolist() == pytest.approx([share] * 5)
    again = objective().draw(5, place)[0]
    assert torch.equal(boxes, again)
    assert not torch.equal(boxes, objective().draw(5, place + 1)[0])


def test_the_first_means_are_those_of_the_graph():
    made = objective()
    torch.testing.assert_close(
        made.mean_probabilities, made.posteriors.mean(dim=0), check_dtype=False
    )
    assert float(made.mean_confidence) == pytest.approx(
        float(made.posteriors.amax(dim=1).mean()), 1e-6
    )
    kept = {"mean_probabilities", "mean_confidence", "confidence_variance"}
    assert made.state_dict().keys() == kept  # labels and posteriors come from their files


@pytest.mark.parametrize(("stays", "share"), [(1.0, 1.0), (0.0, 0.0), (0.75, 0.75)])
def test_a_box_of_the_neighbor_takes_its_share_of_the_area(stays, share):
    pictures = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    boxes = torch.tensor([[stays, 0.5, 0.5]]).expand(4, 3)
    mixed, own, partner = cut_mix(pictures, boxes)
    assert partner.tolist() == [1, 0, 3, 2]
    assert own.tolist() == pytest.approx([share] * 4)
    for i, j in enumerate(partner.tolist()):
        assert (mixed[i] == i).float().mean().item() == pytest.approx(share)
        assert ((mixed[i] == i) | (mixed[i] == j)).all()


def test_the_last_image_of_an_odd_number_is_mixed_with_itself_and_none_with_none():
    _, _, partner = cut_mix(torch.randn(3, 3, 8, 8), torch.full((3, 3), 0.5))
    assert partner.tolist() == [1, 0, 2]
    assert cut_mix(torch.empty(0, 3, 8, 8), torch.empty(0, 3))[0].shape == (0, 3, 8, 8)
