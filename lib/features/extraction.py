"""Extraction of the embeddings of a whole data set: once, in evaluation mode, cached in a file."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import UNKNOWN, DataSet, build_datasets
from datasets.transforms import Augmentation
from lib.features import backbones
from lib.features.networks import load_network
from lib.files import checkpoint, provenance, published, schema
from lib.files.atomic import sha256_of
from lib.files.description import METRIC
from lib.files.published import SMALL_SIZE
from lib.files.schema import INTEGERS, list_of, record, tensor, text, whole
from lib.loading.batches import in_order
from lib.runtime.devices import Device, select
from lib.runtime.distributed import (
    all_gather_rows,
    any_process,
    evaluation_mode,
    is_main,
    own_workers,
    progress_bar,
    shard,
)
from models.layers import l2_normalize, off_unit_sphere

KEPT = Path("checkpoint/backbones")  # cached features of torchvision's and timm's networks
PREFIXES = ("train_", "", "val_")  # of the published names
SCHEMA = {
    **{f"{prefix}labels": tensor(1, INTEGERS, UNKNOWN) for prefix in PREFIXES},
    "meta": record({"num_classes": whole(0), "classes": list_of(text), "data_digest": text}),
}
BACKBONE_BATCH = 100  # images of 224 pixels a side and more, whatever the size in the data set


@torch.no_grad()
def extract(
    model: nn.Module,
    data: DataSet,
    device: Device,
    *,
    batch_size: int = 500,
    num_workers: int = 0,
    preprocessing: Augmentation | None = None,
) -> Tensor:
    """Extract the unit-norm embeddings of every image, N x D float32 on the CPU of every process.

    Each process computes its shard of the rows, in evaluation mode with rank 0's running statistics.
    `preprocessing` of None normalizes the images by the data set's mean and std.
    """
    augmentation = preprocessing or Augmentation((), data.stats)
    batches = in_order(data, augmentation, device, batch_size=batch_size, num_workers=num_workers)
    mine = shard(len(data))
    rows = [torch.empty(0, model.out_features)]
    bar = progress_bar(total=mine.stop - mine.start, desc="features", unit="img")
    with evaluation_mode(model), bar:
        for batch in batches:
            with device.autocast():
                rows.append(l2_normalize(model(batch.images)).cpu())
            bar.update(len(batch.indexes))
    return all_gather_rows(torch.cat(rows), len(data))


def check(
    features: Tensor,
    num_images: int | None = None,
    *,
    source: str = "features",
    normalize: bool = True,
) -> Tensor:
    """Return N x D float32 unit vectors; ValueError if they are not finite, or not one row per image.

    Without `normalize` the rows keep their lengths.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{source}: expected a matrix of floats, one row per image")
    if not features.numel():
        raise ValueError(f"{source}: there are no rows or no columns; extract the features anew")
    features = features.float()  # precedes the check, because a large float64 becomes infinite
    if num_images is not None and len(features) != num_images:
        raise ValueError(f"{source}: {len(features)} rows for a data set of {num_images} images")
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{source}: {int(bad.sum())} rows hold NaN or infinity, the first is row "
            f"{int(bad.int().argmax())}"
        )
    return l2_normalize(features) if normalize else features


@dataclass(frozen=True)
class FeatureSet:
    """The features (N x D float32) and labels (N int64 or `UNKNOWN`) for propagation.

    The features are unit vectors, or the rows of a file as they are. The digest of the data set, the class
    names and the files of the images may be empty.
    """

    features: Tensor
    targets: Tensor
    num_classes: int
    digest: str = ""
    classes: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def state(self, **meta: Any) -> dict[str, Any]:
        """Return the published keys `train_features` and `train_labels`, and `meta`."""
        facts = {
            "num_classes": self.num_classes,
            "data_digest": self.digest,
            "classes": list(self.classes),
        }
        return {
            "train_features": self.features,
            "train_labels": self.targets,
            "meta": facts | provenance.made_by() | meta,
        }


