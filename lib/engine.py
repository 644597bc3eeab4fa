"""The loops. They compute and hand back numbers; printing, saving and the order are the scripts'."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets.images import ImageSet
from datasets.transforms import Augmentation
from lib.devices import Compute
from lib.features import extract
from lib.knn import classify, top_k_accuracy
from lib.loader import Batch, in_order
from lib.memory_bank import MemoryBank

Schedule = Callable[[int], float]
CHECK_EVERY = 50  # steps between looks at a GPU's losses: each one waits for the device
DIVERGED = (
    "training stops here and saves nothing of it: checkpoints already written are intact. Lower --lr, "
    "or try --precision fp32"
)


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: its number, rate, mean loss (on the device) and batch size."""

    number: int
    lr: float
    loss: Tensor
    batch_size: int


def sgd(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    """The published optimizer: SGD with Nesterov momentum 0.9."""
    return torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def trainable(model: nn.Module, *, head_only: bool) -> list[nn.Parameter]:
    """The parameters to optimise; with `head_only` the others are frozen and get no gradient."""
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

    def __init__(self, compute: Compute) -> None:
        self._first = torch.zeros((), dtype=torch.int64, device=compute.device)
        self._every = 1 if compute.device.type == "cpu" else CHECK_EVERY

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


def _descend(optimizer: Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def pretrain(
    model: nn.Module,
    bank: MemoryBank,
    criterion: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    schedule: Schedule,
    compute: Compute,
    *,
    first_step: int,
) -> Iterator[Step]:
    """Instance discrimination over `batches`, one optimizer step and bank update each.

    Yields:
        A `Step` after each of them.

    Raises:
        FloatingPointError: naming the first step whose loss is not finite.
    """
    model.train()
    criterion.train()
    watch = _LossWatch(compute)
    for number, batch in enumerate(batches, first_step):
        with compute.autocast():
            embeddings = model(batch.images)
        loss = criterion(embeddings, batch.indexes, bank.memory, number)
        watch.see(loss.detach(), number + 1)
        lr = schedule(number)
        _descend(optimizer, loss, lr)
        bank.update(batch.indexes, embeddings.detach())
        yield Step(number, lr, loss.detach(), len(batch.indexes))
    watch.check()


def finetune(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Batch, Tensor]],
    labels: Tensor,
    weights: Tensor,
    schedule: Schedule,
    compute: Compute,
    *,
    first_step: int,
    head_only: bool = False,
) -> Iterator[Step]:
    """Supervised training on labels and pseudo-labels.

    Args:
        criterion: loss per example (`reduction="none"`).
        batches: batches with each row's position in `labels` and `weights`.
        labels: class number per training example.
        weights: weight of each example's loss; ones, or the confidence (equation 6 of the paper).
        head_only: keep everything but the last layer as it is, BatchNorm statistics included.

    Yields:
        A `Step` after each optimizer step.

    Raises:
        FloatingPointError: naming the first step whose loss is not finite.
    """
    model.train(not head_only)
    watch = _LossWatch(compute)
    for number, (batch, positions) in enumerate(batches, first_step):
        with compute.autocast():
            outputs = model(batch.images)
        target = labels[positions].to(compute.device)
        weight = weights[positions].to(compute.device)
        loss = (criterion(outputs.float(), target) * weight).mean()
        watch.see(loss.detach(), number + 1)
        lr = schedule(number)
        _descend(optimizer, loss, lr)
        yield Step(number, lr, loss.detach(), len(target))
    watch.check()


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageSet, compute: Compute, *, gray: bool = False
) -> dict[str, float]:
    """Accuracy of a classifier on every image of `data` once.

    Returns:
        `top1` and `top5` in percent, and the mean cross-entropy `loss`.
    """
    was_training = model.training
    model.eval()
    augmentation = Augmentation((), data.stats, gray=gray)
    outputs = []
    for batch in in_order(data, augmentation, compute):
        with compute.autocast():
            outputs.append(model(batch.images).float())
    model.train(was_training)
    scores, targets = torch.cat(outputs), data.targets.to(compute.device)
    top1, top5 = top_k_accuracy(scores, targets)
    return {"top1": top1, "top5": top5, "loss": F.cross_entropy(scores, targets).item()}


def knn_monitor(
    model: nn.Module,
    bank: Tensor,
    bank_labels: Tensor,
    test: ImageSet,
    compute: Compute,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> dict[str, float]:
    """kNN accuracy in percent of test images among the rows of `bank`, which is only read.

    Returns:
        `top1` and `top5`.
    """
    features = extract(model, test, compute).to(compute.device)
    votes = classify(features, bank, bank_labels, test.num_classes, k=k, temperature=temperature)
    top1, top5 = top_k_accuracy(votes, test.targets)
    return {"top1": top1, "top5": top5}
