"""The loops. They device and hand back numbers; printing, saving and the order are the scripts'."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from datasets import UNKNOWN, DataSet
from datasets.transforms import Augmentation
from lib.features.extraction import extract
from lib.graph.knn import accuracy, topk_correct
from lib.loading.batches import Batch, in_order
from lib.objectives.memory_bank import MemoryBank
from lib.runtime.devices import Device
from lib.runtime.distributed import all_gather_rows, all_reduce_sum, share, share_buffers

Schedule = Callable[[int], float]
Item = TypeVar("Item")
CHECK_EVERY = 50  # steps between looks at a GPU's losses: each one waits for the device
DIVERGED = (
    "training stops here and saves nothing of it: checkpoints already written are intact. Lower --lr, "
    "or try --precision fp32"
)


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: its number, rate, mean loss (on the device) and batch size.

    Loss and batch size are those of all processes together.
    """

    number: int
    lr: float
    loss: Tensor
    batch_size: int


def sgd(
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
) -> Optimizer:
    """The published optimizer: SGD with momentum 0.9, Nesterov's for small images.

    Fused: one kernel for all parameters, which gives the bits of a loop over them.
    """
    words = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    return torch.optim.SGD(parameters, lr=lr, fused=True, **words)


def trainable(model: nn.Module, *, head_only: bool) -> list[nn.Parameter]:
    """The parameters to optimize; with `head_only` the others are frozen and get no gradient."""
    if head_only:
        model.requires_grad_(False)
        getattr(model, model.head_name).requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def restore(source: str | Path, parts: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    """Hand each part (optimizer, memory bank ...) of a run the state it had in the file `source`.

    Raises:
        ValueError: naming the file, where a state does not fit.
    """
    try:
        for part, state in parts:
            part.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be continued, what it holds does not fit this run: {error}"
        ) from error


class _LossWatch:
    """Ends a run at the first loss that is NaN or infinite.

    On the CPU that is before the step changes anything. A GPU would have to be waited for at every
    step: there the number of the first such step stays on the device and is read now and then.
    """

    def __init__(self, device: Device) -> None:
        self._first = torch.zeros((), dtype=torch.int64, device=device.torch_device)
        self._every = 1 if device.torch_device.type == "cpu" else CHECK_EVERY

    def see(self, loss: Tensor, step: int) -> None:
        """Note the loss of `step`, counted from 1."""
        self._first.masked_fill_((self._first == 0) & ~torch.isfinite(loss), step)
        if step % self._every == 0:
            self.check()

    def check(self) -> None:
        step = int(self._first)
        if step:
            raise FloatingPointError(f"the loss of step {step} is not finite; {DIVERGED}")


def require_finite(step: int, *modules: nn.Module) -> None:
    """Look at every weight and buffer before they are saved after `step`, counted from 1.

    Raises:
        FloatingPointError: naming the first one that holds NaN or infinity.
    """
    for module in modules:
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise FloatingPointError(f"{name} is not finite after step {step}; {DIVERGED}")


def at_least_float32(outputs: Tensor) -> Tensor:
    """What a loss is computed on: float32 where the forward pass ran in less."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _apply(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    with record_function("optimizer"):
        optimizer.step()


def _groups(items: Iterable[Item], size: int) -> Iterator[Iterator[tuple[Item, bool]]]:
    """The items by `size`, none read ahead of its group; with each, whether its group ends there."""
    items = iter(items)
    for first in items:
        yield _marked(first, islice(items, size - 1))


def _marked(item: Item, following: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    for after in following:
        yield item, False
        item = after
    yield item, True


def _forward(model: nn.Module, batch: Batch, device: Device) -> Tensor:
    """Outputs for this process's rows; it may have none, and still takes part in what all must do."""
    if len(batch.images):
        with device.autocast():
            return model(batch.images)
    blank = batch.images.new_zeros(1, *batch.images.shape[1:])
    model.eval()  # no row is to reach the statistics of BatchNorm
    nothing = model(blank)[:0]
    model.train()
    return nothing


def _scale_gradients(optimizer: Optimizer, factor: float) -> None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


@dataclass
class _Seen:
    """The batches of a step so far: their indexes and embeddings, mean loss of all their images."""

    batches: list[tuple[Batch, Tensor]]
    rows: int
    loss: Tensor


def _accumulate(
    model: nn.Module,
    criterion: nn.Module,
    memory: Tensor,
    group: Iterable[tuple[Batch, bool]],
    first_place: int,
    device: Device,
) -> _Seen:
    """Forward and backward of the batches of one step; gradients as if the first batch were all."""
    seen = _Seen([], 0, torch.zeros((), device=device.torch_device))
    for place, (batch, is_last) in enumerate(group, first_place):
        first = seen.batches[0][0] if seen.batches else batch
        # processes exchange their gradients once, with the last batch of the step
        with nullcontext() if is_last or share().size == 1 else model.no_sync():
            with record_function("forward"):
                embeddings = _forward(model, batch, device)
            where = {"first": batch.first, "total": batch.total}
            with record_function("loss"):
                part = criterion(embeddings, batch.indexes, memory, place, **where)
            part = part * (batch.total / first.total)
            with record_function("backward"):
                (part * share().size).backward()  # that exchange divides by the number of processes
        seen.loss = seen.loss + all_reduce_sum(part.detach().clone())
        seen.rows += batch.total
        # a copy: the next forward pass of a network compiled into CUDA graphs writes to the same place
        seen.batches.append((batch, embeddings.detach().clone()))
    return seen


