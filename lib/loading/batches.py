"""Augmented batches of a data set; each process gets its own rows of every batch.

There are two loaders. `device` augments whole batches on the device (datasets/transforms.py): images lie
there as bytes, or workers read them from files. `workers` augments one image at a time in worker processes
(datasets/pil.py), as published.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from datasets import DataSet
from datasets.pil import PilReader
from datasets.transforms import Augmentation
from lib.loading.sources import FromWorkers, Job, Source, from_memory
from lib.runtime.devices import Device
from lib.runtime.distributed import shard
from lib.runtime.seeding import address, generator

LOADERS = ("device", "workers")
FILES_AT_ONCE = 100  # images that a worker hands over together in evaluation: 15 MB at 224 pixels

Remaining = Callable[[Tensor, Sequence[Tensor]], Tensor]  # augmentation that is left to the device


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> Tensor:
    """Return the order in which epoch `epoch` of a stream visits n items: int64, shape (n,)."""
    return torch.randperm(n, generator=generator(seed, "order", *address(epoch, stream)))


def num_batches(n: int, batch_size: int) -> int:
    """Count the batches of one epoch, a short last one included."""
    return -(-n // batch_size)


class Stream:
    """An endless series of full batches from concatenated permutations of n items, maybe fewer than a batch.

    Batch `step` depends on (n, batch_size, seed, stream, step) alone.
    """

    def __init__(self, n: int, batch_size: int, seed: int, stream: int = 0) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"cannot draw batches of {batch_size} from {n} images")
        self.n, self.batch_size = n, batch_size
        # the order is only cached: neighboring steps share an epoch
        self._order = lru_cache(maxsize=1)(partial(permutation, n, seed, stream=stream))

    def batch(self, step: int) -> Tensor:
        """Return the positions of the items of batch `step`: int64, shape (batch_size,)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            count = min(stop - start, self.n - offset)
            pieces.append(self._order(epoch)[offset : offset + count])
            start += count
        return torch.cat(pieces)


