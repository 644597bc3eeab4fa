"""Embeddings of a whole data set: extracted once, in evaluation mode, kept in a file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets.images import ImageSet
from datasets.transforms import Augmentation
from lib import checkpoint
from lib.devices import Compute
from lib.loader import in_order
from models.layers import l2_normalize


@torch.no_grad()
def extract(model: nn.Module, data: ImageSet, compute: Compute, *, gray: bool = False) -> Tensor:
    """Unit-norm embeddings of every image, N x D float32 on the CPU.

    The model runs in evaluation mode (BatchNorm uses its running statistics) and is handed back in
    the mode it came in.
    """
    was_training = model.training
    model.eval()
    batches = in_order(data, Augmentation((), data.stats, gray=gray), compute)
    rows = []
    with tqdm(total=len(data), desc="features", unit="img", leave=False, disable=None) as bar:
        for batch in batches:
            with compute.autocast():
                rows.append(l2_normalize(model(batch.images)).cpu())
            bar.update(len(batch.indexes))
    model.train(was_training)
    return torch.cat(rows)


def check(features: Tensor, num_images: int | None = None, *, source: str = "features") -> Tensor:
    """Features as N x D float32 unit vectors.

    Raises:
        ValueError: if they are no finite N x D numbers, or not one row per image.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{source}: expected a matrix of floats, one row per image")
    if num_images is not None and len(features) != num_images:
        raise ValueError(f"{source}: {len(features)} rows for a data set of {num_images} images")
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{source}: {int(bad.sum())} rows hold NaN or infinity, the first is row {int(bad.int().argmax())}"
        )
    return l2_normalize(features)


def save(features: Tensor, targets: Tensor, path: str | Path, meta: dict[str, Any]) -> None:
    """Write a feature cache: `train_features` N x D float32, `train_labels` N int64, `meta`."""
    state = {"train_features": features.float(), "train_labels": targets.long(), "meta": meta}
    checkpoint.save(state, path)


def load(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Read a feature cache of any published kind.

    Known are `train_features`/`train_labels` (CIFAR), `features`/`labels`, `val_features`/`val_labels`
    (ImageNet) and one bare N x D tensor (colorization).

    Returns:
        Unit-norm features N x D, and labels N or None where the file has none.

    Raises:
        ValueError: if the file is missing or holds no features.
    """
    state = checkpoint.load(path)
    if isinstance(state, Tensor):
        return check(state, source=str(path)), None
    for prefix in ("train_", "", "val_"):
        features = state.get(f"{prefix}features") if isinstance(state, dict) else None
        if features is not None:
            labels = state.get(f"{prefix}labels")
            return check(features, source=str(path)), None if labels is None else labels.long()
    raise ValueError(f"{path} holds no features (train_features, features or val_features)")
