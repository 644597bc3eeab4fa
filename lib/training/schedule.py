"""Learning rates as pure functions of the step: nothing to step, nothing to save, nothing to forget.

Each schedule maps (step, total steps, base rate) to a rate; `step` counts optimizer steps from 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

ETA_MIN = 1e-5
SCHEDULES = ("multi-step", "cosine", "cosine-with-restart", "one-cycle")


@dataclass(frozen=True)
class Drops:
    """Where `multi-step` lowers the rate, as fractions of the whole run, and by what factor each time."""

    milestones: tuple[float, ...]
    gamma: float


# 60/120/160 of 200 epochs is published, and what other lengths get; 600 epochs have their own.
CIFAR_DROPS = Drops((0.3, 0.6, 0.8), 0.2)
CIFAR_600_DROPS = Drops((180 / 600, 360 / 600, 480 / 600, 560 / 600), 0.2)
IMAGENET_INSTANCE_DROPS = Drops((120 / 200, 160 / 200), 0.1)
IMAGENET_FINETUNE_DROPS = Drops((3 / 7, 6 / 7), 0.1)


def cosine(step: int, total: int, base: float, eta_min: float = ETA_MIN) -> float:
    """Half a cosine from `base` at step 0 toward `eta_min` at `total` (Loshchilov & Hutter 2017)."""
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * min(step / total, 1))) / 2


def multi_step(
    step: int,
    total: int,
    base: float,
    milestones: Sequence[float] = CIFAR_DROPS.milestones,
    gamma: float = CIFAR_DROPS.gamma,
) -> float:
    """`base`, times `gamma` from each milestone (a fraction of `total`) on."""
    # rounded, because 0.6 * 200 is 120.00000000000001 or 119.99999999999999 as it happens
    passed = sum(step >= round(m * total) for m in milestones)
    return base * gamma**passed


def cosine_with_restart(
    step: int, first_cycle: int, base: float, eta_min: float = ETA_MIN, factor: int = 2
) -> float:
    """Cosine cycles of `first_cycle` steps, then `factor` times as many, and so on (SGDR).

    1270 epochs are exactly seven cycles of 10, 20, ... 640 epochs: a run of that length ends at the
    bottom of a cycle, at `eta_min`.
    """
    length = first_cycle
    while step >= length:
        step, length = step - length, length * factor
    return cosine(step, length, base, eta_min)


def one_cycle(
    step: int, total: int, base: float, warmup: float = 0.3, eta_min: float = ETA_MIN
) -> float:
    """Half a cosine up from base / 25 over the share `warmup`, then down to `eta_min` (Smith 2018)."""
    peak = max(1, round(warmup * total))
    if step < peak:
        return base / 25 + (base - base / 25) * (1 - math.cos(math.pi * step / peak)) / 2
    return cosine(step - peak, max(1, total - peak), base, eta_min)


def learning_rate(
    name: str,
    *,
    base: float,
    total: int,
    steps_per_epoch: int = 1,
    drops: Drops | None = None,
) -> Callable[[int], float]:
    """The schedule `name` over `total` steps as a function of the step.

    Args:
        name: one of `SCHEDULES`.
        base: the highest rate.
        total: optimizer steps of the whole run.
        steps_per_epoch: steps of one epoch, for the schedules whose length is told in epochs: the
            first cycle of `cosine-with-restart` lasts 10 epochs, `multi-step` has its own milestones
            at 600 epochs.
        drops: of `multi-step`; the published ones of CIFAR where none are given.

    Raises:
        ValueError: for an unknown name.
    """
    if drops is None:
        drops = CIFAR_600_DROPS if total / steps_per_epoch == 600 else CIFAR_DROPS
    choices: dict[str, Callable[[int], float]] = {
        "cosine": partial(cosine, total=total, base=base),
        "multi-step": partial(
            multi_step, total=total, base=base, milestones=drops.milestones, gamma=drops.gamma
        ),
        "cosine-with-restart": partial(
            cosine_with_restart, first_cycle=10 * steps_per_epoch, base=base
        ),
        "one-cycle": partial(one_cycle, total=total, base=base),
    }
    if name not in choices:
        raise ValueError(f"unknown schedule {name!r}: take one of {', '.join(SCHEDULES)}")
    return choices[name]