@dataclass(frozen=True)
class Batch:
    """This process's B rows of a batch, on the device; B may be 0 in a short batch of many processes.

    Everything that a training step reads is in these tensors, whose shapes depend on B alone: a step that
    was captured as a CUDA graph is repeated with the next batch copied into them.
    """

    pixels: tuple[Tensor, ...]  # images of each view as they were read, B x C x S x S
    indexes: Tensor  # into the data set
    first: int  # place of the first of these rows among those of all processes
    total: int  # rows of all processes
    positions: Tensor | None = None  # places of the rows in the list that a stream repeats
    params: tuple[tuple[Tensor, ...], ...] = ()  # random numbers of each view's augmentation
    augmentations: tuple[Remaining, ...] = ()  # of each view; none if the pixels are views already
    drawn: tuple[Tensor, ...] = ()  # random numbers of the objective (`Objective.draw`)
    unlabeled: "Batch | None" = None  # other images of the same step, without labels

    @property
    def views(self) -> tuple[Tensor, ...]:
        """Augmented views of the same images, each B x C x S x S float32; computed whenever they are read."""
        return tuple(map(self._view, range(len(self.pixels))))

    @property
    def images(self) -> Tensor:
        """The first view; computed whenever it is read."""
        return self._view(0)

    @property
    def stacked(self) -> Tensor:
        """All V views one below the other, V B x C x S x S; computed whenever it is read."""
        return torch.cat(self.views) if len(self.pixels) > 1 else self.images

    def _view(self, number: int) -> Tensor:
        if not self.augmentations:
            return self.pixels[number]
        with record_function("images"):
            return self.augmentations[number](self.pixels[number], self.params[number])

    @property
    def tensors(self) -> list[Tensor]:
        positions = [] if self.positions is None else [self.positions]
        params = itertools.chain.from_iterable(self.params)
        others = [] if self.unlabeled is None else self.unlabeled.tensors
        return [*self.pixels, self.indexes, *positions, *params, *self.drawn, *others]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `function` of every tensor in its place."""
        several = lambda tensors: tuple(map(function, tensors))  # noqa: E731
        return replace(
            self,
            pixels=several(self.pixels),
            indexes=function(self.indexes),
            positions=None if self.positions is None else function(self.positions),
            params=tuple(map(several, self.params)),
            drawn=several(self.drawn),
            unlabeled=None if self.unlabeled is None else self.unlabeled.map(function),
        )


class _Plan(NamedTuple):  # a whole batch before its images are read
    indexes: Tensor
    step: int
    positions: Tensor | None = None


class _Views(NamedTuple):  # the way to the images of views that are augmented alike
    numbers: list[int]
    draw: Callable[[int, torch.Generator], list[Tensor]]
    source: Source
    remaining: Remaining


class _Read(NamedTuple):  # a view of a batch whose images are read
    job: Job
    pixels: Tensor
    remaining: Remaining


def _seeds(n: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(2**63 - 1, (n,), generator=generator)]


def _channels_last(images: Tensor, _: Sequence[Tensor]) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class Batches:
    """Augmented batches of a data set, whose randomness is a function of (seed, step).

    Row r of batch `step` gets row r of the random numbers drawn for `step`, of which each process takes its
    shard. So a batch depends neither on the device, nor on the number of processes or workers, nor on
    interruptions of the run. Each of `LOADERS` has random numbers of its own, of the same distribution.

    Args:
        augmentations: one for each view of an image; views with the same one share its workers.
        batch_size: total over all processes.
        num_workers: workers of this process, divided among the augmentations.
        stream: number of this stream of batches; each has an order and random numbers of its own.
    """

    def __init__(
        self,
        data: DataSet,
        augmentations: Augmentation | Sequence[Augmentation],
        device: Device,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        loader: str = "device",
        stream: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be positive")
        if loader not in LOADERS:
            raise ValueError(f"unknown loader {loader!r}: take one of {', '.join(LOADERS)}")
        if isinstance(augmentations, Augmentation):
            augmentations = [augmentations]
        self.device, self.batch_size, self.seed, self.stream = device, batch_size, seed, stream
        self.length = len(data)
        self.waited_s = 0.0  # seconds spent waiting for images so far, augmentation not included
        self.in_memory = loader == "device" and data.in_memory  # whether no worker reads them
        if self.in_memory:  # uploaded once for all views
            in_memory = from_memory(data.images.to(device.torch_device))
        numbers: dict[Augmentation, list[int]] = {}
        for number, one in enumerate(augmentations):
            numbers.setdefault(one, []).append(number)
        workers = -(-num_workers // len(numbers))
        self._views: list[_Views] = []
        for one, own in numbers.items():
            if loader == "workers":
                source = FromWorkers(PilReader(data, one), True, device, workers)
                views = _Views(own, _seeds, source, _channels_last)
            elif self.in_memory:
                views = _Views(own, one.sample_params, in_memory, one)
            else:
                source = FromWorkers(data.for_workers(), one.starts_with_crop, device, workers)
                views = _Views(own, one.sample_params, source, one.without_crop())
            self._views.append(views)

    @property
    def per_epoch(self) -> int:
        return num_batches(self.length, self.batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield every image once, from batch `first` on, in an order drawn for the epoch.

        The last batch may be short.
        """
        order = permutation(self.length, self.seed, epoch, self.stream).split(self.batch_size)
        start = epoch * self.per_epoch
        return self._batches(
            _Plan(order[place], start + place) for place in range(first, len(order))
        )

    def repeat(
        self, indexes: Tensor, first: int, stop: int, *, labeled: int = 0, share: float = 0.0
    ) -> Iterator[Batch]:
        """Yield full batches number first ... stop - 1 of the endlessly repeated images `indexes`.

        With a `share`, that part of every batch is drawn from the first `labeled` images, at least one, and
        the rest from those after them.
        """
        draw = self._stream(len(indexes), labeled, share)
        positions = ((step, draw(step)) for step in range(first, stop))
        return self._batches(_Plan(indexes[places], step, places) for step, places in positions)

    def _stream(self, count: int, labeled: int, share: float) -> Callable[[int], Tensor]:
        """Return a function from the number of a batch to the positions of its images."""
        size, given = self.batch_size, (self.seed, self.stream)
        num_labeled = min(max(1, round(share * size)), size - 1)
        if not share or not 0 < labeled < count or not num_labeled:
            return Stream(count, size, *given).batch
        true = Stream(labeled, num_labeled, *given)
        others = Stream(count - labeled, size - num_labeled, *given)

        def draw(step: int) -> Tensor:
            places = torch.cat([true.batch(step), labeled + others.batch(step)])
            return places[permutation(size, self.seed, step, self.stream)]  # alike in all processes

        return draw

    def _batches(self, plans: Iterator[_Plan]) -> Iterator[Batch]:
        plans, *copies = itertools.tee(plans, 1 + len(self._views))
        items = [
            views.source(self._jobs(copy, views))
            for views, copy in zip(self._views, copies, strict=True)
        ]
        for plan in plans:
            start = time.perf_counter()
            found: dict[int, _Read] = {}
            for views, item in zip(self._views, items, strict=True):
                for number in views.numbers:
                    found[number] = _Read(*next(item), views.remaining)
            self.waited_s += time.perf_counter() - start
            yield self._on_device(len(plan.indexes), [found[number] for number in sorted(found)])
        for item in items:  # a source must reach its end before its workers begin the next epoch
            if next(item, None) is not None:
                raise RuntimeError("a source gave more images than it was asked for")

    def _jobs(self, plans: Iterator[_Plan], views: _Views) -> Iterator[Job]:
        """Yield this process's shard of each batch, with the random numbers of each of the views."""
        for plan in plans:
            total = len(plan.indexes)
            mine = shard(total)
            positions = None if plan.positions is None else plan.positions[mine]
            for number in views.numbers:
                place = address(plan.step, self.stream, number)
                drawn = views.draw(total, generator(self.seed, "augmentation", *place))
                yield Job(plan.indexes[mine], [params[mine] for params in drawn], positions)

    def _on_device(self, total: int, views: Sequence[_Read]) -> Batch:
        move = self.device.to_device
        job = views[0].job
        return Batch(
            tuple(move(view.pixels) for view in views),
            move(job.indexes),
            shard(total).start,
            total,
            None if job.positions is None else move(job.positions),
            tuple(tuple(map(move, view.job.params)) for view in views),
            tuple(view.remaining for view in views),
        )


