"""Objectives over several views of an image, against loops, determinants and closed forms."""

import math

import pytest
import torch
from torch import nn

from lib.loading.batches import Batch
from lib.objectives.coding_rate import ManyPatches, total_coding_rate
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.objectives.two_view import TwoViews
from lib.runtime.devices import Device

CPU = Device(torch.device("cpu"), bf16=False)


def batch_of(num_images: int, views: int, total: int = 0) -> Batch:
    pixels = tuple(torch.randn(num_images, 3, 2, 2).double() for _ in range(views))
    return Batch(pixels, torch.arange(num_images), 0, total or num_images)


def flat_network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width)).double()


def projected(objective, network, batch):
    """Unit vectors by view and image, one after the other where the head has no BatchNorm."""
    rows = [[objective.head(network(x[None]))[0] for x in view] for view in batch.pixels]
    return [[z.detach() / z.norm().detach() for z in view] for view in rows]


def test_two_views_have_the_loss_of_a_naive_loop():
    network, batch = flat_network(6).requires_grad_(False), batch_of(5, 2)
    objective = TwoViews(6, CPU, temperature=0.3, batch_size=5).double()
    a, b = projected(objective, network, batch)
    every = [*a, *b]
    total = 0.0
    for i, z in enumerate(every):
        positive = every[(i + 5) % 10]
        others = sum(math.exp(z @ other / 0.3) for j, other in enumerate(every) if j != i)
        total -= math.log(math.exp(z @ positive / 0.3) / others)
    assert objective(network, batch)[0]["loss"].item() == pytest.approx(total / 10)


def test_two_views_know_nothing_where_all_projections_are_equal():
    objective = TwoViews(6, CPU, temperature=0.5, batch_size=7).double()
    network = lambda images: torch.ones(len(images), 6).double()  # noqa: E731
    loss = objective(network, batch_of(7, 2))[0]["loss"]
    assert loss.item() == pytest.approx(objective.chance) == pytest.approx(math.log(13))


def test_two_views_of_a_single_image_have_nothing_to_learn():
    objective = TwoViews(6, CPU, temperature=0.5, batch_size=7).double()
    network = flat_network(6)
    loss = objective(network, batch_of(1, 2))[0]["loss"]
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert network[1].weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("count", "dim"), [(3, 8), (8, 3), (6, 6), (1, 4)])
def test_coding_rate_is_half_the_logarithm_of_the_determinant(count, dim):
    z = torch.randn(2, count, dim).double()
    for rows, rate in zip(z, total_coding_rate(z, eps=0.3), strict=True):
        whole = torch.eye(dim).double() + dim / (count * 0.3) * rows.T @ rows
        assert float(rate) == pytest.approx(float(whole.det().log() / 2))


def test_coding_rate_of_orthogonal_images_and_of_none():
    rate = total_coding_rate(torch.eye(4, 10).double(), eps=0.2)
    assert float(rate) == pytest.approx(4 / 2 * math.log(1 + 10 / (4 * 0.2)))
    assert float(total_coding_rate(torch.empty(3, 0, 10)).sum()) == 0


def test_many_patches_have_the_loss_of_a_naive_loop():
    network, batch = flat_network(6), batch_of(5, 3)
    objective = ManyPatches(6, CPU, views=3).double()
    with torch.no_grad():  # BatchNorm sees all patches of all images together
        rows = objective.head(network(torch.cat(batch.pixels))).view(3, 5, -1)
    z = rows / rows.norm(dim=2, keepdim=True)
    similarity = rate = 0.0
    for patch in z:
        whole = torch.eye(1024).double() + 1024 / (5 * 0.2) * patch.T @ patch
        rate += float(torch.linalg.slogdet(whole).logabsdet) / 2 / 3
        for image, vector in enumerate(patch):
            mean = z[:, image].mean(dim=0)
            similarity += float(vector @ mean / mean.norm()) / 15
    found, _ = objective(network, batch)
    assert float(found["similarity"]) == pytest.approx(similarity)
    assert float(found["coding_rate"]) == pytest.approx(rate)
    assert float(found["loss"]) == pytest.approx(200 * (1 - similarity) - rate)


@pytest.mark.parametrize("kind", [TwoViews, ManyPatches])
def test_a_process_without_rows_adds_nothing_and_has_gradients_of_zero(kind):
    words = {"views": 4} if kind is ManyPatches else {"temperature": 0.5, "batch_size": 9}
    objective = kind(6, CPU, **words).double()
    network = flat_network(6)
    found, _ = objective(network, batch_of(0, objective.views, total=9))
    found["loss"].backward()
    assert {name: float(value) for name, value in found.items()} == dict.fromkeys(found, 0.0)
    gradients = [p.grad for p in (*objective.parameters(), *network.parameters())]
    assert all(g is not None and not g.any() for g in gradients)


def test_the_head_keeps_no_statistics_and_counts_its_products():
    objective = ManyPatches(6, CPU, views=3)
    assert not list(objective.buffers())
    products = 6 * 4096 + 4096 * 4096 + 4096 * 1024
    assert objective.flops_per_image() == 3 * 2 * 3 * products


def test_one_view_cannot_be_compared():
    with pytest.raises(ValueError, match=r"1 views: .* 2 at least"):
        ManyPatches(6, CPU, views=1)


@pytest.mark.parametrize("k", [0, 4])
def test_the_bank_compares_every_view_and_moves_by_their_mean(k):
    torch.manual_seed(0)
    network, bank = flat_network(8), MemoryBank(6, 8).double()
    loss = build_loss(k, 0.2, kind="infonce")
    objective = InstanceDiscrimination(bank, loss, views=3)
    batch = batch_of(4, 3)
    drawn = loss.draw(4, 6, 0)
    batch = Batch(batch.pixels, torch.tensor([2, 5, 0, 1]), 0, 4, drawn=drawn)
    found, kept = objective(network, batch)
    rows = [network(view).detach() for view in batch.pixels]
    each = [float(loss(v, batch.indexes, bank.memory, *drawn, total=4)) for v in rows]
    assert found["loss"].item() == pytest.approx(sum(each) / 3)
    expected = bank.memory.clone()
    for place, index in enumerate(batch.indexes.tolist()):
        mixed = (expected[index] + sum(view[place] for view in rows) / 3) / 2
        expected[index] = mixed / mixed.norm()
    objective.after_step([kept])
    torch.testing.assert_close(bank.memory, expected)
    assert objective.flops_per_image() == 3 * loss.flops(6, 8)
