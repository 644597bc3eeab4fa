"""Sources, which turn jobs into images in order: bytes in memory, or worker processes that read files."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice, tee
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.files import Reader, surviving
from datasets.pil import PilReader
from lib.runtime.devices import Device

UPLOADED_AT_ONCE = 32  # batches; few enough for the first step of an epoch to come soon


class Job(NamedTuple):
    """One view of this process's images before they are read.

    `params` are the random numbers of the augmentation: a tensor for each operation still to be applied, or
    the seeds of a Pillow chain. `positions` are those of `lib.loading.batches.Batch`.
    """

    indexes: Tensor
    params: list[Tensor]
    positions: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.indexes, *self.params, *([] if self.positions is None else [self.positions])]


Source = Callable[[Iterator[Job]], Iterator[tuple[Job, Tensor]]]


def from_memory(images: Tensor) -> Source:
    """Return a source that indexes `images`; fewer images than the set has stand for all in turn."""

    def source(jobs: Iterator[Job]) -> Iterator[tuple[Job, Tensor]]:
        for job in jobs if images.device.type == "cpu" else _uploaded(jobs, images.device):
            yield job, images[job.indexes % len(images)]

    return source


def _uploaded(jobs: Iterator[Job], device: torch.device) -> Iterator[Job]:
    """Yield jobs on a GPU, `UPLOADED_AT_ONCE` of which travel there together: a step then copies nothing.

    The GPU works on the steps before them while they are drawn.
    """
    while block := list(islice(jobs, UPLOADED_AT_ONCE)):
        sizes = [len(job.indexes) for job in block]
        columns = map(torch.cat, zip(*(job.tensors for job in block), strict=True))
        moved = (x.pin_memory().to(device, non_blocking=True).split(sizes) for x in columns)
        for indexes, *others in zip(*moved, strict=True):
            params, positions = others[: len(block[0].params)], others[len(block[0].params) :]
            yield Job(indexes, params, *positions)


class _Requests:
    """The requests to the workers, which a persistent DataLoader iterates anew in every epoch."""

    def __init__(self) -> None:
        self.coming: Iterator[tuple[Tensor, Tensor | None]] = iter(())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return self.coming


class FromWorkers:
    """A source whose `num_workers` processes read images, and live as long as it does.

    A reader that `consumes_params` applies the first random numbers of a job.
    """

    def __init__(
        self, reader: Reader | PilReader, consumes_params: bool, device: Device, num_workers: int
    ) -> None:
        self.consumes_params, self.requests = consumes_params, _Requests()
        self.loader = DataLoader(
            reader,
            batch_size=None,
            sampler=self.requests,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.torch_device.type == "cuda",
            worker_init_fn=partial(_outlast_signals, _ending()),
            generator=torch.Generator(),  # else the loader would draw from the global one
        )

    def __call__(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Read the images of each job; ValueError lists those that cannot be read."""
        ahead, jobs = tee(jobs)
        self.requests.coming = (
            (job.indexes, job.params[0] if self.consumes_params else None) for job in ahead
        )
        for job, (images, problems) in zip(jobs, surviving(self.loader), strict=True):
            if problems:
                listed = "\n  ".join(problems[:10])
                raise ValueError(
                    f"{len(problems)} images of a batch cannot be read; repair or remove them:\n  {listed}"
                )
            yield job._replace(params=job.params[self.consumes_params :]), images


@cache
def _ending() -> Event:
    """Return an event that is set when this process ends."""
    event = multiprocessing.Event()
    Finalize(None, event.set, exitpriority=0)
    return event


def _outlast_signals(ending: Event, _: int) -> None:
    """Keep a worker alive when Ctrl-C or SIGTERM reach every process: the run still has to end its step.

    A worker obeys SIGTERM only when its program ends, sends it and waits. If the program is gone, torch
    notices within a few seconds and ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)