@dataclass(frozen=True)
class Streams:
    """Batches of labeled images and, where there are any, of unlabeled ones beside them."""

    labeled: Batches
    unlabeled: Batches | None = None

    @property
    def waited_s(self) -> float:
        return self.labeled.waited_s + (self.unlabeled.waited_s if self.unlabeled else 0)

    @property
    def in_memory(self) -> bool:
        return self.labeled.in_memory

    @property
    def device(self) -> Device:
        return self.labeled.device

    def repeat(
        self,
        indexes: Tensor,
        first: int,
        stop: int,
        *,
        others: Tensor | None = None,
        **options: Any,
    ) -> Iterator[Batch]:
        """Yield batches as `Batches.repeat` does, each with one of the images `others`, if there are any."""
        batches = self.labeled.repeat(indexes, first, stop, **options)
        if self.unlabeled is None or others is None:
            yield from batches
            return
        for batch, beside in zip(batches, self.unlabeled.repeat(others, first, stop), strict=True):
            yield replace(batch, unlabeled=beside)


@torch.no_grad()
def in_order(
    data: DataSet,
    augmentation: Augmentation,
    device: Device,
    batch_size: int = 500,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Yield this process's shard of the set, not augmented and in order, with its place in the whole set."""
    assert not augmentation.ops, "evaluation must not augment"
    if not data.in_memory:
        source: Source = FromWorkers(data.for_workers(), False, device, num_workers)
        batch_size = min(batch_size, FILES_AT_ONCE)
    else:
        source = from_memory(data.images)
    mine = torch.arange(len(data))[shard(len(data))]
    jobs = (Job(indexes, []) for indexes in mine.split(batch_size) if len(indexes))
    for job, pixels in source(jobs):
        images = augmentation(pixels.to(device.torch_device, non_blocking=True), job.params)
        indexes = job.indexes.to(device.torch_device, non_blocking=True)
        yield Batch((images,), indexes, int(job.indexes[0]), len(data))
