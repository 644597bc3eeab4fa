"""Batches: a function of the seed and the step, every image once an epoch, its own rows."""

import pytest
import torch

from datasets.images import ImageSet
from datasets.transforms import Augmentation, PadCrop, finetune_ops, instance_ops
from lib.devices import Compute
from lib.loader import Batches, in_order

CPU = Compute(torch.device("cpu"), bf16=False)
STATS = ((0.0,) * 3, (1.0,) * 3)


def numbered(n=23, size=8):
    """Image i is everywhere of value i, so that a batch tells which images are in it."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, size, size)
    return ImageSet("numbered", images.contiguous(), torch.arange(n) % 3, ("a", "b", "c"), STATS)


def noisy(n=23):
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return ImageSet("noisy", images, torch.zeros(n).long(), ("a",), STATS)


def batches_of(data, ops=(), batch_size=5, seed=0):
    return Batches(data, Augmentation(ops, STATS), CPU, batch_size=batch_size, seed=seed)


def values(batch):
    return (batch.images[:, 0, 0, 0] * 255).round().long()


def test_an_epoch_visits_every_image_once_the_short_last_batch_included():
    batches = batches_of(numbered())
    epoch = list(batches.epoch(4))
    assert [len(batch.indexes) for batch in epoch] == [5, 5, 5, 5, 3]
    assert len(epoch) == batches.per_epoch
    indexes = torch.cat([batch.indexes for batch in epoch])
    assert torch.equal(indexes.sort().values, torch.arange(23))
    for batch in epoch:
        assert torch.equal(values(batch), batch.indexes)


def test_a_batch_reached_from_another_start_is_the_same():
    data, indexes = noisy(), torch.tensor([2, 3, 5, 7, 11, 13, 17])
    straight = list(batches_of(data, instance_ops()).stream(indexes, 0, 12))
    resumed = list(batches_of(data, instance_ops()).stream(indexes, 8, 12))
    for (batch, positions), (again, again_positions) in zip(straight[8:], resumed, strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.indexes, again.indexes)
        assert torch.equal(positions, again_positions)
    epochs = batches_of(data, instance_ops())
    list(epochs.epoch(0))
    for batch, again in zip(
        epochs.epoch(3), batches_of(data, instance_ops()).epoch(3), strict=True
    ):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.indexes, again.indexes)


def test_the_last_batch_of_an_epoch_and_the_first_of_the_next_are_augmented_differently():
    data = noisy(10)
    data.images[:] = data.images[0]
    seen = [b.images for e in (0, 1) for b in batches_of(data, [PadCrop()], 5).epoch(e)]
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            assert not torch.equal(a, b)


def test_stream_positions_point_into_the_given_indexes():
    indexes = torch.tensor([20, 4, 9])
    for batch, positions in batches_of(numbered()).stream(indexes, 0, 9):
        assert batch.indexes.shape == (5,)
        assert torch.equal(indexes[positions], batch.indexes)
        assert torch.equal(values(batch), batch.indexes)


def test_seeds_give_other_orders_and_other_augmentation():
    data = noisy()
    one, two = (next(batches_of(data, finetune_ops(), seed=s).epoch(0)) for s in (0, 1))
    assert not torch.equal(one.indexes, two.indexes)
    chosen = torch.arange(5)
    one, two = (batches_of(data, finetune_ops(), seed=s).at(chosen, 0) for s in (0, 1))
    assert not torch.equal(one.images, two.images)


def test_in_order_gives_every_image_its_own_row():
    data = numbered()
    seen = list(in_order(data, Augmentation((), STATS), CPU, batch_size=10))
    assert [len(batch.indexes) for batch in seen] == [10, 10, 3]
    for batch in seen:
        assert torch.equal(values(batch), batch.indexes)
    assert torch.equal(torch.cat([batch.indexes for batch in seen]), torch.arange(23))


def test_evaluation_must_not_augment():
    with pytest.raises(AssertionError, match="must not augment"):
        next(in_order(numbered(), Augmentation(finetune_ops(), STATS), CPU))


def test_an_impossible_batch_size_is_refused():
    with pytest.raises(ValueError, match="batch size 0"):
        batches_of(numbered(), batch_size=0)
