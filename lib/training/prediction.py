"""Prediction: a classifier is loaded from its checkpoint and applied to new pictures, to write a table."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.files import FileSet
from datasets.folder import read_images
from datasets.images import UNKNOWN
from datasets.listing import IMG_EXTENSIONS, image_files
from datasets.resizing import Resizing
from datasets.transforms import Augmentation
from lib.features.networks import load_network
from lib.files import published
from lib.files.description import Description
from lib.files.published import is_metric
from lib.labels.pseudo_labels import PseudoLabels
from lib.loading.batches import in_order
from lib.runtime.devices import Device
from lib.runtime.distributed import all_gather_rows, progress_bar, shard

BLOCK_BYTES = 256 * 2**20  # size of the pictures decoded at a time


@dataclass(frozen=True)
class Classifier:
    """A network, and its description with a name for every class."""

    model: nn.Module
    description: Description


def load_classifier(path: str | Path, architecture: str = "") -> Classifier:
    """Load the classifier in a checkpoint of phase 3, whose `architecture` the published ones do not name.

    Raises:
        ValueError: if it holds no classifier, does not name its network, or does not fit it.
    """
    state = published.load(path)
    if is_metric(state):
        raise ValueError(
            f"{path} is a metric of phase 1, no classifier; train one from it with cifar-semi.py or "
            "imagenet-semi.py"
        )
    model, found = load_network(state, path, architecture)
    num_classes = model.out_features
    classes = found.classes or tuple(map(str, range(num_classes)))
    if len(classes) != num_classes:
        raise ValueError(f"{path}: {len(classes)} class names for {num_classes} outputs")
    return Classifier(model, replace(found, classes=classes))


def pictures(folder: str | Path, classifier: Classifier) -> FileSet:
    """List the pictures at any depth below a folder by path, without labels; ValueError if there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name one with pictures in it")
    paths = tuple(os.path.relpath(file, root) for file in image_files(root))
    if not paths:
        raise ValueError(f"{root} holds no picture ({', '.join(IMG_EXTENSIONS)})")
    unknown = torch.full((len(paths),), UNKNOWN)
    found = classifier.description
    resizing = Resizing(found.resize) if found.has_margin else None
    return FileSet(
        "folder", root, paths, unknown, found.classes, found.stats, found.image_size, resizing
    )


@dataclass(frozen=True)
class Predictions:
    """The K most probable classes of each picture, the best first, and their probabilities: N x K."""

    labels: Tensor
    confidence: Tensor

    def as_pseudo_labels(self) -> PseudoLabels:
        """Return the best class of each picture as pseudo-labels without any labeled image."""
        order = self.confidence[:, 0].argsort(descending=True, stable=True)
        return PseudoLabels(
            order,
            self.labels[order, 0],
            self.confidence[order, 0],
            torch.empty(0, dtype=torch.int64),
            torch.arange(len(order)),
        )


def _batches(
    classifier: Classifier, data: FileSet, device: Device, batch_size: int, num_workers: int
) -> Iterator[Tensor]:
    """Yield this process's pictures in order, preprocessed as the network's test images were."""
    found = classifier.description
    augmentation = Augmentation((), found.stats, luma=found.luma)
    if found.has_margin:  # the test images were read from files, too
        for batch in in_order(data, augmentation, device, batch_size, num_workers):
            yield batch.images
        return
    files = [str(data.root / path) for path in data.paths[shard(len(data))]]
    at_once = max(batch_size, BLOCK_BYTES // (3 * found.image_size**2))
    for start in range(0, len(files), at_once):
        block = files[start : start + at_once]
        images, _ = read_images(block, found.image_size, num_workers)
        for part in images.split(batch_size):
            yield augmentation(part.to(device.torch_device))


@torch.no_grad()
def predict(
    classifier: Classifier,
    data: FileSet,
    device: Device,
    *,
    top: int = 1,
    batch_size: int = 500,
    num_workers: int = 0,
) -> Predictions:
    """Find the `top` classes of every picture; each process takes its shard, and all return the whole result.

    Raises:
        ValueError: if a picture cannot be read, naming it, or the network's outputs are not finite.
    """
    model = device.prepare(classifier.model).eval()
    top = min(top, len(classifier.description.classes))
    labels = [torch.empty(0, top, dtype=torch.int64, device=device.torch_device)]
    confidence = [torch.empty(0, top, device=device.torch_device)]
    mine = shard(len(data))
    with progress_bar(total=mine.stop - mine.start, desc="predicting", unit="img") as bar:
        for images in _batches(classifier, data, device, batch_size, num_workers):
            with device.autocast():
                outputs = model(images)
            if not outputs.isfinite().all():
                raise ValueError("the network gives NaN or infinity; the checkpoint is damaged")
            best = outputs.float().softmax(dim=1).topk(top, dim=1)
            labels.append(best.indices)
            confidence.append(best.values)
            bar.update(len(images))
    return Predictions(
        all_gather_rows(torch.cat(labels), len(data)).cpu(),
        all_gather_rows(torch.cat(confidence), len(data)).cpu(),
    )


def table(paths: Sequence[str], predictions: Predictions, classes: Sequence[str]) -> str:
    """Format predictions as CSV: path, class, confidence, class_2, confidence_2 ..."""
    heads = ["path", "class", "confidence"]
    for place in range(2, predictions.labels.shape[1] + 1):
        heads += [f"class_{place}", f"confidence_{place}"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    rows = zip(paths, predictions.labels.tolist(), predictions.confidence.tolist(), strict=True)
    for path, labels, confidence in rows:
        cells = [path]
        for label, probability in zip(labels, confidence, strict=True):
            cells += [classes[label], f"{probability:.6f}"]
        writer.writerow(cells)
    return buffer.getvalue()
