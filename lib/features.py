"""Embeddings of a whole data set: extracted once, in evaluation mode, kept in a file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import DataSet, build_datasets
from datasets.transforms import Augmentation
from lib import checkpoint
from lib.devices import Compute, select
from lib.distributed import all_gather_rows, is_main, share, share_buffers
from lib.files import sha256_of
from lib.loader import in_order
from models import build_model
from models.layers import l2_normalize
from models.resnet import STEM, ImageNetResNet


@torch.no_grad()
def extract(
    model: nn.Module,
    data: DataSet,
    compute: Compute,
    *,
    gray: bool = False,
    batch_size: int = 500,
    num_workers: int = 0,
) -> Tensor:
    """Unit-norm embeddings of every image, N x D float32 on the CPU; of several processes, on each.

    The model runs in evaluation mode (BatchNorm uses its running statistics, those of rank 0) and is
    handed back in the mode it came in. Each process computes its part of the rows.

    Args:
        gray: for networks that read gray images.
        batch_size: images at a time, of each process.
        num_workers: processes that decode image files, of each process.
    """
    was_training = model.training
    model.eval()
    share_buffers(model)
    augmentation = Augmentation((), data.stats, gray=gray)
    batches = in_order(data, augmentation, compute, batch_size=batch_size, num_workers=num_workers)
    mine = share().rows(len(data))
    rows = [torch.empty(0, getattr(model, model.head_name).out_features)]
    hidden = None if is_main() else True
    with tqdm(
        total=mine.stop - mine.start, desc="features", unit="img", leave=False, disable=hidden
    ) as bar:
        for batch in batches:
            with compute.autocast():
                rows.append(l2_normalize(model(batch.images)).cpu())
            bar.update(len(batch.indexes))
    model.train(was_training)
    return all_gather_rows(torch.cat(rows), len(data))


def check(features: Tensor, num_images: int | None = None, *, source: str = "features") -> Tensor:
    """Features as N x D float32 unit vectors.

    Raises:
        ValueError: if they are no finite N x D numbers, or not one row per image.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{source}: expected a matrix of floats, one row per image")
    if not features.numel():
        raise ValueError(f"{source}: there are no rows, or rows of no numbers")
    features = features.float()  # before the check: a large float64 becomes infinite here
    if num_images is not None and len(features) != num_images:
        raise ValueError(f"{source}: {len(features)} rows for a data set of {num_images} images")
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{source}: {int(bad.sum())} rows hold NaN or infinity, the first is row "
            f"{int(bad.int().argmax())}"
        )
    return l2_normalize(features)


@dataclass(frozen=True)
class FeatureSet:
    """What propagation starts from.

    Attributes:
        features: N x D float32 unit vectors.
        targets: N int64, `UNKNOWN` where no label is known.
        num_classes: C.
        digest: of the data set, empty where the file does not tell.
    """

    features: Tensor
    targets: Tensor
    num_classes: int
    digest: str = ""

    def state(self, **meta: Any) -> dict[str, Any]:
        """The published keys `train_features` and `train_labels`, and `meta`."""
        facts = {"num_classes": self.num_classes, "data_digest": self.digest}
        return {
            "train_features": self.features,
            "train_labels": self.targets,
            "meta": facts | meta,
        }


