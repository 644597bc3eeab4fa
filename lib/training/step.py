"""The training step, and the only loop over it.

`train_steps` runs an objective over batches and yields after each optimizer step; the scripts own the order
of everything else. It serves every phase, loss and device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from lib.loading.batches import Batch
from lib.objectives.objective import Objective
from lib.runtime.devices import Device
from lib.runtime.distributed import all_reduce_sum, world_size

Schedule = Callable[[int], float]
Item = TypeVar("Item")
CHECK_EVERY = 50  # steps between checks of a GPU's losses: each one waits for the device
DIVERGED = (
    "training stops here and saves nothing of it: checkpoints already written are intact. Lower --lr, "
    "or try --precision fp32"
)


@dataclass(frozen=True)
class Step:
    """The record of one optimizer step.

    Attributes:
        number: number of the step, from 0 over the whole run.
        losses: means over the step's images of all processes, by name, on the device.
        batch_size: number of those images.
    """

    number: int
    lr: float
    losses: Mapping[str, Tensor]
    batch_size: int

    @property
    def loss(self) -> Tensor:
        """Loss that was minimized."""
        return self.losses["loss"]


class LossWatch:
    """The check that ends a run at the first loss that is NaN or infinite.

    On the CPU it raises before the step changes anything. On a GPU that would wait for the device at every
    step: there the number of the first such step stays on the device and is read every `CHECK_EVERY` steps.
    """

    def __init__(self, device: Device) -> None:
        self._first = torch.zeros((), dtype=torch.int64, device=device.torch_device)
        self._every = 1 if device.torch_device.type == "cpu" else CHECK_EVERY

    def see(self, loss: Tensor, step: int) -> None:
        """Check the loss of `step`, counted from 1."""
        self._first.masked_fill_((self._first == 0) & ~torch.isfinite(loss), step)
        if step % self._every == 0:
            self.check()

    def check(self) -> None:
        """Raise FloatingPointError, naming the first step whose loss is not finite, if there is one."""
        step = int(self._first)
        if step:
            raise FloatingPointError(f"the loss of step {step} is not finite; {DIVERGED}")


def require_finite(step: int, *modules: nn.Module) -> None:
    """Check every weight and buffer before they are saved after `step`, counted from 1.

    Raises:
        FloatingPointError: if one holds NaN or infinity, naming the first.
    """
    for module in modules:
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise FloatingPointError(f"{name} is not finite after step {step}; {DIVERGED}")


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
) -> Iterator[Step]:
    """Train with one optimizer step for every `iter_size` batches.

    The gradient of a step is that of the mean over all its images, however they are divided into batches
    and processes, except for BatchNorm's batch statistics. The objective updates its memory after the step.

    Args:
        model: the network, or its wrapper by `lib.runtime.distributed.wrap_ddp`.
        schedule: function from the number of the step to the learning rate.
        first_step: number of steps that the run has done already.
        iter_size: batches whose gradients make one step (gradient accumulation).
        full_steps: whether every step has `iter_size` batches of one size. Their losses are then divided
            before the gradients are added up; else the sum is scaled, when its images are known.
        head_only: whether to keep everything but the last layer fixed, BatchNorm's statistics included.

    Yields:
        A `Step` after each optimizer step.

    Raises:
        FloatingPointError: if a loss is not finite, naming the first such step.
    """
    model.train(not head_only)
    objective.train()
    watch = LossWatch(device)
    for number, group in enumerate(_groups(batches, iter_size), first_step):
        optimizer.zero_grad(set_to_none=True)
        done = _Accumulated(planned=iter_size if full_steps else 0)
        _accumulate(done, model, objective, group, number * iter_size, device)
        for parameter in objective.parameters():  # DistributedDataParallel sees the network's alone
            if parameter.grad is not None:
                all_reduce_sum(parameter.grad).div_(world_size())
        watch.see(done.losses["loss"], number + 1)
        if done.scale != 1:
            _scale_gradients(optimizer, done.scale)
        lr = schedule(number)
        _apply(optimizer, lr)
        with record_function("after step"):
            objective.after_step(done.kept)
        yield Step(number, lr, done.losses, done.rows)
    watch.check()


@dataclass
class _Accumulated:
    """The batches of one step so far.

    Attributes:
        planned: batches of one size that there will be; 0 where that is not known.
        kept: data of each batch that the objective needs after the step.
        full: rows of the first batch; gradients are those of a mean over as many.
    """

    planned: int = 0
    kept: list[Any] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    full: int = 0
    rows: int = 0

    @property
    def scale(self) -> float:
        """Factor that turns a mean over the first batch's rows into one over all rows."""
        return 1.0 if self.planned else self.full / self.rows

    def add(self, batch: Batch, losses: Mapping[str, Tensor], kept: Any) -> Tensor:
        """Note a batch, and return its part of the loss to minimize."""
        self.full = self.full or batch.total
        self.rows += batch.total
        self.kept.append(kept)
        parts = {name: self._part(value, batch) for name, value in losses.items()}
        for name, part in parts.items():
            whole = all_reduce_sum(part.detach().clone())
            self.losses[name] = self.losses[name] + whole if name in self.losses else whole
        return parts["loss"]

    def _part(self, mean: Tensor, batch: Batch) -> Tensor:
        return mean / self.planned if self.planned else mean * (batch.total / self.full)


def _accumulate(
    done: _Accumulated,
    model: nn.Module,
    objective: Objective,
    group: Iterable[tuple[Batch, bool]],
    first_place: int,
    device: Device,
) -> None:
    """Run forward and backward for the batches of one step, and average the losses over all images."""
    for place, (batch, is_last) in enumerate(group, first_place):
        with _exchange_of_gradients(model, is_last):
            network = partial(_forward, model, device=device)
            with record_function("objective"):
                losses, kept = objective(network, replace(batch, step=place))
            loss = done.add(batch, losses, kept)
            with record_function("backward"):
                # world_size undoes the average over processes in the exchange of gradients
                (loss * world_size()).backward()
    done.losses = {name: value * done.scale for name, value in done.losses.items()}


def _exchange_of_gradients(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Let processes exchange their gradients once, with the last batch of the step."""
    return nullcontext() if is_last or world_size() == 1 else model.no_sync()


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


def _apply(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    with record_function("optimizer"):
        optimizer.step()


def _scale_gradients(optimizer: Optimizer, factor: float) -> None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


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
