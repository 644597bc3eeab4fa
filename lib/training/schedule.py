"""Learning rates as pure functions of the step, without any state to save.

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
    """The milestones of `multi-step`, as fractions of the whole run, and its factor at each of them."""

    milestones: tuple[float, ...]
    gamma: float


# Published are 60/120/160 of 200 epochs, which other lengths use too; 600 epochs have their own milestones.
CIFAR_DROPS = Drops((0.3, 0.6, 0.8), 0.2)
CIFAR_600_DROPS = Drops((180 / 600, 360 / 600, 480 / 600, 560 / 600), 0.2)
IMAGENET_INSTANCE_DROPS = Drops((120 / 200, 160 / 200), 0.1)
IMAGENET_FINETUNE_DROPS = Drops((3 / 7, 6 / 7), 0.1)


def cosine(step: int, total: int, base: float, eta_min: float = ETA_MIN) -> float:
    """Return a half cosine from `base` at step 0 to `eta_min` at `total` (Loshchilov & Hutter 2017)."""
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * min(step / total, 1))) / 2


def multi_step(
    step: int,
    total: int,
    base: float,
    milestones: Sequence[float] = CIFAR_DROPS.milestones,
    gamma: float = CIFAR_DROPS.gamma,
) -> float:
    """Return `base` times `gamma` for each milestone (a fraction of `total`) that is passed."""
    # rounding is needed, because products such as 0.6 * 200 may be off by one bit
    passed = sum(step >= round(m * total) for m in milestones)
    return base * gamma**passed


def cosine_with_restart(
    step: int, first_cycle: int, base: float, eta_min: float = ETA_MIN, factor: int = 2
) -> float:
    """Return cosine cycles of `first_cycle` steps, then `factor` times as many, and so on (SGDR).

    The published 1270 epochs are exactly seven cycles of 10, 20, ... 640 epochs, which end at `eta_min`.
    """
    length = first_cycle
    while step >= length:
        step, length = step - length, length * factor
    return cosine(step, length, base, eta_min)


def one_cycle(
    step: int, total: int, base: float, warmup: float = 0.3, eta_min: float = ETA_MIN
) -> float:
    """Return a half cosine up from base / 25 during the fraction `warmup`, then down (Smith 2018)."""
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
    """Return the schedule `name` over `total` steps as a function of the step.

    Args:
        name: one of `SCHEDULES`.
        base: highest rate.
        total: optimizer steps of the whole run.
        steps_per_epoch: steps of one epoch: the first cycle of `cosine-with-restart` lasts 10 epochs, and
            `multi-step` has its own milestones at 600 epochs.
        drops: milestones of `multi-step`; None takes the published ones of CIFAR.

    Raises:
        ValueError: if the name is unknown.
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
