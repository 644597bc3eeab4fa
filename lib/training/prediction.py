"""A trained classifier on new pictures: read from its checkpoint, applied, written as a table."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.cifar import CIFAR
from datasets.files import FileSet
from datasets.folder import read_images
from datasets.images import IMAGENET_STATS, UNKNOWN, Stats
from datasets.listing import IMG_EXTENSIONS, image_files
from datasets.patches import STATS as PATCHES_STATS
from datasets.transforms import Augmentation
from lib.features.extraction import rebuild, recorded_size
from lib.files import checkpoint
from lib.labels.pseudo_labels import PseudoLabels
from lib.loading.batches import in_order
from lib.runtime.devices import Device
from lib.runtime.distributed import all_gather_rows, progress_bar, share
from models.resnet import ImageNetResNet

STATS = {name: stats for name, (_, stats) in CIFAR.items()} | {"patches": PATCHES_STATS}
BLOCK_BYTES = 256 * 2**20  # of decoded pictures at a time


@dataclass(frozen=True)
class Classifier:
    """A network and what it expects and answers.

    Attributes:
        model: on the CPU.
        classes: a name for each of its outputs.
        image_size: side of its images in pixels.
        stats: mean and standard deviation that its images were normalized with.
        gray: whether it reads gray images.
        from_files: whether its test images were read as a `FileSet`, which cuts a margin off; those held
            in memory are shown whole.
    """

    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    stats: Stats
    gray: bool
    from_files: bool


def load_classifier(path: str | Path, architecture: str = "") -> Classifier:
    """The classifier in a checkpoint of phase 3.

    Args:
        path: what `cifar-semi.py` or `imagenet-semi.py` wrote.
        architecture: needed where the checkpoint does not name it (the published ones do not).

    Raises:
        ValueError: if it holds no classifier, does not name its network, or does not fit it.
    """
    state = checkpoint.load_dict(path)
    if "lemniscate" in state:
        raise ValueError(
            f"{path} is a metric of phase 1, no classifier; train one from it with cifar-semi.py or "
            "imagenet-semi.py"
        )
    model = rebuild(state, path, architecture)
    num_classes = getattr(model, model.head_name).out_features
    classes = tuple(state.get("classes") or map(str, range(num_classes)))
    if len(classes) != num_classes:
        raise ValueError(f"{path}: {len(classes)} class names for {num_classes} outputs")
    imagenet = isinstance(model, ImageNetResNet)
    options = state.get("meta", {}).get("options", {})
    dataset = options.get("dataset", "folder" if imagenet else "cifar10")
    return Classifier(
        model,
        classes,
        recorded_size(state, imagenet=imagenet),
        STATS.get(dataset, IMAGENET_STATS),
        gray=model.conv1.in_channels == 1,
        from_files=imagenet and dataset == "folder",
    )


def pictures(folder: str | Path, classifier: Classifier) -> FileSet:
    """All pictures below a folder, at any depth, in the order of their paths; no label is known.

    Raises:
        ValueError: if there is no such folder or no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name one with pictures in it")
    paths = tuple(os.path.relpath(file, root) for file in image_files(root))
    if not paths:
        raise ValueError(f"{root} holds no picture ({', '.join(IMG_EXTENSIONS)})")
    unknown = torch.full((len(paths),), UNKNOWN)
    facts = (classifier.classes, classifier.stats, classifier.image_size)
    return FileSet("folder", root, paths, unknown, *facts)


@dataclass(frozen=True)
class Predictions:
    """The most probable classes of each picture, the best first.

    Attributes:
        labels: N x K class numbers.
        confidence: N x K, their probabilities.
    """

    labels: Tensor
    confidence: Tensor

    def as_pseudo_labels(self) -> PseudoLabels:
        """The best class of each picture as pseudo-labels without any labeled image."""
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
    """This process's pictures as the network saw its test images, in order, read bit by bit."""
    augmentation = Augmentation((), classifier.stats, gray=classifier.gray)
    if classifier.from_files:
        for batch in in_order(data, augmentation, device, batch_size, num_workers):
            yield batch.images
        return
    files = [str(data.root / path) for path in data.paths[share().rows(len(data))]]
    at_once = max(batch_size, BLOCK_BYTES // (3 * classifier.image_size**2))
    for start in range(0, len(files), at_once):
        block = files[start : start + at_once]
        images, _ = read_images(block, classifier.image_size, num_workers)
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
    """Classify every picture; of several processes each takes its part, and all get the whole answer.

    Args:
        top: classes to keep of each picture, cut down to the number there is.
        batch_size: pictures at a time, of each process.
        num_workers: processes that decode image files, of each process.

    Raises:
        ValueError: naming a picture that cannot be read, or if the network's outputs are not finite.
    """
    model = device.prepare(classifier.model).eval()
    top = min(top, len(classifier.classes))
    labels = [torch.empty(0, top, dtype=torch.int64, device=device.torch_device)]
    confidence = [torch.empty(0, top, device=device.torch_device)]
    mine = share().rows(len(data))
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
    parts = (torch.cat(labels), torch.cat(confidence))
    return Predictions(*(all_gather_rows(part, len(data)).cpu() for part in parts))


def table(paths: Sequence[str], predictions: Predictions, classes: Sequence[str]) -> str:
    """CSV with the columns path, class, confidence, and class_2, confidence_2 ... where there are more."""
    heads = ["path", "class", "confidence"]
    for place in range(2, predictions.labels.shape[1] + 1):
        heads += [f"class_{place}", f"confidence_{place}"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    rows = zip(paths, predictions.labels.tolist(), predictions.confidence.tolist(), strict=True)
    for path, labels, confidence in rows:
        answers = zip(labels, confidence, strict=True)
        writer.writerow([path, *(x for k, c in answers for x in (classes[k], f"{c:.6f}"))])
    return buffer.getvalue()
