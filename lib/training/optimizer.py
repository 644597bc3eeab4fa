"""The published optimizer, the choice of its parameters, and its learning rates.

Learning rates are pure functions of the step, without any state to save: each schedule maps (step, total
steps, base rate) to a rate; `step` counts optimizer steps from 0. As published, phase 1 changes the rate
between epochs and phase 3 at every step.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

ETA_MIN = 1e-5
ROUNDING = 1e-6  # of a product of steps
TRUST = 0.005  # largest step of LARS, as a share of the norm of the weights
OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("multi-step", "cosine", "cosine-with-restart", "one-cycle")


@dataclass(frozen=True)
class Drops:
    """The milestones of `multi-step`, as fractions of the whole run, and its factor at each of them."""

    milestones: tuple[float, ...]
    gamma: float


# Published are milestones of runs of one length (60/120/160 of 200 epochs); other lengths scale them.
CIFAR_DROPS = Drops((0.3, 0.6, 0.8), 0.2)
CIFAR_600_DROPS = Drops((180 / 600, 360 / 600, 480 / 600, 560 / 600), 0.2)
IMAGENET_INSTANCE_DROPS = Drops((120 / 200, 160 / 200), 0.1)
IMAGENET_FINETUNE_DROPS = Drops((3 / 7, 6 / 7), 0.1)


class LARS(torch.optim.SGD):
    """SGD with a rate for each matrix of weights (You et al. 2017, arXiv 1708.03888), for large batches.

    With decay the gradient of a matrix w is g + decay w. It is scaled down to the length that makes the
    step at most `TRUST` |w|, and never up: the rate is min(lr, TRUST |w| / (|g| + decay |w|)), as in LARC.
    Biases and the parameters of normalizations follow plain SGD, without decay.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            weights = [w for w in group["params"] if w.grad is not None and w.ndim > 1]
            gradients = [w.grad for w in weights]
            if not weights:
                continue
            sizes, lengths = (torch.stack(torch._foreach_norm(x)) for x in (weights, gradients))
            trusted = TRUST * sizes / (lengths + decay * sizes)
            scales = torch.where(trusted > 0, trusted / group["lr"], 1).clamp(max=1)
            torch._foreach_add_(gradients, weights, alpha=decay)
            torch._foreach_mul_(gradients, list(scales))
        loss = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return loss


def sgd(
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    kind: str = "sgd",
    decay_all: bool = True,
) -> Optimizer:
    """Build the published SGD, momentum 0.9 and Nesterov's for small images, or another of `OPTIMIZERS`.

    It is fused: one kernel updates all parameters, to the same bits as a loop over them. `decay_all` of False
    keeps weight decay off biases and the parameters of normalizations.
    """
    given = list(parameters)
    groups: list[dict[str, Any]] = [{"params": given}]
    if not decay_all:
        groups = [{"params": [p for p in given if p.ndim > 1]}]
        groups += [{"params": [p for p in given if p.ndim <= 1], "weight_decay": 0.0}]
    decay = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    return (LARS if kind == "lars" else torch.optim.SGD)(groups, lr=lr, fused=True, **decay)


def trainable(model: nn.Module, *, head_only: bool) -> list[nn.Parameter]:
    """Return the parameters to optimize; with `head_only` the others are frozen and get no gradient."""
    if head_only:
        model.requires_grad_(False)
        getattr(model, model.head_name).requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def cosine(step: int, total: int, base: float, eta_min: float = ETA_MIN) -> float:
    """Return a half cosine from `base` at step 0 to `eta_min` at `total` (Loshchilov & Hutter 2017)."""
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * min(step / total, 1))) / 2


def multi_step(step: int, total: int, base: float, drops: Drops) -> float:
    """Return `base` times `gamma` for each milestone that is passed."""
    # rounded down as published; a product such as 3 / 7 * 7 may lie one bit below its whole number
    passed = sum(step >= math.floor(m * total + ROUNDING) for m in drops.milestones)
    return base * drops.gamma**passed


def cosine_with_restart(step: int, first_cycle: int, base: float) -> float:
    """Return cosine cycles of `first_cycle` steps, then twice as many, and so on (SGDR).

    The published 1270 epochs are exactly seven cycles of 10, 20, ... 640 epochs, which end at `ETA_MIN`.
    """
    length = first_cycle
    while step >= length:
        step, length = step - length, length * 2
    return cosine(step, length, base)


def one_cycle(step: int, total: int, base: float) -> float:
    """Return a half cosine up from base / 25 during 30% of the steps, then down (Smith 2018)."""
    peak = max(1, round(0.3 * total))
    if step < peak:
        return base / 25 + (base - base / 25) * (1 - math.cos(math.pi * step / peak)) / 2
    return cosine(step - peak, max(1, total - peak), base)


def learning_rate(
    name: str,
    base: float,
    total: int,
    steps_per_epoch: int = 1,
    drops: Drops | None = None,
    *,
    by_epoch: bool = False,
    warmup: int = 0,
) -> Callable[[int], float]:
    """Return a schedule over `total` optimizer steps, at most `base`, as a function of the step.

    Args:
        name: one of `SCHEDULES`.
        steps_per_epoch: the first cycle of `cosine-with-restart` lasts 10 epochs, and `multi-step` has its
            own milestones at 600 epochs.
        drops: milestones of `multi-step`; None takes the published ones of CIFAR.
        by_epoch: whether an epoch has the rate of its first step throughout; `one-cycle`, which is not
            published, changes it at every step anyway.
        warmup: steps over which the rate rises to that of the schedule.

    Raises:
        ValueError: if the name is unknown.
    """
    if drops is None:
        drops = CIFAR_600_DROPS if total / steps_per_epoch == 600 else CIFAR_DROPS
    first_cycle = 10 * steps_per_epoch
    choices: dict[str, Callable[[int], float]] = {
        "cosine": partial(cosine, total=total, base=base),
        "multi-step": partial(multi_step, total=total, base=base, drops=drops),
        "cosine-with-restart": partial(cosine_with_restart, first_cycle=first_cycle, base=base),
        "one-cycle": partial(one_cycle, total=total, base=base),
    }
    if name not in choices:
        raise ValueError(f"unknown schedule {name!r}: take one of {', '.join(SCHEDULES)}")
    held = steps_per_epoch if by_epoch and name != "one-cycle" else 1  # steps with one rate
    rising = lambda step: min(1.0, (step + 1) / (warmup + 1))  # noqa: E731
    return lambda step: rising(step) * choices[name](step - step % held)