def pretrain(
    model: nn.Module,
    bank: MemoryBank,
    criterion: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    schedule: Schedule,
    device: Device,
    *,
    first_step: int,
    iter_size: int = 1,
) -> Iterator[Step]:
    """Instance discrimination: one optimizer step and bank update per `iter_size` batches.

    The gradient of a step is that of the mean over all its images, in whatever batches and processes
    they came. The bank keeps still within a step and then moves batch by batch.

    Args:
        model: the network, or what `lib.runtime.distributed.wrap_ddp` made of it.

    Yields:
        A `Step` after each of them.

    Raises:
        FloatingPointError: naming the first step whose loss is not finite.
    """
    model.train()
    criterion.train()
    watch = _LossWatch(device)
    for number, group in enumerate(_groups(batches, iter_size), first_step):
        optimizer.zero_grad(set_to_none=True)
        seen = _accumulate(model, criterion, bank.memory, group, number * iter_size, device)
        full = seen.batches[0][0].total
        loss = seen.loss * (full / seen.rows)
        watch.see(loss, number + 1)
        if full != seen.rows:
            _scale_gradients(optimizer, full / seen.rows)
        lr = schedule(number)
        _apply(optimizer, lr)
        with record_function("memory bank"):
            for batch, embeddings in seen.batches:
                indexes = all_gather_rows(batch.indexes, batch.total)
                bank.update(indexes, all_gather_rows(embeddings, batch.total))
        yield Step(number, lr, loss, seen.rows)
    watch.check()


def finetune(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Batch, Tensor]],
    labels: Tensor,
    weights: Tensor,
    schedule: Schedule,
    device: Device,
    *,
    first_step: int,
    iter_size: int = 1,
    head_only: bool = False,
) -> Iterator[Step]:
    """Supervised training on labels and pseudo-labels.

    The loss of a step is the mean over its examples on all processes; its gradient is the same for any
    number of processes and, BatchNorm's batch statistics aside, for any way to cut it into batches.

    Args:
        model: the network, or what `lib.runtime.distributed.wrap_ddp` made of it.
        criterion: loss per example (`reduction="none"`).
        batches: batches with each row's position in `labels` and `weights`, `iter_size` of them per step.
        labels: class number per training example.
        weights: weight of each example's loss; ones, or the confidence (equation 6 of the paper).
        iter_size: batches whose gradients are averaged before each optimizer step.
        head_only: keep everything but the last layer as it is, BatchNorm statistics included.

    Yields:
        A `Step` after each optimizer step.

    Raises:
        FloatingPointError: naming the first step whose loss is not finite.
    """
    model.train(not head_only)
    watch = _LossWatch(device)
    for number, group in enumerate(_groups(batches, iter_size), first_step):
        optimizer.zero_grad(set_to_none=True)
        mean, rows = torch.zeros((), device=device.torch_device), 0
        for (batch, positions), is_last in group:
            with nullcontext() if is_last or share().size == 1 else model.no_sync():
                with record_function("forward"), device.autocast():
                    outputs = at_least_float32(model(batch.images))
                losses = criterion(outputs, device.to_device(labels[positions]))
                losses = losses * device.to_device(weights[positions])
                loss = losses.sum() / (batch.total * iter_size)
                with record_function("backward"):
                    (loss * share().size).backward()  # the exchange of gradients divides by it
            mean, rows = mean + all_reduce_sum(loss.detach().clone()), rows + batch.total
        watch.see(mean, number + 1)
        lr = schedule(number)
        _apply(optimizer, lr)
        yield Step(number, lr, mean, rows)
    watch.check()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: DataSet,
    device: Device,
    *,
    gray: bool = False,
    num_workers: int = 0,
) -> dict[str, float]:
    """Accuracy of a classifier on every labeled image of `data` once, each process its part of them.

    BatchNorm's statistics are rank 0's on all of them, then and afterwards.

    Returns:
        `top1` and `top5` in percent, and the mean cross-entropy `loss`.

    Raises:
        ValueError: if no image has a label.
    """
    was_training = model.training
    model.eval()
    share_buffers(model)
    sums = torch.zeros(4, dtype=torch.float64, device=device.torch_device)
    targets = data.targets.to(device.torch_device)
    augmentation = Augmentation((), data.stats, gray=gray)
    for batch in in_order(data, augmentation, device, num_workers=num_workers):
        with device.autocast():
            outputs = at_least_float32(model(batch.images))
        own = targets[batch.indexes]
        known = own != UNKNOWN
        outputs, own = outputs[known], own[known]
        loss = F.cross_entropy(outputs.double(), own, reduction="sum")
        sums += torch.stack([*topk_correct(outputs, own), loss, known.sum()])
    model.train(was_training)
    top1, top5, loss, count = all_reduce_sum(sums).tolist()
    if not count:
        raise ValueError("there is no labeled image to measure the accuracy on")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


def knn_monitor(
    model: nn.Module,
    bank: Tensor,
    bank_labels: Tensor,
    test: DataSet,
    device: Device,
    *,
    batch_size: int = 500,
    num_workers: int = 0,
) -> dict[str, float]:
    """Accuracy of test images among the rows of `bank`, which is only read: `lib.graph.knn.accuracy`."""
    features = extract(model, test, device, batch_size=batch_size, num_workers=num_workers)
    queries = features.to(device.torch_device)
    return accuracy(queries, test.targets, bank, bank_labels, test.num_classes)
