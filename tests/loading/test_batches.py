"""Batches: a function of the seed and the step, every image once an epoch, its own rows.

The same holds for images in memory and in files, for any number of processes and of workers, and for both
loaders.
"""

import os
import random
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_datasets
from datasets.files import FileSet, read_image
from datasets.images import ImageSet
from datasets.transforms import (
    Augmentation,
    PadCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    finetune_ops,
    instance_ops,
)
from lib.loading.batches import LOADERS, Batches, in_order
from lib.runtime.devices import Device
from lib.runtime.distributed import shard_of
from lib.runtime.seeding import generator

CPU = Device(torch.device("cpu"), bf16=False)
STATS = ((0.0,) * 3, (1.0,) * 3)


def numbered(n=23, size=8):
    """Image i is everywhere of value i, so that a batch tells which images are in it."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, size, size)
    return ImageSet("numbered", images.contiguous(), torch.arange(n) % 3, ("a", "b", "c"), STATS)


def noisy(n=23):
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return ImageSet("noisy", images, torch.zeros(n).long(), ("a",), STATS)


def batches_of(data, ops=(), batch_size=5, seed=0, num_workers=0, loader="device"):
    words = {"batch_size": batch_size, "seed": seed, "num_workers": num_workers, "loader": loader}
    return Batches(data, Augmentation(ops, STATS), CPU, **words)


@pytest.fixture(scope="module")
def in_files(tmp_path_factory):
    """Thirteen noisy pictures of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(13):
        pixels = rng.integers(0, 256, (24 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
    paths = tuple(f"{i:02d}.png" for i in range(13))
    return FileSet("files", root, paths, torch.arange(13) % 2, ("a", "b"), STATS, 16)


@pytest.fixture(params=["memory", "files"])
def data(request):
    return request.getfixturevalue("in_files") if request.param == "files" else noisy(13)


@pytest.fixture(params=LOADERS)
def loader(request):
    return request.param


def as_rank(monkeypatch, rank, size):
    monkeypatch.setattr("lib.loading.batches.shard", lambda n: shard_of(n, rank, size))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.indexes, other.indexes)
        assert (batch.first, batch.total) == (other.first, other.total)


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


def test_a_batch_reached_from_another_start_is_the_same(loader):
    data, indexes = noisy(), torch.tensor([2, 3, 5, 7, 11, 13, 17])
    words = {"ops": instance_ops(), "loader": loader}
    straight = list(batches_of(data, **words).repeat(indexes, 0, 12))
    resumed = list(batches_of(data, **words).repeat(indexes, 8, 12))
    for batch, again in zip(straight[8:], resumed, strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.indexes, again.indexes)
        assert torch.equal(batch.positions, again.positions)
    epochs = batches_of(data, **words)
    list(epochs.epoch(0))
    for batch, again in zip(epochs.epoch(3), batches_of(data, **words).epoch(3), strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.indexes, again.indexes)


def test_the_last_batch_of_an_epoch_and_the_first_of_the_next_are_augmented_differently(loader):
    data = noisy(10)
    data.images[:] = data.images[0]
    batches = batches_of(data, [PadCrop()], 5, loader=loader)
    seen = [b.images for e in (0, 1) for b in batches.epoch(e)]
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            assert not torch.equal(a, b)


def test_stream_positions_point_into_the_given_indexes():
    indexes = torch.tensor([20, 4, 9])
    for batch in batches_of(numbered()).repeat(indexes, 0, 9):
        assert batch.indexes.shape == (5,)
        assert torch.equal(indexes[batch.positions], batch.indexes)
        assert torch.equal(values(batch), batch.indexes)


def test_seeds_give_other_orders_and_other_augmentation(loader):
    data = noisy()
    seeded = [batches_of(data, finetune_ops(), seed=s, loader=loader) for s in (0, 1)]
    one, two = (next(batches.epoch(0)) for batches in seeded)
    assert not torch.equal(one.indexes, two.indexes)
    one, two = (next(batches.repeat(torch.arange(5), 0, 1)) for batches in seeded)
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


def test_an_impossible_batch_size_and_an_unknown_loader_are_refused():
    with pytest.raises(ValueError, match="batch size 0"):
        batches_of(numbered(), batch_size=0)
    with pytest.raises(ValueError, match="unknown loader 'gpu': take one of device, workers"):
        batches_of(numbered(), loader="gpu")


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_can_be_entered_at_any_batch(data, first, loader):
    whole = list(batches_of(data, instance_ops(), loader=loader).epoch(2))
    assert len(whole) == 3
    assert_same(batches_of(data, instance_ops(), loader=loader).epoch(2, first), whole[first:])


@pytest.mark.parametrize("share", [{}, {"labeled": 2, "share": 0.4}], ids=["plain", "shared"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_rows_of_all_processes_make_up_the_batch_of_one(data, size, share, loader, monkeypatch):
    indexes = torch.tensor([1, 4, 6, 12, 7])
    batches = batches_of(data, instance_ops(), loader=loader)
    stream = partial(batches.repeat, indexes, 1, 4, **share)
    whole, streamed = list(batches.epoch(1)), list(stream())
    epochs, streams = [], []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        epochs.append(list(batches.epoch(1)))
        streams.append(list(stream()))
    for batch, parts in zip(whole, zip(*epochs, strict=True), strict=True):
        assert torch.equal(torch.cat([part.indexes for part in parts]), batch.indexes)
        assert torch.allclose(torch.cat([part.images for part in parts]), batch.images, atol=1e-5)
        assert {part.total for part in parts} == {len(batch.indexes)} == {batch.total}
        lengths = torch.tensor([len(part.indexes) for part in parts])
        assert [part.first for part in parts] == [0, *lengths.cumsum(0)[:-1].tolist()]
    for batch, parts in zip(streamed, zip(*streams, strict=True), strict=True):
        assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions)
        assert torch.equal(torch.cat([part.indexes for part in parts]), batch.indexes)
        images = torch.cat([part.images for part in parts])
        assert torch.allclose(images, batch.images, atol=1e-5)
        for part in parts:
            assert torch.equal(indexes[part.positions], part.indexes)


@pytest.mark.parametrize("size", [2, 3, 20])
def test_each_image_is_evaluated_by_one_process_and_in_order(data, size, monkeypatch):
    augmentation = Augmentation((), STATS)
    whole = torch.cat([batch.images for batch in in_order(data, augmentation, CPU)])
    indexes, images = [], []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        for batch in in_order(data, augmentation, CPU, batch_size=4):
            assert (batch.first, batch.total) == (int(batch.indexes[0]), len(data))
            assert len(batch.indexes) <= 4
            indexes.append(batch.indexes)
            images.append(batch.images)
    assert torch.equal(torch.cat(indexes), torch.arange(len(data)))
    assert torch.equal(torch.cat(images), whole)


def test_images_in_files_are_cropped_by_the_rows_of_their_step(in_files):
    ops = [RandomResizedCrop(0.2), RandomGrayscale(0.5), RandomHorizontalFlip()]
    steps = batches_of(in_files, ops, seed=3)
    for place, batch in enumerate(steps.epoch(2)):
        step = 2 * steps.per_epoch + place
        crops, *rows = Augmentation(ops, STATS).sample_params(
            batch.total, generator(3, "augmentation", step)
        )
        for k, (image, index) in enumerate(zip(batch.images, batch.indexes, strict=True)):
            data = (in_files.root / in_files.paths[index]).read_bytes()
            expected = read_image(data, 16, crops[k].tolist())[None] / 255
            for op, values in zip(ops[1:], rows, strict=True):
                expected = op(expected, values[k : k + 1])
            assert torch.allclose(image, expected[0], atol=1e-6)


def test_images_in_files_without_a_crop_start_from_the_central_view(in_files):
    (batch,) = batches_of(in_files, [RandomHorizontalFlip()], batch_size=13).epoch(0)
    central = torch.cat([b.images for b in in_order(in_files, Augmentation((), STATS), CPU)])
    for image, index in zip(batch.images, batch.indexes, strict=True):
        turned = [torch.equal(image, x) for x in (central[index], central[index].flip(2))]
        assert any(turned)


@pytest.mark.parametrize(
    ("held", "loader"), [("files", "device"), ("files", "workers"), ("memory", "workers")]
)
def test_the_number_of_workers_changes_nothing(in_files, held, loader):
    data = in_files if held == "files" else noisy(13)
    before = torch.get_rng_state(), random.getstate()
    alone, helped = (
        batches_of(data, instance_ops(), 3, num_workers=n, loader=loader) for n in (0, 2)
    )
    assert_same(helped.epoch(0), alone.epoch(0))
    abandoned = helped.epoch(1)
    next(abandoned)
    assert_same(helped.epoch(4, first=1), alone.epoch(4, first=1))  # what was ahead is forgotten
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert helped.waited_s > 0


def test_views_that_are_augmented_alike_share_their_workers_and_are_the_same(data, loader):
    one = Augmentation(instance_ops(), STATS)
    words = {"batch_size": 5, "num_workers": 2, "loader": loader}
    shared = Batches(data, [one] * 3, CPU, **words)
    apart = Batches(data, [one, Augmentation(instance_ops(), STATS), one], CPU, **words)
    assert (len(shared._views), len(apart._views)) == (1, 2)
    for ours, theirs in zip(shared.epoch(1), apart.epoch(1), strict=True):
        assert len(ours.views) == 3
        assert torch.equal(ours.stacked, torch.cat(theirs.views))
        assert not torch.equal(ours.views[0], ours.views[2])


def test_the_number_of_workers_does_not_change_what_is_evaluated(in_files):
    plain = Augmentation((), STATS)
    assert_same(in_order(in_files, plain, CPU, 4, 1), in_order(in_files, plain, CPU, 4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_epoch_with_its_path_and_index(
    num_workers, loader, tmp_path
):
    for i in range(6):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    paths = tuple(f"{i}.png" for i in range(6))
    data = FileSet("files", tmp_path, paths, torch.zeros(6).long(), ("a",), STATS, 16)
    batches = batches_of(data, instance_ops(), 2, num_workers=num_workers, loader=loader)
    with pytest.raises(ValueError, match=rf"image 4, {tmp_path}/4\.png: ") as caught:
        list(batches.epoch(0))
    assert "1 images of a batch" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_augmenting_is_no_waiting_for_images(data, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lib.loading.batches.time.perf_counter", lambda: now[0])

    def augment(images, rows):
        now[0] += 5
        return images.float()

    batches = batches_of(data, instance_ops(), 5)
    (view,) = batches._views

    def slowly(jobs):
        for item in view.source(jobs):
            now[0] += 1
            yield item

    batches._views = [view._replace(source=slowly, remaining=augment)]
    assert len(list(batches.epoch(0))) == batches.waited_s


def test_a_worker_that_is_killed_ends_the_epoch_with_a_message(in_files):
    batches = batches_of(in_files, instance_ops(), 1, num_workers=1)
    epoch = batches.epoch(0)
    next(epoch)
    (worker,) = batches._views[0].source.loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ValueError, match="a process that reads images has ended"):
        list(epoch)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_workers_outlast_the_signals_that_end_a_run_after_its_step(in_files):
    batches = batches_of(in_files, instance_ops(), 1, num_workers=1)
    epoch = batches.epoch(0)
    next(epoch)
    (worker,) = batches._views[0].source.loader._iterator._workers
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(epoch)) == 12


def test_dummy_images_are_made_on_the_fly_for_any_number(tmp_path):
    data, test = build_datasets("dummy", tmp_path / "nowhere", image_size=8)
    assert len(data.images) < len(data) == 50000
    assert data.num_classes == 1000
    assert data.has_all_targets
    assert data.digest != test.digest
    assert build_datasets("dummy", "", image_size=8)[0].digest == data.digest
    batch = next(batches_of(data, (), 300).epoch(0))
    expected = torch.stack([data[i][0] for i in batch.indexes.tolist()]) / 255
    assert torch.equal(batch.images, expected)


def test_every_view_shows_the_same_images_and_the_first_is_that_of_one_view():
    data, chain = noisy(), [PadCrop(), RandomHorizontalFlip()]
    augmentations = [
        Augmentation(chain, STATS),
        Augmentation(chain, STATS),
        Augmentation((), STATS),
    ]
    several = Batches(data, augmentations, CPU, batch_size=5)
    for batch, alone in zip(several.epoch(1), batches_of(data, chain).epoch(1), strict=True):
        assert torch.equal(batch.indexes, alone.indexes)
        assert torch.equal(batch.images, alone.images)
        assert not torch.equal(batch.views[1], batch.views[0])  # random numbers of its own
        plain = data.images[batch.indexes] / 255
        assert torch.allclose(batch.views[2], plain)
    assert len(batch.views) == 3


def test_views_of_files_are_read_with_random_numbers_of_their_own(in_files):
    crop = Augmentation([RandomResizedCrop(0.2)], STATS)
    for number_of_workers in (0, 2):
        batches = Batches(in_files, [crop, crop], CPU, batch_size=7, num_workers=number_of_workers)
        found = [batch for epoch in (0, 1) for batch in batches.epoch(epoch)]
        assert [len(batch.indexes) for batch in found] == [7, 6, 7, 6]
        alone = Batches(in_files, crop, CPU, batch_size=7)
        for batch, other in zip(found, (b for e in (0, 1) for b in alone.epoch(e)), strict=True):
            assert torch.equal(batch.images, other.images)
            assert not torch.equal(batch.views[1], batch.images)


def test_streams_with_one_seed_have_an_order_and_random_numbers_of_their_own():
    data, indexes = noisy(), torch.arange(23)
    plain, crop = Augmentation((), STATS), Augmentation([PadCrop()], STATS)
    first, second = (Batches(data, plain, CPU, batch_size=5, stream=s) for s in (0, 1))
    orders = [torch.cat([b.indexes for b in s.repeat(indexes, 0, 4)]) for s in (first, second)]
    assert not torch.equal(*orders)
    data.images[:] = data.images[0]  # so that only the crop tells batches apart
    crops = [
        next(Batches(data, crop, CPU, batch_size=5, stream=s).repeat(indexes, 3, 4)).images
        for s in (0, 1)
    ]
    assert not torch.equal(*crops)
    again = next(Batches(data, crop, CPU, batch_size=5, stream=1).repeat(indexes, 3, 4)).images
    assert torch.equal(crops[1], again)


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 7)])
def test_a_share_of_every_batch_are_labeled_images_each_as_often_as_the_others(share, expected):
    indexes, labeled = torch.arange(22, 2, -1), 3
    batches = Batches(noisy(), Augmentation((), STATS), CPU, batch_size=8)
    found = [b.positions for b in batches.repeat(indexes, 0, 51, labeled=labeled, share=share)]
    assert {int((p < labeled).sum()) for p in found} == {expected}
    seen = torch.bincount(torch.cat(found), minlength=len(indexes))
    for part in (seen[:labeled], seen[labeled:]):
        assert part.max() - part.min() <= 1
    places = torch.stack(found) < labeled
    assert places.any(dim=0).all()  # and not always in the rows of one process
    first = [b.positions for b in batches.repeat(indexes, 40, 51, labeled=labeled, share=share)]
    assert all(map(torch.equal, first, found[40:]))


@pytest.mark.parametrize("labeled", [0, 20])
def test_where_all_or_none_are_labeled_a_share_changes_nothing(labeled):
    indexes = torch.arange(20)
    batches = Batches(noisy(), Augmentation((), STATS), CPU, batch_size=8)
    shared = batches.repeat(indexes, 0, 5, labeled=labeled, share=0.5)
    for one, other in zip(shared, batches.repeat(indexes, 0, 5), strict=True):
        assert torch.equal(one.positions, other.positions)
