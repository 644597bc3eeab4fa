"""Learning rates: closed forms at named steps, the published recipes, nothing to restore."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.training.optimizer import (
    ETA_MIN,
    IMAGENET_FINETUNE_DROPS,
    IMAGENET_INSTANCE_DROPS,
    SCHEDULES,
    learning_rate,
)

STEPS_PER_EPOCH = 7


def rates_by_epoch(name, epochs, base=1.0):
    return [learning_rate(name, base=base, total=epochs)(epoch) for epoch in range(epochs)]


def test_cosine_has_its_closed_form():
    rate = learning_rate("cosine", base=0.03, total=400)
    assert rate(0) == pytest.approx(0.03)
    assert rate(100) == pytest.approx(ETA_MIN + (0.03 - ETA_MIN) * (1 + math.sqrt(0.5)) / 2)
    assert rate(200) == pytest.approx((0.03 + ETA_MIN) / 2)
    assert rate(400) == pytest.approx(ETA_MIN)
    assert rate(399) == pytest.approx(ETA_MIN, abs=1e-6)


def test_eta_min_is_the_published_one():
    assert ETA_MIN == 1e-5


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(200, (60, 120, 160)), (600, (180, 360, 480, 560))]
)
@pytest.mark.parametrize("steps_per_epoch", [1, 391])
def test_multi_step_drops_at_the_published_milestones(epochs, milestones, steps_per_epoch):
    total = epochs * steps_per_epoch
    rate = learning_rate("multi-step", base=1.0, total=total, steps_per_epoch=steps_per_epoch)
    for passed, milestone in enumerate(milestones, 1):
        first = milestone * steps_per_epoch
        assert rate(first - 1) == pytest.approx(0.2 ** (passed - 1))
        assert rate(first) == pytest.approx(0.2**passed)
    assert rate(total - 1) == pytest.approx(0.2 ** len(milestones))


@given(epochs=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_multi_step_works_at_any_number_of_epochs(epochs):
    rates = rates_by_epoch("multi-step", epochs)
    assert all(b <= a for a, b in itertools.pairwise(rates))
    assert set(rates) <= {0.2**n for n in range(5)}
    if epochs >= 10:
        assert rates[0] == 1.0
        assert rates[-1] == pytest.approx(0.2 ** (4 if epochs == 600 else 3))


def test_cosine_with_restart_is_seven_whole_cycles_in_1270_epochs():
    rates = rates_by_epoch("cosine-with-restart", 1270)
    starts = [epoch for epoch, rate in enumerate(rates) if rate == 1.0]
    assert starts == [0, 10, 30, 70, 150, 310, 630]
    for start, length in zip(starts, (10, 20, 40, 80, 160, 320, 640), strict=True):
        assert rates[start + length // 2] == pytest.approx((1 + ETA_MIN) / 2)
        cycle = rates[start : start + length]
        assert cycle == sorted(cycle, reverse=True)


def test_the_last_epoch_of_the_1270_recipe_is_near_eta_min_not_at_full_rate():
    steps = STEPS_PER_EPOCH
    rate = learning_rate(
        "cosine-with-restart", base=0.03, total=1270 * steps, steps_per_epoch=steps
    )
    assert rate(1270 * steps - 1) == pytest.approx(ETA_MIN, rel=0.01)
    assert rate(1269 * steps) < 2e-5
    # the published code lets the rate fall to zero, because it passes last_epoch for T_max
    assert min(rate(step) for step in range(1270 * steps)) >= ETA_MIN


@pytest.mark.parametrize("name", SCHEDULES)
@given(total=st.integers(1, 3000), steps_per_epoch=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_no_schedule_ever_gives_zero_or_more_than_the_base(name, total, steps_per_epoch):
    rate = learning_rate(name, base=0.1, total=total, steps_per_epoch=steps_per_epoch)
    for step in {*range(0, total, max(1, total // 100)), total - 1}:
        assert ETA_MIN <= rate(step) <= 0.1 + 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_stepped_per_iteration_the_rate_never_alternates(name):
    total = 70 * STEPS_PER_EPOCH
    rate = learning_rate(name, base=1.0, total=total, steps_per_epoch=STEPS_PER_EPOCH)
    rates = [rate(step) for step in range(total)]
    rises = sum(b > a for a, b in itertools.pairwise(rates))
    turns = sum(
        (b > a) != (c > b) for a, b, c in zip(rates, rates[1:], rates[2:], strict=False) if b != c
    )
    # two restarts, or one warm-up; lr, 0, lr, 0 would turn at each of the 490 steps
    assert turns <= 8
    assert rises <= (0.31 * total if name == "one-cycle" else 2)


@pytest.mark.parametrize("name", ["cosine", "cosine-with-restart", "one-cycle"])
def test_an_epoch_schedule_counts_epochs_not_iterations(name):
    by_epoch = learning_rate(name, base=1.0, total=300)
    by_step = learning_rate(name, base=1.0, total=300 * 10, steps_per_epoch=10)
    for epoch in (0, 1, 9, 10, 29, 30, 90, 150, 299):
        assert by_step(epoch * 10) == pytest.approx(by_epoch(epoch), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_gives_the_rates_of_an_uninterrupted_one(name):
    words = {"base": 0.1, "total": 900, "steps_per_epoch": 9}
    whole, before, after = (learning_rate(name, **words) for _ in range(3))
    uninterrupted = [whole(step) for step in range(900)]
    for k in (1, 90, 457, 899):
        resumed = [before(step) for step in range(k)]
        resumed += [after(step) for step in range(k, 900)]
        assert resumed == uninterrupted


def test_one_cycle_rises_for_three_tenths_and_then_falls_to_eta_min():
    rate = learning_rate("one-cycle", base=0.1, total=1000)
    assert rate(0) == pytest.approx(0.1 / 25)
    assert rate(150) == pytest.approx((0.1 + 0.1 / 25) / 2)
    assert rate(300) == pytest.approx(0.1)
    assert rate(650) == pytest.approx((0.1 + ETA_MIN) / 2)
    assert rate(999) == pytest.approx(ETA_MIN, rel=0.2)


def published_rates(name, epochs):
    """The rate of each epoch, as a scheduler gives it that is stepped once before each of them."""
    rates, start, length = [], 0, 10
    for epoch in range(epochs):
        if name == "multi-step":
            rates.append(0.03 * 0.2 ** sum(epoch >= passed for passed in (60, 120, 160)))
            continue
        if name == "cosine":
            length = epochs
        elif epoch - start == length:
            start, length = epoch, 2 * length
        turn = math.pi * (epoch - start) / length
        rates.append(1e-5 + 0.5 * (0.03 - 1e-5) * (1 + math.cos(turn)))
    return rates


@pytest.mark.parametrize("name", ["cosine", "cosine-with-restart", "multi-step"])
def test_phase_1_holds_the_published_rate_of_an_epoch_through_all_its_steps(name):
    words = {"base": 0.03, "total": 200 * 391, "steps_per_epoch": 391}
    rate = learning_rate(name, **words, by_epoch=True)
    for epoch, published in enumerate(published_rates(name, 200)):
        within = {rate(step) for step in range(391 * epoch, 391 * (epoch + 1))}
        assert list(within) == [pytest.approx(published, rel=1e-12)]


def test_one_cycle_changes_at_every_step_in_phase_1_too():
    words = {"name": "one-cycle", "base": 0.03, "total": 90, "steps_per_epoch": 9}
    one, other = learning_rate(**words), learning_rate(**words, by_epoch=True)
    assert [one(step) for step in range(90)] == [other(step) for step in range(90)]


@pytest.mark.parametrize("max_iters", [7, 14, 100, 50_000, 70_000, 123_456])
def test_imagenet_finetuning_drops_at_the_published_whole_steps(max_iters):
    rate = learning_rate("multi-step", 1.0, max_iters, drops=IMAGENET_FINETUNE_DROPS)
    drops = [step for step in range(1, max_iters) if rate(step) < rate(step - 1)]
    assert drops == [max_iters * 3 // 7, max_iters * 6 // 7]


@pytest.mark.parametrize(("epochs", "milestones"), [(200, (120, 160)), (100, (60, 80))])
def test_imagenet_pretraining_scales_its_drops_with_the_length(epochs, milestones):
    lengths = epochs * 5004, 5004
    rate = learning_rate("multi-step", 0.03, *lengths, IMAGENET_INSTANCE_DROPS, by_epoch=True)
    rates = [rate(epoch * 5004) for epoch in range(epochs)]
    assert rates == [
        pytest.approx(0.03 * 0.1 ** sum(e >= m for m in milestones)) for e in range(epochs)
    ]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
def test_no_drop_comes_before_its_share_of_a_short_run(epochs):
    lengths = epochs * 391, 391
    rate = learning_rate("multi-step", 1.0, *lengths, IMAGENET_INSTANCE_DROPS, by_epoch=True)
    for epoch in range(epochs):
        passed = sum(epoch >= share * epochs for share in (0.6, 0.8))
        assert rate(epoch * 391) == rate(epoch * 391 + 390) == pytest.approx(0.1**passed)


def test_an_unknown_schedule_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"step-wise.*multi-step.*cosine-with-restart"):
        learning_rate("step-wise", base=0.1, total=10)


@pytest.mark.parametrize(
    ("drops", "total", "milestones"),
    [
        (IMAGENET_FINETUNE_DROPS, 50000, (50000 * 3 // 7, 50000 * 6 // 7)),
        (IMAGENET_INSTANCE_DROPS, 200, (120, 160)),
    ],
    ids=["finetuning", "instance discrimination"],
)
def test_imagenet_drops_to_a_tenth_at_its_published_places(drops, total, milestones):
    rate = learning_rate("multi-step", base=1.0, total=total, drops=drops)
    for passed, milestone in enumerate(milestones, 1):
        assert rate(milestone - 1) == pytest.approx(0.1 ** (passed - 1))
        assert rate(milestone) == pytest.approx(0.1**passed)
    assert rate(total - 1) == pytest.approx(0.01)


def test_drops_leave_the_other_schedules_alone():
    for name in ("cosine", "cosine-with-restart", "one-cycle"):
        one, other = (
            learning_rate(name, base=1.0, total=90, drops=drops)
            for drops in (None, IMAGENET_FINETUNE_DROPS)
        )
        assert [one(step) for step in range(90)] == [other(step) for step in range(90)]
