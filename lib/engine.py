"""The loops. They compute and hand back numbers; printing, saving and the order are the scripts'."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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
    """
    model.train()
    criterion.train()
    for number, batch in enumerate(batches, first_step):
        with compute.autocast():
            embeddings = model(batch.images)
        loss = criterion(embeddings, batch.indexes, bank.memory, number)
        lr = schedule(number)
        _descend(optimizer, loss, lr)
        bank.update(batch.indexes, embeddings.detach())
        yield Step(number, lr, loss.detach(), len(batch.indexes))


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
    """
    model.train(not head_only)
    for number, (batch, positions) in enumerate(batches, first_step):
        with compute.autocast():
            outputs = model(batch.images)
        target = labels[positions].to(compute.device)
        weight = weights[positions].to(compute.device)
        loss = (criterion(outputs.float(), target) * weight).mean()
        lr = schedule(number)
        _descend(optimizer, loss, lr)
        yield Step(number, lr, loss.detach(), len(target))


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