def read(path: str | Path) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Read a feature file of any published kind.

    Known are `train_features`/`train_labels` (CIFAR), `features`/`labels`, `val_features`/`val_labels`
    (ImageNet) and one bare N x D tensor (colorization).

    Returns:
        Unit-norm features N x D; labels N or None where the file has none; the `meta` record.

    Raises:
        ValueError: if the file is missing, holds no features, or not one label per row.
    """
    state = checkpoint.load(path)
    if isinstance(state, Tensor):
        return check(state, source=str(path)), None, {}
    for prefix in ("train_", "", "val_"):
        if not isinstance(state, dict) or f"{prefix}features" not in state:
            continue
        features = check(state[f"{prefix}features"], source=str(path))
        labels = state.get(f"{prefix}labels")
        if labels is not None and not (isinstance(labels, Tensor) and labels.ndim == 1):
            raise ValueError(f"{path}: the labels must be a tensor with one number per row")
        if labels is not None and len(labels) != len(features):
            raise ValueError(f"{path}: {len(labels)} labels for {len(features)} rows of features")
        labels = None if labels is None else labels.long()
        meta = state.get("meta")
        return features, labels, meta if isinstance(meta, dict) else {}
    raise ValueError(f"{path} holds no features (train_features, features or val_features)")


def load_embedding(path: str | Path, architecture: str = "") -> nn.Module:
    """The network of phase 1 in a checkpoint, for small images or ImageNet's, its sizes read off the weights.

    Args:
        architecture: needed where the checkpoint does not name it (the published ones for CIFAR do not).

    Raises:
        ValueError: if the file does not fit that network.
    """
    return _network(checkpoint.load_dict(path), path, architecture)


def _network(state: Mapping[str, Any], path: str | Path, architecture: str) -> nn.Module:
    weights = checkpoint.model_weights(state, path)
    name = architecture or state.get("architecture") or state.get("arch") or "wrn-28-2"
    out_features = next((len(weights[k]) for k in ("fc.bias", "linear.bias") if k in weights), 128)
    _, channels, stem, _ = (
        weights["conv1.weight"].shape if "conv1.weight" in weights else (0, 3, 3, 0)
    )
    words = {"in_channels": channels, "normalize": True, "imagenet": stem == STEM}
    model = build_model(name, out_features, **words)
    checkpoint.load_weights(model, weights, source=path)
    return model


def _image_size(state: Mapping[str, Any], *, imagenet: bool) -> int:
    """The side of the images that a network of phase 1 was trained on."""
    options = state.get("meta", {}).get("options", {})
    return int(options.get("image_size", 224 if imagenet else 32))


def _from_file(path: str | Path, dataset: str, data_dir: str, **keywords: int) -> FeatureSet:
    features, targets, meta = read(path)
    if targets is None:  # the labels are the data set's, if the rows can be its images
        data, _ = build_datasets(dataset, data_dir, **keywords)
        check(features, len(data), source=str(path))
        return FeatureSet(features, data.targets, data.num_classes, data.digest)
    num_classes = meta.get("num_classes", int(targets.max()) + 1)
    return FeatureSet(features, targets, num_classes, meta.get("data_digest", ""))


def obtain(
    *,
    features: str | Path = "",
    checkpoint_file: str | Path = "",
    architecture: str = "",
    dataset: str = "cifar10",
    data_dir: str = "./data",
    image_size: int | None = None,
    num_workers: int = 2,
    compute: Compute | None = None,
) -> FeatureSet:
    """The features to propagate through: read from a file, or extracted once and kept.

    An extraction is kept beside the checkpoint as `<name>.<dataset>.features.pth.tar`, together with the
    digests of the checkpoint and the data set, and used again only while both are the same. For one of
    ImageNet's networks the images of a folder stay in their files.

    Args:
        features: a feature file; skips extraction.
        checkpoint_file: a checkpoint of phase 1, if there is no feature file.
        architecture: its network, where the file does not name it.
        dataset, data_dir, num_workers: as in `datasets.build_datasets`.
        image_size: side of the images; None: as in training.
        compute: device to extract on.

    Raises:
        ValueError: if neither file is given, or one does not fit.
    """
    if features:
        words = {"image_size": image_size or 32, "num_workers": num_workers}
        return _from_file(features, dataset, data_dir, **words)
    if not checkpoint_file:
        raise ValueError("give features (a file) or checkpoint (of phase 1) to start from")
    state = checkpoint.load_dict(checkpoint_file)
    model = _network(state, checkpoint_file, architecture)
    imagenet = isinstance(model, ImageNetResNet)
    image_size = image_size or _image_size(state, imagenet=imagenet)
    words = {"image_size": image_size, "num_workers": num_workers, "in_memory": not imagenet}
    data, _ = build_datasets(dataset, data_dir, **words)
    origin = sha256_of(Path(checkpoint_file)).hexdigest()[:16]
    key = {"checkpoint": origin, "image_size": image_size, "data_digest": data.digest}
    cache = Path(str(checkpoint_file).removesuffix(".pth.tar") + f".{dataset}.features.pth.tar")
    if cache.is_file():
        rows, _, meta = read(cache)
        if all(meta.get(name) == value for name, value in key.items()):
            return FeatureSet(rows, data.targets, data.num_classes, data.digest)
    compute = compute or select()
    gray = model.conv1.in_channels == 1
    rows = extract(compute.prepare(model), data, compute, gray=gray, num_workers=num_workers)
    # scaled once more, as reading the file does: the first run and the second get the same bits
    usable = check(rows, len(data), source=f"the features of {checkpoint_file}")
    extracted = FeatureSet(rows, data.targets, data.num_classes, data.digest)
    if is_main():
        checkpoint.save(extracted.state(**key), cache)
    return replace(extracted, features=usable)
