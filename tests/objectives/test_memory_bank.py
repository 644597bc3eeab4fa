"""The memory bank and its losses, against plain autograd and naive loops written from the formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.loading.batches import Batch
from lib.objectives import instance, memory_bank
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import (
    NCE,
    FullSoftmax,
    InfoNCE,
    MemoryBank,
    build_loss,
    others,
)
from lib.runtime.devices import Device
from lib.training.step import train_steps
from models.layers import l2_normalize

CPU = Device(torch.device("cpu"), bf16=False)


def unit(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=-1, keepdim=True)


def draw_negatives(own, k, images, seed, step):
    return others(*InfoNCE(k, 0.1, seed).draw(len(own), images, step), own)


def loss_of(criterion, v, own, memory, step, *, first=0, total=0):
    """The loss with its random numbers of batch `step`, from row `first` of `total` on."""
    drawn = criterion.draw(total or len(own), len(memory), step)
    mine = [numbers[first : first + len(own)] for numbers in drawn]
    return criterion(v, own, memory, *mine, total=total)


def assert_unit_rows(rows):
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-6)


def value_and_gradient(loss, v):
    v = v.clone().requires_grad_()
    value = loss(v)
    value.backward()
    return value.detach(), v.grad


@pytest.mark.parametrize("block", [1, 7, 64, 100, 8192])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_full_softmax_equals_plain_cross_entropy(monkeypatch, block, bf16, tolerance):
    monkeypatch.setattr(memory_bank._BankSoftmax, "block", block)
    v, memory, own = unit(9, 32), unit(100, 32, seed=1), torch.arange(9) * 11
    got, gradient = value_and_gradient(
        lambda x: loss_of(FullSoftmax(0.1, bf16), x, own, memory, 0), v
    )
    expected, naive = value_and_gradient(lambda x: F.cross_entropy(x @ memory.T / 0.1, own), v)
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (gradient - naive).norm() <= tolerance * naive.norm()


@given(
    batch=st.integers(1, 6),
    images=st.integers(2, 30),
    temperature=st.floats(0.02, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_full_softmax_equals_plain_cross_entropy_at_any_size(batch, images, temperature, seed):
    v, memory = unit(batch, 8, seed=seed), unit(images, 8, seed=seed + 1)
    own = torch.arange(batch) % images
    criterion = FullSoftmax(temperature)
    got, gradient = value_and_gradient(lambda x: loss_of(criterion, x, own, memory, 0), v)
    expected, naive = value_and_gradient(
        lambda x: F.cross_entropy((x.double() @ memory.double().T) / temperature, own), v
    )
    assert got.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert torch.allclose(gradient, naive.float(), rtol=1e-3, atol=1e-4)


def test_full_softmax_scales_its_gradient_and_does_not_overflow():
    v, memory, own = unit(4, 8), unit(50, 8, seed=1), torch.arange(4)
    memory[:4] = v
    criterion = FullSoftmax(0.001)  # logits of 1000: exp without a maximum is infinite
    value, gradient = value_and_gradient(lambda x: loss_of(criterion, x, own, memory, 0), v)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    criterion = FullSoftmax(0.1)
    _, once = value_and_gradient(lambda x: loss_of(criterion, x, own, memory, 0), v)
    _, thrice = value_and_gradient(lambda x: 3 * loss_of(criterion, x, own, memory, 0), v)
    assert torch.allclose(thrice, 3 * once)


def test_full_softmax_of_a_bank_that_knows_nothing_is_its_chance_level():
    memory = unit(1, 16).expand(200, 16)
    value = FullSoftmax(0.1)(unit(5, 16, seed=2), torch.arange(5), memory)
    assert value.item() == pytest.approx(FullSoftmax().chance(200), abs=1e-4)
    assert FullSoftmax().chance(200) == pytest.approx(math.log(200))


def naive_nce(v, own, memory, negatives, temperature, z):
    """The published formula, one image and one negative at a time."""
    n, k = len(memory), negatives.shape[1]
    total = torch.tensor(0.0, dtype=torch.float64)
    for i in range(len(v)):
        p = torch.exp(v[i] @ memory[own[i]] / temperature) / z
        loss = torch.log(p / (p + k / n + 1e-7))
        for j in negatives[i].tolist():
            q = torch.exp(v[i] @ memory[j] / temperature) / z
            loss = loss + torch.log((k / n) / (q + k / n + 1e-7))
        total = total - loss
    return total / len(v)


def naive_z(v, own, memory, negatives, temperature):
    """N mean(exp) over the positives and negatives of a batch."""
    rows = torch.cat([own[:, None], negatives], dim=1)
    values = [
        math.exp(float(v[i] @ memory[j]) / temperature)
        for i in range(len(v))
        for j in rows[i].tolist()
    ]
    return len(memory) * sum(values) / len(values)


# N below and above GATHER_COST * K: the two ways of taking the similarities
@pytest.mark.parametrize(("images", "k"), [(40, 12), (200, 5)])
@pytest.mark.parametrize("z_momentum", [None, 0.9])
def test_nce_equals_the_published_formula_and_normalizer(images, k, z_momentum):
    memory, criterion = unit(images, 16, seed=1), NCE(k, 0.2, seed=3, z_momentum=z_momentum)
    z = None
    for step in range(4):
        v, own = unit(6, 16, seed=10 + step), torch.arange(6) * 5 + step
        negatives = draw_negatives(own, k, images, 3, step)
        estimate = naive_z(v, own, memory, negatives, 0.2)
        if z is None:
            z = estimate
        elif z_momentum is not None:
            z = z_momentum * z + (1 - z_momentum) * estimate
        got, gradient = value_and_gradient(
            lambda x, own=own, step=step: loss_of(criterion, x, own, memory, step), v
        )
        expected, naive = value_and_gradient(
            lambda x, own=own, negatives=negatives, z=z: naive_nce(
                x.double(), own, memory.double(), negatives, 0.2, z
            ),
            v,
        )
        assert criterion.z.item() == pytest.approx(z, rel=1e-5)
        assert got.item() == pytest.approx(expected.item(), rel=1e-4)
        assert torch.allclose(gradient, naive.float(), rtol=1e-3, atol=1e-4)


# ImageNet's constants, and K / N as small as eps itself
@pytest.mark.parametrize(("images", "k"), [(1_281_167, 4096), (1_281_167, 1), (50_000, 4096)])
@pytest.mark.parametrize("cosine", [-0.9, -0.5, 0.0, 0.5, 0.99])
def test_nce_has_the_values_and_gradients_of_the_published_formula(images, k, cosine):
    torch.manual_seed(0)
    cosines = torch.cat([torch.tensor([cosine]), torch.rand(k) * 1.8 - 0.9]).double()
    z, noise = 1.9e6, k / images

    def published(x):
        p = torch.exp(x / 0.07) / z
        positive = torch.log(p[0] / (p[0] + noise + 1e-7))
        return -(positive + torch.log(noise / (p[1:] + noise + 1e-7)).sum())

    criterion = NCE(k, 0.07, 0, z_momentum=None).double()
    criterion.z.fill_(z)
    expected, wanted = value_and_gradient(published, cosines)
    got, gradient = value_and_gradient(
        lambda x: criterion.summed(x[None] / 0.07, images, 1), cosines
    )
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=0)


def test_nce_is_finite_where_the_published_formula_is_not():
    criterion, noise = NCE(1, 0.01, 0, z_momentum=None), 1 / 1000
    criterion.z.fill_(1.0)
    cosines = torch.tensor([-0.98, 0.97])
    p = torch.exp(cosines / 0.01)  # below and beyond float32: exp(-98) and exp(97)
    naive = torch.log(p[0] / (p[0] + noise + 1e-7)) + torch.log(noise / (p[1] + noise + 1e-7))
    assert not torch.isfinite(naive)
    value, gradient = value_and_gradient(
        lambda x: criterion.summed(x[None] / 0.01, 1000, 1), cosines
    )
    # log P - log(noise + eps) of the positive, log P - log(noise) of the negative, each with slope 1 / T
    assert value.item() == pytest.approx(98 + 97 + math.log((noise + 1e-7) / noise), rel=1e-4)
    assert gradient.tolist() == pytest.approx([-100, 100], rel=1e-5)


def test_the_published_normalizer_is_estimated_once_and_survives_a_resume():
    v, own, memory = unit(6, 16), torch.arange(6), unit(50, 16, seed=1)
    first = NCE(4, 0.1, seed=0, z_momentum=None)
    loss_of(first, v, own, memory, 0)
    resumed = NCE(4, 0.1, seed=0, z_momentum=None)
    resumed.load_state_dict(first.state_dict())
    later = unit(6, 16, seed=5)
    assert torch.equal(
        loss_of(first, later, own, memory, 1), loss_of(resumed, later, own, memory, 1)
    )
    fresh = NCE(4, 0.1, seed=0, z_momentum=None)
    assert not torch.equal(
        loss_of(fresh, later, own, memory, 1), loss_of(resumed, later, own, memory, 1)
    )


def test_evaluation_does_not_move_the_moving_average():
    v, own, memory = unit(6, 16), torch.arange(6), unit(50, 16, seed=1)
    criterion = NCE(4, 0.1, seed=0, z_momentum=0.5)
    loss_of(criterion, v, own, memory, 0)
    before = criterion.z.clone()
    loss_of(criterion.eval(), unit(6, 16, seed=9), own, memory, 1)
    assert torch.equal(criterion.z, before)
    loss_of(criterion.train(), unit(6, 16, seed=9), own, memory, 1)
    assert not torch.equal(criterion.z, before)


@pytest.mark.parametrize(("images", "k"), [(40, 12), (200, 5)])
def test_infonce_equals_cross_entropy_over_the_positive_and_the_negatives(images, k):
    memory, criterion = unit(images, 16, seed=1), InfoNCE(k, 0.1, seed=3)
    v, own = unit(6, 16), torch.arange(6) * 5
    negatives = draw_negatives(own, k, images, 3, 7)

    def naive(x):
        total = 0.0
        for i in range(len(x)):
            sims = [x[i] @ memory[j] / 0.1 for j in [int(own[i]), *negatives[i].tolist()]]
            total = total - sims[0] + torch.stack(sims).exp().sum().log()
        return total / len(x)

    got, gradient = value_and_gradient(lambda x: loss_of(criterion, x, own, memory, 7), v)
    expected, wanted = value_and_gradient(naive, v)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_chance_levels_are_the_losses_of_a_bank_that_knows_nothing():
    memory, v, own = unit(1, 16).expand(300, 16), unit(1, 16).expand(5, 16), torch.arange(5)
    nce, info = NCE(20, 0.5, 0, z_momentum=None), InfoNCE(20, 0.5, 0)
    # all similarities are equal, hence P = 1/N with the estimated Z
    assert loss_of(nce, v, own, memory, 0).item() == pytest.approx(nce.chance(300), rel=1e-5)
    assert loss_of(info, v, own, memory, 0).item() == pytest.approx(info.chance(300), rel=1e-5)


@given(images=st.integers(2, 6), k=st.integers(1, 30), step=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_nce_negatives_never_equal_the_positive(images, k, step):
    own = torch.arange(images)
    negatives = draw_negatives(own, k, images, 0, step)
    assert negatives.shape == (images, k)
    assert (negatives != own[:, None]).all()
    assert negatives.min() >= 0
    assert negatives.max() < images


@pytest.mark.parametrize("own", [0, 10, 20])
def test_negatives_are_uniform_over_all_other_images(own):
    counts = draw_negatives(torch.tensor([own]), 20 * 500, 21, 0, 0)[0].bincount(minlength=21)
    assert counts[own] == 0
    others = torch.cat([counts[:own], counts[own + 1 :]]).double()
    statistic = ((others - 500) ** 2 / 500).sum()
    assert statistic < 50.8  # 0.9999 quantile of chi-square with 19 degrees of freedom


def test_negatives_are_a_function_of_seed_and_step():
    own = torch.arange(4)
    first = draw_negatives(own, 30, 100, 0, 5)
    torch.rand(3)
    assert torch.equal(first, draw_negatives(own, 30, 100, 0, 5))
    assert not torch.equal(first, draw_negatives(own, 30, 100, 0, 6))
    assert not torch.equal(first, draw_negatives(own, 30, 100, 1, 5))


def test_one_image_has_no_negatives():
    with pytest.raises(ValueError, match="at least 2"):
        draw_negatives(torch.tensor([0]), 3, 1, 0, 0)


def test_bank_rows_start_and_stay_on_the_unit_sphere():
    bank = MemoryBank(60, 16, momentum=0.5, seed=0)
    assert_unit_rows(bank.memory)
    for step in range(5):
        indexes = torch.randperm(60)[:20]
        bank.update(indexes, unit(20, 16, seed=step))
        assert_unit_rows(bank.memory)


def test_bank_start_is_uniform_before_scaling_and_a_function_of_the_seed():
    bank = MemoryBank(4000, 8, seed=2)
    assert torch.equal(bank.memory, MemoryBank(4000, 8, seed=2).memory)
    assert not torch.equal(bank.memory, MemoryBank(4000, 8, seed=3).memory)
    assert bank.memory.mean(0).abs().max() < 0.02
    assert torch.allclose(bank.memory.T @ bank.memory / 4000, torch.eye(8) / 8, atol=0.02)
    # a cube seen from its center: the fourth moment lies below that of a round cloud, 3 / (D (D + 2))
    assert (bank.memory**4).mean() < 0.95 * 3 / 80


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_bank_update_is_the_published_formula(momentum):
    bank = MemoryBank(30, 8, momentum)
    expected, indexes, v = bank.memory.clone(), torch.tensor([7, 0, 29, 13]), unit(4, 8)
    for i, row in zip(indexes.tolist(), v, strict=True):
        mixed = momentum * expected[i] + (1 - momentum) * row
        expected[i] = mixed / mixed.norm()
    bank.update(indexes, v)
    assert torch.allclose(bank.memory, expected, atol=1e-6)


def test_bank_update_takes_bf16_embeddings_and_leaves_no_graph():
    bank = MemoryBank(30, 8)
    v = unit(4, 8).bfloat16().requires_grad_()
    bank.update(torch.arange(4), v)
    assert bank.memory.dtype == torch.float32
    assert not bank.memory.requires_grad
    assert_unit_rows(bank.memory)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0])
def test_an_impossible_bank_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum"):
        MemoryBank(10, 4, momentum)


CRITERIA = {
    "full": FullSoftmax(0.1),
    "nce": NCE(8, 0.1, 0, z_momentum=0.99),
    "infonce": InfoNCE(8, 0.1, 0),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_bank_is_not_updated_inside_backward(name):
    bank, v = MemoryBank(40, 16), unit(5, 16).requires_grad_()
    before = bank.memory.clone()
    loss_of(CRITERIA[name], v, torch.arange(5), bank.memory, 0).backward()
    assert torch.equal(bank.memory, before)
    assert v.grad.abs().sum() > 0


def test_accumulated_backwards_see_one_and_the_same_bank():
    bank, v = MemoryBank(40, 16), unit(6, 16)
    criterion, own = FullSoftmax(0.1), torch.arange(6)
    _, whole = value_and_gradient(lambda x: loss_of(criterion, x, own, bank.memory, 0), v)
    halves = v.clone().requires_grad_()
    for part in (slice(0, 3), slice(3, 6)):
        (loss_of(criterion, halves[part], own[part], bank.memory, 0) / 2).backward()
    assert torch.allclose(halves.grad, whole, atol=1e-6)


def test_bank_is_updated_after_the_optimizer_step_with_the_embeddings_of_the_batch():
    class Embed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(12, 8)

        def forward(self, images):
            return l2_normalize(self.linear(images.flatten(1)))

    model, bank = Embed(), MemoryBank(10, 8, momentum=0.5)
    start, weight = bank.memory.clone(), model.linear.weight.detach().clone()
    batch = Batch((torch.randn(4, 3, 2, 2),), torch.tensor([3, 1, 8, 6]), 0, 4)
    v = model(batch.images).detach()
    seen_by_optimizer = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen_by_optimizer.append(bank.memory.clone())
            return super().step(closure)

    optimizer = Watching(model.parameters(), lr=0.5)
    objective = InstanceDiscrimination(bank, FullSoftmax(0.1))
    steps = train_steps(model, objective, optimizer, [batch], lambda _: 0.5, CPU)
    assert len(list(steps)) == 1
    assert torch.equal(seen_by_optimizer[0], start)
    assert not torch.equal(model.linear.weight, weight)
    expected = start.clone()
    for i, row in zip(batch.indexes.tolist(), v, strict=True):
        mixed = (start[i] + row) / 2
        expected[i] = mixed / mixed.norm()
    assert torch.allclose(bank.memory, expected, atol=1e-6)


def test_the_rows_of_all_processes_move_in_the_bank_of_each(monkeypatch):
    others = {torch.int64: torch.tensor([5, 7]), torch.float32: unit(2, 8)}
    monkeypatch.setattr(
        instance, "all_gather_rows", lambda own, _: torch.cat([own, others[own.dtype]])
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    bank, optimizer = MemoryBank(10, 8), torch.optim.SGD(model.parameters(), lr=0.5)
    start = bank.memory.clone()
    batch = Batch((torch.randn(2, 3, 2, 2),), torch.tensor([3, 1]), 0, 4)
    objective = InstanceDiscrimination(bank, FullSoftmax(0.1))
    steps = train_steps(model, objective, optimizer, [batch], lambda _: 0.5, CPU)
    assert len(list(steps)) == 1
    moved = (bank.memory != start).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == [1, 3, 5, 7]


def test_build_loss_gives_what_the_options_describe():
    assert isinstance(build_loss(0, 0.1, bf16=True), FullSoftmax)
    assert build_loss(0, 0.1, bf16=True).bf16
    nce = build_loss(4096, 0.07, z_momentum=0.99, seed=5)
    assert isinstance(nce, NCE)
    assert (nce.k, nce.temperature, nce.z_momentum, nce.seed) == (4096, 0.07, 0.99, 5)
    assert isinstance(build_loss(16, 0.1, kind="infonce"), InfoNCE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"k": 0, "temperature": 0.0}, "temperature"),
        ({"k": -3, "temperature": 0.1}, "-3 negatives"),
        ({"k": 8, "temperature": 0.1, "kind": "triplet"}, "triplet"),
    ],
)
def test_impossible_losses_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        build_loss(**words)


@pytest.mark.parametrize("name", ["full", "infonce"])
@pytest.mark.parametrize("cuts", [(3,), (1, 1, 5), (0, 7)], ids=str)
def test_the_parts_of_a_batch_add_up_to_its_mean_loss(name, cuts):
    memory, v, own = MemoryBank(40, 16).memory, unit(7, 16), torch.arange(7) * 5
    whole, gradient = value_and_gradient(lambda x: loss_of(CRITERIA[name], x, own, memory, 3), v)
    bounds = [0, *torch.tensor(cuts).cumsum(0).tolist(), 7]
    total, parts = 0.0, []
    for first, stop in itertools.pairwise(bounds):
        rows, where = slice(first, stop), {"first": first, "total": 7}
        part, own_gradient = value_and_gradient(
            lambda x, rows=rows, where=where: loss_of(
                CRITERIA[name], x, own[rows], memory, 3, **where
            ),
            v[rows],
        )
        total += part
        parts.append(own_gradient)
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(torch.cat(parts), gradient, atol=1e-6)


@pytest.mark.parametrize("k", [0, 8])
def test_a_process_without_rows_adds_nothing_to_the_loss(k):
    memory, v = MemoryBank(40, 16).memory, torch.zeros(0, 16, requires_grad=True)
    criterion = build_loss(k, 0.1, kind="infonce")
    value = loss_of(criterion, v, torch.arange(0), memory, 0, total=1)
    assert value.item() == 0
    value.backward()
    assert v.grad.shape == (0, 16)


def test_a_bank_of_doubles_keeps_their_precision():
    bank = MemoryBank(30, 8).double()
    v = unit(4, 8).double()
    expected = torch.nn.functional.normalize((bank.memory[:4] + v) / 2, dim=1)
    bank.update(torch.arange(4), v)
    torch.testing.assert_close(bank.memory[:4], expected, rtol=1e-14, atol=1e-14)
