"""LARS against a loop over single numbers; plain SGD where it must be one."""

import math

import pytest
import torch

from lib.training.optimizer import TRUST, sgd


def parameters():
    rng = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (2, 3, 3, 3), (5,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=rng).double()) for shape in shapes]


def with_gradients(weights, step):
    rng = torch.Generator().manual_seed(step)
    for k, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=rng).double() * 10.0 ** (k - 1)
    return [weight.grad.flatten().tolist() for weight in weights]


@pytest.mark.parametrize("rate", [0.3, 1e-4])
@pytest.mark.parametrize("nesterov", [True, False])
def test_lars_steps_are_those_of_a_naive_loop(rate, nesterov):
    weights, decay = parameters(), 0.01
    optimizer = sgd(weights, rate, decay, nesterov=nesterov, kind="lars")
    naive = [weight.detach().flatten().tolist() for weight in weights]
    momenta = [None] * len(naive)
    for step in range(3):
        gradients = with_gradients(weights, step)
        optimizer.step()
        for k, (w, g) in enumerate(zip(naive, gradients, strict=True)):
            if weights[k].ndim > 1:
                norm = math.sqrt(sum(x * x for x in w))
                length = math.sqrt(sum(x * x for x in g)) + decay * norm
                scale = min(1, TRUST * norm / length / rate)
                g = [(x + decay * y) * scale for x, y in zip(g, w, strict=True)]
            m = momenta[k]
            m = g if m is None else [0.9 * x + y for x, y in zip(m, g, strict=True)]
            momenta[k] = m
            moved = [y + 0.9 * x for x, y in zip(m, g, strict=True)] if nesterov else m
            naive[k] = [x - rate * y for x, y in zip(w, moved, strict=True)]
            assert weights[k].flatten().tolist() == pytest.approx(naive[k], rel=1e-9)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay]


def test_lars_takes_weights_of_zero_and_gradients_of_zero():
    zero, still = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = sgd([zero, still], 0.1, 0.0, momentum=0.0, nesterov=False, kind="lars")
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_the_published_optimizer_is_plain_sgd():
    assert type(sgd(parameters(), 0.1, 0.0)) is torch.optim.SGD
