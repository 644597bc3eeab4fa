"""Accuracy of a classifier, and of a metric by its nearest neighbors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import UNKNOWN, DataSet
from datasets.transforms import Augmentation
from lib.features.extraction import extract
from lib.files.description import NUM_NEIGHBORS, TEMPERATURE
from lib.graph.knn import accuracy, topk_correct
from lib.loading.batches import in_order
from lib.objectives.classification import at_least_float32
from lib.runtime.devices import Device
from lib.runtime.distributed import all_reduce_sum, share_buffers


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: DataSet,
    device: Device,
    *,
    gray: bool = False,
    num_workers: int = 0,
) -> dict[str, float]:
    """Measure a classifier once on every labeled image of `data`, each process on its shard.

    All processes take over BatchNorm's running statistics of rank 0.

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
    """Measure `lib.graph.knn.accuracy` of the test images among the rows of `bank`, which stays as it is."""
    features = extract(model, test, device, batch_size=batch_size, num_workers=num_workers)
    queries = features.to(device.torch_device)
    return accuracy(
        queries,
        test.targets,
        bank,
        bank_labels,
        test.num_classes,
        k=NUM_NEIGHBORS,
        temperature=TEMPERATURE,
    )
