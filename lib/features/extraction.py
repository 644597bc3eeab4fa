"""Embeddings of a whole data set: extracted once, in evaluation mode, kept in a file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import DataSet, FileSet, build_datasets
from datasets.files import Resizing
from datasets.transforms import Augmentation
from lib.features import backbones
from lib.files import checkpoint, provenance
from lib.files.atomic import sha256_of
from lib.files.weights import load_weights, model_weights
from lib.loading.batches import in_order
from lib.runtime.devices import Device, select
from lib.runtime.distributed import (
    all_gather_rows,
    any_process,
    is_main,
    own_workers,
    progress_bar,
    share,
    share_buffers,
)
from models import build_model
from models.layers import l2_normalize
from models.resnet import STEM, ImageNetResNet

SMALL_SIZE, IMAGENET_SIZE = 32, 224  # of images, for a checkpoint that does not record its own
KEPT = Path("checkpoint/backbones")  # features of networks that come from no file of the project
METRIC = {"default": "wrn-28-2", "normalize": True}  # how networks of phase 1 are rebuilt
BACKBONE_BATCH = 100  # their images have 224 pixels a side and more, whatever the data set's have


@torch.no_grad()
def extract(
    model: nn.Module,
    data: DataSet,
    device: Device,
    *,
    gray: bool = False,
    batch_size: int = 500,
    num_workers: int = 0,
    preprocessing: Augmentation | None = None,
) -> Tensor:
    """Unit-norm embeddings of every image, N x D float32 on the CPU; of several processes, on each.

    The model runs in evaluation mode (BatchNorm uses its running statistics, those of rank 0) and is
    handed back in the mode it came in. Each process computes its part of the rows.

    Args:
        gray: for networks that read gray images.
        batch_size: images at a time, of each process.
        num_workers: processes that decode image files, of each process.
        preprocessing: what `model` wants done to the images; None: normalized as the data set says.
    """
    was_training = model.training
    model.eval()
    share_buffers(model)
    augmentation = preprocessing or Augmentation((), data.stats, gray=gray)
    batches = in_order(data, augmentation, device, batch_size=batch_size, num_workers=num_workers)
    mine = share().rows(len(data))
    rows = [torch.empty(0, getattr(model, model.head_name).out_features)]
    with progress_bar(total=mine.stop - mine.start, desc="features", unit="img") as bar:
        for batch in batches:
            with device.autocast():
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
        digest: of the data set, empty where it is not known.
        classes: their names, empty where they are not known.
    """

    features: Tensor
    targets: Tensor
    num_classes: int
    digest: str = ""
    classes: tuple[str, ...] = ()

    def state(self, **meta: Any) -> dict[str, Any]:
        """The published keys `train_features` and `train_labels`, and `meta`."""
        facts = {"num_classes": self.num_classes, "data_digest": self.digest}
        facts["classes"] = list(self.classes)
        return {
            "train_features": self.features,
            "train_labels": self.targets,
            "meta": facts | provenance.made_by() | meta,
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
    return rebuild(checkpoint.load_dict(path), path, architecture, **METRIC)


def rebuild(
    state: Mapping[str, Any],
    path: str | Path,
    architecture: str = "",
    *,
    default: str = "",
    normalize: bool = False,
) -> nn.Module:
    """The network whose weights a checkpoint of any phase holds, its sizes read off them.

    Args:
        state: the checkpoint.
        path: its file, for messages.
        architecture: in place of the one that the checkpoint names.
        default: for a checkpoint that names none (the published ones for CIFAR).
        normalize: end on the unit sphere, as in phase 1.

    Raises:
        ValueError: if it holds no network of `models`, does not name it, or does not fit it.
    """
    weights = model_weights(state, path)
    name = architecture or state.get("architecture") or state.get("arch") or default
    if backbones.is_external(name) and "head.weight" in weights:
        model = backbones.classifier(name, len(weights["head.weight"]), weighted=False)
        load_weights(model, weights, source=path)
        return model
    head = next((weights[k] for k in ("fc.weight", "linear.weight") if k in weights), None)
    stem = weights.get("conv1.weight")
    if head is None or stem is None:
        raise ValueError(
            f"{path} holds no network that this project builds, from conv1 to its head"
        )
    if not name:
        raise ValueError(f"{path} does not say which network it is of: name it with --architecture")
    words = {"in_channels": stem.shape[1], "normalize": normalize}
    model = build_model(name, len(head), imagenet=stem.shape[-1] == STEM, **words)
    load_weights(model, weights, source=path)
    return model


def recorded_size(state: Mapping[str, Any], *, imagenet: bool) -> int:
    """The side of the images that the network in a checkpoint was trained on."""
    options = state.get("meta", {}).get("options", {})
    return int(options.get("image_size", IMAGENET_SIZE if imagenet else SMALL_SIZE))


def _unclaimed_digest(data: DataSet) -> str:
    """The digest to record for features that either script of phase 3 may train on: none of a folder.

    `cifar-semi.py` holds its images in memory and `imagenet-semi.py` in files, with different digests.
    """
    return "" if isinstance(data, FileSet) else data.digest


def _from_file(path: str | Path, dataset: str, data_dir: str, **keywords: int) -> FeatureSet:
    features, targets, meta = read(path)
    if targets is None:  # the labels are the data set's, if the rows can be its images
        data, _ = build_datasets(dataset, data_dir, in_memory=False, **keywords)
        check(features, len(data), source=str(path))
        facts = (data.num_classes, _unclaimed_digest(data), data.classes)
        return FeatureSet(features, data.targets, *facts)
    num_classes = meta.get("num_classes", int(targets.max()) + 1)
    names = meta.get("classes")
    classes = tuple(map(str, names)) if isinstance(names, list | tuple) else ()
    return FeatureSet(features, targets, num_classes, meta.get("data_digest", ""), classes)


@dataclass(frozen=True)
class _Extraction:
    """What is to be extracted, by which network, how, and where it is kept.

    Attributes:
        key: what must be the same for kept features to be used again.
        digest: of the data set, to be recorded.
        options: of `extract`.
    """

    model: nn.Module
    data: DataSet
    cache: Path
    key: dict[str, Any]
    digest: str
    options: dict[str, Any]


def _of_checkpoint(
    path: str | Path,
    architecture: str,
    dataset: str,
    data_dir: str,
    image_size: int | None,
    **reading: int,
) -> _Extraction:
    state = checkpoint.load_dict(path)
    model = rebuild(state, path, architecture, **METRIC)
    imagenet = isinstance(model, ImageNetResNet)
    reading["image_size"] = image_size or recorded_size(state, imagenet=imagenet)
    data, _ = build_datasets(dataset, data_dir, in_memory=not imagenet, **reading)
    origin = sha256_of(Path(path))[:16]
    key = {"checkpoint": origin, "image_size": reading["image_size"], "data_digest": data.digest}
    cache = Path(str(path).removesuffix(".pth.tar") + f".{dataset}.features.pth.tar")
    options = {"gray": model.conv1.in_channels == 1}
    return _Extraction(model, data, cache, key, data.digest, options)


def _of_backbone(
    path: str | Path, architecture: str, dataset: str, data_dir: str, **reading: int
) -> _Extraction:
    found = backbones.build(architecture, path)
    view = found.preprocessing
    if dataset == "folder":
        reading["image_size"] = view.resize
    data, _ = build_datasets(dataset, data_dir, in_memory=False, **reading)
    if isinstance(data, FileSet):
        data = replace(data, resizing=Resizing(view.resize, view.interpolation, view.squash))
    key = {"backbone": found.digest, "images": data.digest}
    cache = KEPT / f"{re.sub('[:@/]', '_', architecture)}.{dataset}.features.pth.tar"
    options = {"preprocessing": view, "batch_size": BACKBONE_BATCH}
    return _Extraction(found.model, data, cache, key, _unclaimed_digest(data), options)


def _kept(wanted: _Extraction) -> Tensor | None:
    """Kept features, if they are of this network and these images."""
    if not wanted.cache.is_file():
        return None
    rows, _, meta = read(wanted.cache)
    same = all(meta.get(name) == value for name, value in wanted.key.items())
    return rows if same else None


def _once(wanted: _Extraction, device: Device | None, num_workers: int) -> FeatureSet:
    """Kept features where they are of this network and these images, else extracted and kept."""
    data, cache = wanted.data, wanted.cache
    facts = (data.targets, data.num_classes, wanted.digest, data.classes)
    kept = _kept(wanted)
    missing = any_process(kept is None)  # a rank without the file must not extract alone
    if kept is not None and not missing:
        return FeatureSet(kept, *facts)
    device = device or select()
    model = device.prepare(wanted.model)
    rows = extract(model, data, device, num_workers=num_workers, **wanted.options)
    # scaled once more, as reading the file does: the first run and the second get the same bits
    usable = check(rows, len(data), source=f"the features for {cache}")
    extracted = FeatureSet(rows, *facts)
    if is_main():
        checkpoint.save(extracted.state(**wanted.key), cache)
    return replace(extracted, features=usable)


def load_or_extract(
    *,
    features: str | Path = "",
    checkpoint_file: str | Path = "",
    architecture: str = "",
    dataset: str = "cifar10",
    data_dir: str = "./data",
    image_size: int | None = None,
    num_workers: int = 2,
    device: Device | None = None,
) -> FeatureSet:
    """The features to propagate through: read from a file, or extracted once and kept.

    An extraction is kept beside the checkpoint as `<name>.<dataset>.features.pth.tar`, that of a backbone
    from elsewhere in `checkpoint/backbones/`, together with the digests of the network and the data set,
    and used again only while both are the same. For ImageNet's networks and backbones from elsewhere the
    images of a folder stay in their files.

    Args:
        features: a feature file; skips extraction.
        checkpoint_file: a checkpoint of phase 1; or weights of a backbone, none: the library's own.
        architecture: the network of phase 1, where the file does not name it; or a backbone, as
            `lib.features.backbones.build` knows them: `torchvision:resnet50`, `timm:...`.
        dataset, data_dir: as in `datasets.build_datasets`.
        num_workers: processes that decode image files, on each machine.
        image_size: side of the images; None: as in training. Backbones have their own, always.
        device: device to extract on.

    Raises:
        ValueError: if neither file nor backbone is given, or one does not fit.
    """
    num_workers = own_workers(num_workers)
    places = {"dataset": dataset, "data_dir": data_dir, "num_workers": num_workers}
    if features:
        return _from_file(features, image_size=image_size or SMALL_SIZE, **places)
    if backbones.is_external(architecture):
        wanted = _of_backbone(checkpoint_file, architecture, **places)
    elif checkpoint_file:
        wanted = _of_checkpoint(checkpoint_file, architecture, image_size=image_size, **places)
    else:
        raise ValueError(
            "give features (a file), checkpoint (of phase 1) or architecture (torchvision:NAME, timm:NAME)"
        )
    return _once(wanted, device, num_workers)
