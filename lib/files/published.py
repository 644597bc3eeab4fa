"""Published checkpoints: the meaning of their keys, and a guess of the network that they do not describe.

The scripts of 2019 wrote no description of a network. Only this module guesses one, from the names of
entries, the shapes of weights and, in older files of this project, the recorded options.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.cifar import CIFAR
from datasets.images import GRAY_LUMA, GRAY_STATS, IMAGENET_STATS
from datasets.patches import STATS as PATCHES_STATS
from datasets.resizing import MARGIN
from datasets.transforms import LUMA
from lib.files import description, weights
from lib.files.description import CLASSIFIER, METRIC, TEMPERATURE, Description
from models.resnet import STEM

BANK = "lemniscate"  # key of the memory bank of phase 1, which no classifier has
HEADS = ("fc.weight", "linear.weight", "head.weight")
SMALL_SIZE, IMAGENET_SIZE = 32, 224  # image sizes for a checkpoint that does not record its own
IMAGENET_TEMPERATURE = 0.07  # of the published metrics for ImageNet
DEFAULT_METRIC = "wrn-28-2"  # network of the published metrics for CIFAR, which do not name it
STATS = {name: stats for name, (_, stats) in CIFAR.items()} | {"patches": PATCHES_STATS}


@dataclass(frozen=True)
class Names:
    """The names of the entries in a kind of checkpoint."""

    network: str  # key of the weights
    best: str = "best_acc"  # key of the highest accuracy so far, besides `best_acc`
    first_epoch: int | None = None  # value of `epoch` after the first one, if epochs are counted
    architecture: str = "architecture"  # key of the network's name, besides `architecture`


CIFAR_METRIC = Names("net", first_epoch=0)
IMAGENET_METRIC = Names("state_dict", "best_prec1", first_epoch=1, architecture="arch")
CLASSIFIERS = Names("net")


def describe(
    state: Mapping[str, Any],
    source: str | Path,
    architecture: str = "",
    *,
    unsaid: str = CLASSIFIER,
) -> Description:
    """Describe the network that a checkpoint of any phase holds.

    A wrong description in the file, and a file without network weights, are a ValueError.

    Args:
        source: the file, for messages.
        architecture: name that replaces the one in the file, or stands in where it has none.
        unsaid: kind of a file that gives no sign of its own, such as bare weights.
    """
    if description.KEY in state:
        found = description.read(state[description.KEY], str(source))
    else:
        kind = METRIC if is_metric(state) else CLASSIFIER if "step" in state else unsaid
        found = _guess(state, weights.model_weights(state, source), kind)
    return replace(found, architecture=architecture or found.architecture)


def is_metric(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is of phase 1: its last layer is an embedding."""
    entry = state.get(description.KEY)
    if isinstance(entry, Mapping) and "kind" in entry:
        return entry["kind"] == METRIC
    return BANK in state


def bank_rows(state: Mapping[str, Any], path: str | Path) -> Tensor:
    """Return the memory bank of phase 1, N x D float32, ours or a published module's, or raise ValueError."""
    bank = state.get(BANK)
    rows = bank.get("memory") if isinstance(bank, Mapping) else None
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{path} holds no memory bank (an entry `lemniscate` with `memory`, N x D)"
        )
    return rows.float()


def class_names(state: Mapping[str, Any]) -> list[str]:
    """Return the class names in a checkpoint or in another record; [] where it has none.

    Something else in their place is a ValueError.
    """
    names = state.get("classes") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("the recorded classes are not a list of names")
    return list(names)


def _temperature(state: Mapping[str, Any], options: Mapping[str, Any], imagenet: bool) -> float:
    """Find the temperature of a metric, which is that of its training, too.

    Older files of this project have it among their options, published ones in their memory bank; a file
    without it gets the published one.
    """
    recorded, bank = options.get("nce_t"), state.get(BANK)
    values = bank.get("params") if isinstance(bank, Mapping) else None
    if isinstance(values, Tensor) and values.shape in ((2,), (4,)):
        # (T, momentum) of the full softmax, (K, T, Z, momentum) of NCE
        recorded = float(values[len(values) // 2 - 1])
    if isinstance(recorded, float) and 0 < recorded < math.inf:
        return recorded
    return IMAGENET_TEMPERATURE if imagenet else TEMPERATURE


def _guess(state: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str) -> Description:
    metric, meta = kind == METRIC, state.get("meta")
    options = meta.get("options") if isinstance(meta, Mapping) else None
    options = options if isinstance(options, Mapping) else {}
    name = state.get("architecture") or state.get("arch") or (DEFAULT_METRIC if metric else "")
    stem = tensors.get("conv1.weight")
    head = next((tensors[key] for key in HEADS if key in tensors), None)
    imagenet = stem is not None and stem.shape[-1] == STEM
    arguments: dict[str, Any] = {"normalize": metric, "imagenet": imagenet}
    if head is not None:
        arguments["out_features"] = len(head)
    if stem is not None:
        arguments["in_channels"] = stem.shape[1]
    dataset = options.get("dataset", "folder" if imagenet else "cifar10")
    size = int(options.get("image_size", IMAGENET_SIZE if imagenet else SMALL_SIZE))
    stats, luma = STATS.get(dataset, IMAGENET_STATS), ()
    if arguments.get("in_channels") == 1:  # older files of this project have a record `meta`
        stats, luma = (stats, LUMA) if isinstance(meta, Mapping) else (GRAY_STATS, GRAY_LUMA)
    return Description(
        kind,
        str(name),
        arguments,
        *stats,
        size,
        round(size * MARGIN) if imagenet and dataset == "folder" else size,
        tuple(class_names(state)),
        temperature=_temperature(state, options, imagenet),
        luma=luma,
    )
