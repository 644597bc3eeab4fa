"""Batches of a data set, augmented; each process gets its own rows of every batch.

Of the two loaders, `device` augments whole batches there (datasets/transforms.py), of images that lie there
as bytes or come from files that workers read; `workers` augments one image at a time in them
(datasets/pil.py), as published.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import tee
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets import DataSet
from datasets.files import FileSet, Reader, surviving
from datasets.pil import PilReader
from datasets.transforms import Augmentation
from lib.loading.sampler import Stream, num_batches, permutation
from lib.runtime.devices import Device
from lib.runtime.distributed import share
from lib.runtime.seeding import generator

LOADERS = ("device", "workers")
FILES_AT_ONCE = 100  # images that a worker hands over together in evaluation: 15 MB at 224 pixels


@dataclass(frozen=True)
class Batch:
    """This process's rows of a batch.

    Attributes:
        images: B x C x S x S float32 on the device; B may be 0 in a short batch shared by many.
        indexes: B, into the data set, same device.
        first: place of the first of these rows in the whole batch.
        total: rows of the whole batch, over all processes; where not given, these are all.
    """

    images: Tensor
    indexes: Tensor
    first: int = 0
    total: int = -1

    def __post_init__(self) -> None:
        if self.total < 0:
            object.__setattr__(self, "total", len(self.indexes))


class _Job(NamedTuple):
    """A batch before its images are there: whose, its random numbers, its place.

    Those are one tensor per operation that is still to be applied, or the seeds of a classic chain.
    """

    indexes: Tensor
    rows: list[Tensor]
    first: int
    total: int


Source = Callable[[Iterator[_Job]], Iterator[tuple[_Job, Tensor]]]
Remaining = Callable[[Tensor, Sequence[Tensor]], Tensor]  # what the device does to the images


def _in_memory(images: Tensor, jobs: Iterator[_Job]) -> Iterator[tuple[_Job, Tensor]]:
    for job in jobs:
        yield job, images[job.indexes.to(images.device, non_blocking=True) % len(images)]


class _Requests:
    """What the workers shall read next; a DataLoader that lives on asks for it anew in every epoch."""

    def __init__(self) -> None:
        self.coming: Iterator[tuple[Tensor, Tensor | None]] = iter(())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return self.coming


class _FromWorkers:
    """A source that reads images in `num_workers` processes that live as long as it does."""

    def __init__(
        self, reader: Reader | PilReader, draws: bool, device: Device, num_workers: int
    ) -> None:
        """`draws`: the first random numbers of a job are the reader's."""
        self.draws, self.requests = draws, _Requests()
        self.loader = DataLoader(
            reader,
            batch_size=None,
            sampler=self.requests,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.torch_device.type == "cuda",
            collate_fn=_unchanged,
            worker_init_fn=partial(_outlast_signals, _ending()),
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def __call__(self, jobs: Iterator[_Job]) -> Iterator[tuple[_Job, Tensor]]:
        ahead, jobs = tee(jobs)
        self.requests.coming = ((job.indexes, job.rows[0] if self.draws else None) for job in ahead)
        for job, (images, problems) in zip(jobs, surviving(self.loader), strict=True):
            if problems:
                listed = "\n  ".join(problems[:10])
                raise ValueError(
                    f"{len(problems)} images of a batch cannot be read; repair or remove them:\n  {listed}"
                )
            yield job._replace(rows=job.rows[self.draws :]), images


def _unchanged(item: Any) -> Any:
    return item


@cache
def _ending() -> Event:
    """An event that is set when this process ends."""
    event = multiprocessing.Event()
    Finalize(None, event.set, exitpriority=0)
    return event


def _outlast_signals(ending: Event, _: int) -> None:
    """For workers: Ctrl-C and SIGTERM may reach every process, and the run needs them to end its step.

    Only a program that ends means it: it sends its workers SIGTERM and waits for them. Workers whose
    program is gone are ended by torch, which looks for it every few seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)


def _seeds(n: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(2**63 - 1, (n,), generator=generator)]


def _channels_last(images: Tensor, _: Sequence[Tensor]) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _finished(job: _Job, images: Tensor, remaining: Remaining, device: Device) -> Batch:
    images = remaining(images.to(device.torch_device, non_blocking=True), job.rows)
    return Batch(
        images, job.indexes.to(device.torch_device, non_blocking=True), job.first, job.total
    )


def with_loader(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its run; one from before there was a choice had the first of `LOADERS`."""
    return {**meta, "options": {"loader": LOADERS[0], **meta.get("options", {})}}


class _Pipeline(NamedTuple):
    """From indexes to a batch: the random numbers of n images, their source, what remains to be done."""

    draw: Callable[[int, torch.Generator], list[Tensor]]
    source: Source
    remaining: Remaining


def _augmented_in_workers(
    data: DataSet, augmentation: Augmentation, device: Device, num_workers: int
) -> _Pipeline:
    reader = PilReader(data, augmentation)
    return _Pipeline(_seeds, _FromWorkers(reader, True, device, num_workers), _channels_last)


def _augmented_on_device(
    data: DataSet, augmentation: Augmentation, device: Device, num_workers: int
) -> _Pipeline:
    if not isinstance(data, FileSet):
        source = partial(_in_memory, data.images.to(device.torch_device))
        return _Pipeline(augmentation.sample_params, source, augmentation)
    crop = augmentation.starts_with_crop
    files = _FromWorkers(Reader(data), crop, device, num_workers)
    return _Pipeline(augmentation.sample_params, files, augmentation.without_crop())


class Batches:
    """The images of a set as augmented batches; all that is random is a function of (seed, step).

    Row r of batch `step` gets row r of the random numbers drawn for `step`, of which each process takes
    its part. So a batch depends neither on the device, nor on the number of processes or workers, nor on
    when the run was interrupted.

    Attributes:
        waited_s: seconds spent waiting for images so far; augmenting them does not count.
    """

    def __init__(
        self,
        data: DataSet,
        augmentation: Augmentation,
        device: Device,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        loader: str = "device",
    ) -> None:
        """
        Args:
            batch_size: the total over all processes.
            num_workers: processes of this one that read images, if they are in files or with `workers`.
            loader: one of `LOADERS`; each has random numbers of its own, of the same distribution.
        """
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be positive")
        if loader not in LOADERS:
            raise ValueError(f"unknown loader {loader!r}: take one of {', '.join(LOADERS)}")
        self.device, self.batch_size, self.seed = device, batch_size, seed
        self.length, self.waited_s = len(data), 0.0
        self._draw, self._source, self._remaining = (
            _augmented_in_workers(data, augmentation, device, num_workers)
            if loader == "workers"
            else _augmented_on_device(data, augmentation, device, num_workers)
        )

    @property
    def per_epoch(self) -> int:
        return num_batches(self.length, self.batch_size)

    def _job(self, indexes: Tensor, step: int) -> _Job:
        """This process's part of the images `indexes` as batch number `step`."""
        total, mine = len(indexes), share().rows(len(indexes))
        drawn = self._draw(total, generator(self.seed, "augmentation", step))
        return _Job(indexes[mine], [rows[mine] for rows in drawn], mine.start, total)

    def _batches(self, jobs: Iterator[_Job]) -> Iterator[Batch]:
        items = self._source(jobs)
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self.waited_s += time.perf_counter() - start
            if item is None:
                return
            yield _finished(*item, self._remaining, self.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Every image once, in an order drawn for the epoch; the last batch may be short.

        Args:
            first: batches to leave out at the start, for a run that continues within an epoch.
        """
        order = permutation(self.length, self.seed, epoch).split(self.batch_size)
        start = epoch * self.per_epoch
        return self._batches(
            self._job(order[place], start + place) for place in range(first, len(order))
        )

    def stream(self, indexes: Tensor, first: int, stop: int) -> Iterator[tuple[Batch, Tensor]]:
        """Full batches number first ... stop - 1 of the given images, repeated without end.

        Yields:
            The batch, and the position in `indexes` of each of this process's rows (for labels and
            weights kept beside it).
        """
        ahead, behind = (Stream(len(indexes), self.batch_size, self.seed) for _ in range(2))
        steps = range(first, stop)
        batches = self._batches(self._job(indexes[ahead.batch(step)], step) for step in steps)
        for step, batch in zip(steps, batches, strict=True):
            rows = slice(batch.first, batch.first + len(batch.indexes))
            yield batch, behind.batch(step)[rows]


@torch.no_grad()
def in_order(
    data: DataSet,
    augmentation: Augmentation,
    device: Device,
    batch_size: int = 500,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This process's part of the set, unaugmented: rows `share().rows(len(data))`, each once, in order.

    `batch_size` is that of this process; `first` and `total` of a batch are its place in the whole set.
    """
    assert not augmentation.ops, "evaluation must not augment"
    source: Source
    if isinstance(data, FileSet):
        source = _FromWorkers(Reader(data), False, device, num_workers)
        batch_size = min(batch_size, FILES_AT_ONCE)
    else:
        source = partial(_in_memory, data.images)
    mine = torch.arange(len(data))[share().rows(len(data))]
    jobs = (_Job(i, [], int(i[0]), len(data)) for i in mine.split(batch_size) if len(i))
    for job, images in source(jobs):
        yield _finished(job, images, augmentation, device)
