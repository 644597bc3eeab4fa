"""Batch order: a function of the seed and the step, nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.loading.batches import Stream, num_batches, permutation
from lib.runtime.seeding import PURPOSES, generator

sizes = st.integers(1, 40)


@given(n=sizes, batch_size=sizes, seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_epoch_of_a_stream_is_a_permutation(n, batch_size, seed):
    stream = Stream(n, batch_size, seed)
    batches = [stream.batch(step) for step in range(2 * n)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    visited = torch.cat(batches)
    for epoch in range(len(visited) // n):
        order = visited[epoch * n : (epoch + 1) * n]
        assert torch.equal(order.sort().values, torch.arange(n))
        assert torch.equal(order, permutation(n, seed, epoch))


@given(n=sizes, batch_size=sizes, steps=st.lists(st.integers(0, 200), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_batch_k_does_not_depend_on_what_was_drawn_before(n, batch_size, steps):
    used = Stream(n, batch_size, seed=3)
    for step in steps:
        batch = used.batch(step)
        torch.rand(5)  # nor on the global random numbers
        assert torch.equal(batch, Stream(n, batch_size, seed=3).batch(step))


def test_a_set_smaller_than_the_batch_repeats_inside_full_batches():
    batch = Stream(10, 128, seed=0).batch(0)
    assert batch.shape == (128,)
    counts = batch.bincount(minlength=10)
    assert counts.min() >= 12
    assert counts.max() <= 13


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [permutation(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (4, 0)])
def test_a_stream_of_nothing_is_refused(n, batch_size):
    with pytest.raises(ValueError, match="cannot draw batches"):
        Stream(n, batch_size, 0)


@given(n=st.integers(1, 1000), batch_size=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_number_of_batches_counts_the_short_last_one(n, batch_size):
    assert num_batches(n, batch_size) == len(torch.arange(n).split(batch_size))


def test_random_numbers_differ_by_seed_purpose_and_address():
    streams = [
        torch.rand(4, generator=generator(seed, purpose, address)).tolist()
        for seed in (0, 1)
        for purpose in PURPOSES
        for address in (0, 1)
    ]
    assert len({tuple(s) for s in streams}) == len(streams)


def test_random_numbers_ignore_the_global_generator_and_leave_it_alone():
    first = torch.rand(4, generator=generator(5, "order", 2))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(4, generator=generator(5, "order", 2)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_purpose_or_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="tuple"):
        generator(0, "nonsense")
    with pytest.raises(ValueError, match="non-negative"):
        generator(-1, "order")