def read(
    path: str | Path, *, normalize: bool = True
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Read N x D unit-norm features, N labels or None, and the `meta` record of a file.

    It holds `train_features`/`train_labels` (CIFAR), `features`/`labels`, `val_features`/`val_labels`
    (ImageNet) or one bare N x D tensor (colorization). Without `normalize` the rows keep their lengths.

    Raises:
        ValueError: if it is missing, holds no features, or not one label per row.
    """
    state = checkpoint.load(path)
    if isinstance(state, Tensor):
        return check(state, source=str(path), normalize=normalize), None, {}
    state = state if isinstance(state, dict) else {}
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}features" in state), None)
    if prefix is None:
        raise ValueError(f"{path} holds no features (train_features, features or val_features)")
    schema.require(state, SCHEMA, path)
    features = check(state[f"{prefix}features"], source=str(path), normalize=normalize)
    labels, meta = state.get(f"{prefix}labels"), state.get("meta", {})
    if labels is None:
        return features, None, meta
    if len(labels) != len(features):
        raise ValueError(f"{path}: {len(labels)} labels for {len(features)} rows of features")
    largest, names = int(labels.max()), meta.get("classes", [])
    num_classes = meta.get("num_classes", largest + 1)
    if not largest < num_classes <= (len(names) or len(labels)):
        raise ValueError(
            f"{path}: {num_classes} classes for {len(labels)} rows, {len(names)} names and labels up to "
            f"{largest}"
        )
    return features, labels.long(), meta


def _report_lengths(features: Tensor, path: str | Path, normalize: bool) -> None:
    """Print how many rows are off the unit sphere, how far, and what becomes of them; nothing if none is."""
    off = off_unit_sphere(features)
    if off.any() and is_main():
        low, high = features[off].norm(dim=1).aminmax()
        done = (
            "scaled to unit length" if normalize else "left as they are, similarities are products"
        )
        print(
            f"{path}: {int(off.sum())} of {len(features)} rows are off the unit sphere, of norms "
            f"{low:.4g} to {high:.4g}; {done}",
            flush=True,
        )


def _from_file(path: str | Path, reading: dict[str, Any], normalize: bool) -> FeatureSet:
    features, targets, meta = read(path, normalize=False)
    _report_lengths(features, path, normalize)
    if normalize:
        features = l2_normalize(features)
    if targets is None:  # the data set gives the labels, if it has as many images as there are rows
        data, _ = build_datasets(in_memory=False, **reading)
        check(features, len(data), source=str(path), normalize=False)
        facts = data.portable_digest, data.classes, data.paths
        return FeatureSet(features, data.targets, data.num_classes, *facts)
    num_classes = meta.get("num_classes", int(targets.max()) + 1)
    classes = tuple(meta.get("classes", ()))
    return FeatureSet(features, targets, num_classes, meta.get("data_digest", ""), classes)


@dataclass(frozen=True)
class _Extraction:
    """An extraction to do, and its cache, which is good where `key` is the same."""

    model: nn.Module
    data: DataSet
    cache: Path
    key: dict[str, Any]
    digest: str
    options: dict[str, Any]


def _of_checkpoint(
    path: str | Path, architecture: str, image_size: int | None, reading: dict[str, Any]
) -> _Extraction:
    state = published.load(path)
    model, found = load_network(state, path, architecture, unsaid=METRIC)
    size = image_size or found.image_size
    data, _ = build_datasets(image_size=size, in_memory=not found.is_imagenet, **reading)
    origin = sha256_of(Path(path))[:16]
    key = {"checkpoint": origin, "image_size": size, "data_digest": data.digest}
    cache = Path(str(path).removesuffix(".pth.tar") + f".{reading['name']}.features.pth.tar")
    options: dict[str, Any] = {}
    if found.is_gray:
        key["luma"] = list(found.luma)
        options["preprocessing"] = Augmentation((), found.stats, luma=found.luma)
    return _Extraction(model, data, cache, key, data.digest, options)


def _of_backbone(path: str | Path, architecture: str, reading: dict[str, Any]) -> _Extraction:
    found, dataset = backbones.build(architecture, path), reading["name"]
    view = found.preprocessing
    if dataset == "folder":
        reading = {**reading, "image_size": view.resizing.shorter}
    data, _ = build_datasets(in_memory=False, **reading)
    data = data.resized_by(view.resizing)
    key = {"backbone": found.digest, "images": data.digest}
    cache = KEPT / f"{re.sub('[:@/]', '_', architecture)}.{dataset}.features.pth.tar"
    options = {"preprocessing": view, "batch_size": BACKBONE_BATCH}
    return _Extraction(found.model, data, cache, key, data.portable_digest, options)


def load_or_extract(
    *,
    features: str | Path = "",
    normalize: bool = True,
    checkpoint_file: str | Path = "",
    architecture: str = "",
    dataset: str = "cifar10",
    data_dir: str = "./data",
    image_size: int | None = None,
    num_workers: int = 2,
    device: Device | None = None,
) -> FeatureSet:
    """Read the features to propagate through from a file, or extract them once and cache them.

    The cache lies beside the checkpoint as `<name>.<dataset>.features.pth.tar`, that of a library's network
    in `checkpoint/backbones/`, and is used again only while network and data set are the same. For ImageNet's
    networks and those of a library the images of a folder stay in their files.

    Args:
        features: feature file, which skips extraction.
        normalize: scale the rows of that file to unit length; a network's embeddings always are.
        checkpoint_file: checkpoint of phase 1, or weights of a library's network (empty: the published ones).
        architecture: network of phase 1, if the file does not name it; or a library's network, as in
            `lib.features.backbones`: `torchvision:resnet50`, `timm:...`.
        image_size: None takes that of training. A library's network always has its own.
        num_workers: processes that decode image files, on each machine.

    Raises:
        ValueError: if neither file nor architecture is given, or one does not fit.
    """
    num_workers = own_workers(num_workers)
    reading = {"name": dataset, "data_dir": data_dir, "num_workers": num_workers}
    if features:
        return _from_file(features, {**reading, "image_size": image_size or SMALL_SIZE}, normalize)
    if backbones.is_external(architecture):
        wanted = _of_backbone(checkpoint_file, architecture, reading)
    elif checkpoint_file:
        wanted = _of_checkpoint(checkpoint_file, architecture, image_size, reading)
    else:
        raise ValueError(
            "give features (a file), checkpoint (of phase 1) or architecture (torchvision:NAME, timm:NAME)"
        )

    data, cache = wanted.data, wanted.cache
    facts = wanted.digest, data.classes, data.paths
    found = FeatureSet(torch.empty(0), data.targets, data.num_classes, *facts)
    rows, _, meta = read(cache) if cache.is_file() else (None, None, {})
    missing = rows is None or any(meta.get(name) != value for name, value in wanted.key.items())
    if not any_process(missing):  # a rank without the file must not extract alone
        return replace(found, features=rows)
    device = device or select()
    model = device.prepare(wanted.model)
    rows = extract(model, data, device, num_workers=num_workers, **wanted.options)
    # normalized once more, as when the file is read: the first run and the second get the same bits
    usable = check(rows, len(data), source=f"the features for {cache}")
    if is_main():
        checkpoint.save(replace(found, features=rows).state(**wanted.key), cache)
    return replace(found, features=usable)
