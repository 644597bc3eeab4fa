"""The training step, and the only loop over it.

`train_steps` runs an objective over batches and yields after each optimizer step; the scripts own the order
of everything else. It serves every phase, loss and device.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from lib.loading.batches import Batch
from lib.objectives.objective import Objective
from lib.runtime.devices import Device
from lib.runtime.distributed import all_reduce_sum, world_size
from lib.training.cuda_graph import Result, StepGraph

Schedule = Callable[[int], float]
Item = TypeVar("Item")
CHECK_EVERY = 50  # steps between checks of a GPU's losses: each one waits for the device
DIVERGED = (
    "training stops here and saves nothing of it: checkpoints already written are intact. Lower --lr, "
    "or try --precision fp32"
)


@dataclass(frozen=True)
class Step:
    """The record of one optimizer step, numbered from 0 over the whole run.

    `means` are the loss and what else the objective measures, by name and on the device, over the
    `batch_size` images of all processes. A captured step writes them to the same place every time: read or
    add them up before the next step.
    """

    number: int
    lr: float
    means: Mapping[str, Tensor]
    batch_size: int

    @property
    def loss(self) -> Tensor:
        return self.means["loss"]


class LossWatch:
    """The check that ends a run at the first loss that is NaN or infinite: on the CPU before the step.

    A GPU would be waited for at every step. There losses stay on the device, and `CHECK_EVERY` of them are
    read at a time.
    """

    def __init__(self, device: Device, first_step: int = 0) -> None:
        size = 1 if device.torch_device.type == "cpu" else CHECK_EVERY
        self._losses = torch.zeros(size, dtype=torch.float64, device=device.torch_device)
        self._unread, self._steps = 0, first_step

    def see(self, loss: Tensor) -> None:
        """Check the loss of the next step."""
        self._losses[self._unread].copy_(loss.detach())
        self._unread, self._steps = self._unread + 1, self._steps + 1
        if self._unread == len(self._losses):
            self.check()

    def check(self) -> None:
        """Raise FloatingPointError, naming the first step whose loss is not finite, if there is one."""
        losses, first = self._losses[: self._unread].tolist(), self._steps - self._unread + 1
        self._unread = 0
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {step} is not finite; {DIVERGED}")


def train_steps(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    schedule: Schedule,
    device: Device,
    *,
    first_step: int = 0,
    iter_size: int = 1,
    full_steps: bool = False,
    head_only: bool = False,
    graph: StepGraph | None = None,
) -> Iterator[Step]:
    """Train with one optimizer step for every `iter_size` batches.

    The gradient of a step is that of the mean over all its images, however they are divided into batches
    and processes, except for BatchNorm's batch statistics. The objective updates its memory after the step.

    Args:
        model: the network, or its wrapper by `lib.runtime.distributed.wrap_ddp`.
        first_step: number of steps that the run has done already.
        full_steps: whether every step has `iter_size` batches of one size. Their losses are then divided
            before the gradients are added up; else the sum is scaled, when its images are known.
        head_only: whether to keep everything but the last layer fixed, BatchNorm's statistics included.
        graph: the step as a CUDA graph, which stays from one call to the next; None computes it eagerly.

    Raises:
        FloatingPointError: if a loss is not finite, naming the first such step.
    """
    model.train(not head_only)
    objective.train()
    planned = iter_size if full_steps else 0
    watch = LossWatch(device, first_step)
    at_once = graph is None and device.torch_device.type == "cpu"  # nothing has to be waited for
    check = watch.see if at_once else _unchecked
    take = partial(_take_step, model, objective, optimizer, device, planned, check)
    take = take if graph is None else partial(graph, take)
    drawn = _with_drawn(batches, objective, first_step * iter_size, device)
    for number, group in enumerate(_groups(drawn, iter_size), first_step):
        lr = schedule(number)
        means, rows = take(group, device.scalar(lr))
        for options in optimizer.param_groups:
            options["lr"] = lr  # a number, as checkpoints hold it
        if not at_once:
            watch.see(means["loss"])
        yield Step(number, lr, means, rows)
    watch.check()


def _with_drawn(
    batches: Iterable[Batch], objective: Objective, first_place: int, device: Device
) -> Iterator[Batch]:
    """Give every batch this process's rows of the objective's random numbers."""
    for place, batch in enumerate(batches, first_place):
        mine = slice(batch.first, batch.first + len(batch.indexes))
        drawn = objective.draw(batch.total, place)
        yield replace(batch, drawn=tuple(device.to_device(x[mine]) for x in drawn))


def _unchecked(_: Tensor) -> None:
    """Leave a loss to be checked after the step."""


def _take_step(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    device: Device,
    planned: int,
    check: Callable[[Tensor], None],
    group: Iterable[tuple[Batch, bool]],
    lr: float | Tensor,
) -> Result:
    """Take one optimizer step, once `check` accepts the loss; return means by name, and rows."""
    optimizer.zero_grad(set_to_none=True)
    done = _accumulate(model, objective, group, device, planned)
    check(done.means["loss"])
    for parameter in objective.parameters():  # DistributedDataParallel sees the network's alone
        if parameter.grad is not None:
            all_reduce_sum(parameter.grad).div_(world_size())
    for options in optimizer.param_groups:
        if done.scale != 1:
            gradients = [p.grad for p in options["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, done.scale)
        options["lr"] = lr
    with record_function("optimizer"):
        optimizer.step()
    with record_function("after step"):
        objective.after_step(done.kept)
    return done.means, done.rows


class _Accumulated(NamedTuple):
    means: dict[str, Tensor]  # over all images of the step
    kept: list[Any]  # data of each batch that the objective needs after the step
    rows: int
    scale: float  # factor that the gradients still need


def _accumulate(
    model: nn.Module,
    objective: Objective,
    group: Iterable[tuple[Batch, bool]],
    device: Device,
    planned: int,
) -> _Accumulated:
    """Run forward and backward for the batches of one step, of which `planned` have one size, or 0.

    Where that is not known, gradients are added up as those of a mean over the rows of the first batch.
    """
    means, kept, full, rows = {}, [], 0, 0
    network = partial(_forward, model, device=device)
    for batch, is_last in group:
        full, rows = full or batch.total, rows + batch.total
        alone = is_last or world_size() == 1  # processes exchange gradients with the last batch
        with nullcontext() if alone else model.no_sync():
            with record_function("objective"):
                found, more = objective(network, batch)
            kept.append(more)
            part = batch.total / full
            parts = {n: v / planned if planned else v * part for n, v in found.items()}
            for name, value in parts.items():
                whole = all_reduce_sum(value.detach().clone())
                means[name] = means[name] + whole if name in means else whole
            with record_function("backward"):
                # world_size undoes the average over processes in the exchange of gradients
                (parts["loss"] * world_size()).backward()
    scale = 1.0 if planned else full / rows
    return _Accumulated({name: v * scale for name, v in means.items()}, kept, rows, scale)


def _forward(model: nn.Module, images: Tensor, *, device: Device) -> Tensor:
    """Compute the outputs for this process's rows, and join the collectives even if it has none."""
    if len(images):
        with record_function("forward"), device.autocast():
            return model(images)
    blank = images.new_zeros(1, *images.shape[1:])
    was_training = model.training
    model.eval()  # keeps the blank row out of the statistics of BatchNorm
    nothing = model(blank)[:0]
    model.train(was_training)
    return nothing


def _groups(items: Iterable[Item], size: int) -> Iterator[Iterator[tuple[Item, bool]]]:
    """Yield the items in groups of `size`, each with a flag for the last; none is read ahead of its group."""
    items = iter(items)
    for first in items:
        yield _marked(first, islice(items, size - 1))


def _marked(item: Item, following: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    for after in following:
        yield item, False
        item = after
    yield item, True
