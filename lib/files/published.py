"""Published checkpoints: the meaning of their keys, and a guess of the network that they do not describe.

The scripts of 2019 wrote no description of a network. Only this module guesses one, from the names of
entries, the shapes of weights and, in older files of this project, the recorded options.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.cifar import CIFAR
from datasets.images import GRAY_LUMA, GRAY_STATS, IMAGENET_STATS
from datasets.patches import STATS as PATCHES_STATS
from datasets.resizing import MARGIN
from datasets.transforms import LUMA
from lib.files import checkpoint, description, schema, weights
from lib.files.description import CLASSIFIER, METRIC, TEMPERATURE, Description
from lib.files.schema import (
    FLOATS,
    INTEGERS,
    MOST,
    dict_of,
    entries,
    list_of,
    number,
    optional,
    record,
    tensor,
    text,
    whole,
)
from models.resnet import STEM

ACCURACIES = "accuracies"  # key of a checkpoint's accuracies in percent
BANK = "lemniscate"  # key of the memory bank of phase 1, which no classifier has
IN_TRAINING = "net_in_training"  # key of the weights in training; the network is their average
HEADS = ("fc.weight", "linear.weight", "head.weight")
SMALL_SIZE, IMAGENET_SIZE = 32, 224  # image sizes for a checkpoint that does not record its own
IMAGENET_TEMPERATURE = 0.07  # of the published metrics for ImageNet
DEFAULT_METRIC = "wrn-28-2"  # network of the published metrics for CIFAR, which do not name it
STATS = {name: stats for name, (_, stats) in CIFAR.items()} | {"patches": PATCHES_STATS}


@dataclass(frozen=True)
class Names:
    """The names of the entries in a kind of checkpoint."""

    network: str  # key of the weights
    accuracy: str  # key of an accuracy
    hundred: float  # its value that means 100%: phase 1 wrote fractions, phase 3 percentages
    of_best: bool  # whether it is the highest accuracy so far, or the one of these weights
    first_epoch: int | None = None  # value of `epoch` after the first one, if epochs are counted
    architecture: str = "architecture"  # key of the network's name, besides `architecture`

    def accuracies(self, last: float, best: float) -> dict[str, Any]:
        """Return the entries that hold two accuracies in percent: ours, and the published one."""
        chosen = best if self.of_best else last
        own = {"last": last if last == last else None, "best": best}  # NaN: never measured
        return {ACCURACIES: own, self.accuracy: chosen * self.hundred / 100}


CIFAR_METRIC = Names("net", "acc", 1.0, of_best=False, first_epoch=0)
IMAGENET_METRIC = Names(
    "state_dict", "best_prec1", 1.0, of_best=True, first_epoch=1, architecture="arch"
)
CLASSIFIERS = Names("net", "best_acc", 100.0, of_best=True)


def accuracies(state: Mapping[str, Any], names: Names) -> tuple[float, float]:
    """Return the last and the highest accuracy in percent that a checkpoint records; NaN where unknown.

    Files of this project from before `accuracies` held percentages under every key.
    """
    if ACCURACIES in state:
        own = state[ACCURACIES]
        return math.nan if own["last"] is None else float(own["last"]), float(own["best"])
    if "meta" in state:
        return float(state.get("acc", math.nan)), float(state["best_acc"])
    value = float(state.get(names.accuracy, 0.0)) * 100 / names.hundred
    return value, value


def in_published_units(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose published names hold the published units: fractions in phase 1.

    Files of this project from before `accuracies` hold percentages there.
    """
    schema.require(state, SCHEMA, "the checkpoint")
    is_old = "meta" in state and ACCURACIES not in state and is_metric(state)
    return dict(state) | {k: state[k] / 100 for k in ("acc", "best_prec1") if is_old and k in state}


def _sums(value: Any, name: str) -> Iterator[str]:
    """Yield what is wrong with the two sums of a mean: of weighted values, and of weights."""
    wrong = list(list_of(number(-MOST, MOST), 2)(value, name))
    yield from wrong or number(0, MOST)(value[1], f"{name}[1]")


_WEIGHTS = dict_of(tensor(None, (*FLOATS, *INTEGERS)))
_MOMENTA = entries({"momentum_buffer": optional(tensor(None))})
# Its other options are those of the run.
_GROUP = entries({"params": list_of(whole(0, 2**64)), "lr": number(0, MOST)})
_ACCURACY = number(0, 100, or_nan=True)
META = {"options": record({}), "data_digest": text}
SCHEMA = {
    "net": _WEIGHTS,
    "state_dict": _WEIGHTS,
    IN_TRAINING: _WEIGHTS,
    "optimizer": entries({"state": dict_of(_MOMENTA, int), "param_groups": list_of(_GROUP)}),
    "step": whole(),
    "epoch": whole(-1),
    "accuracies": entries(
        {"last": optional(number(0, 100)), "best": number(0, 100)}, required=True
    ),
    "acc": _ACCURACY,
    "best_acc": _ACCURACY,
    "best_prec1": _ACCURACY,
    "sums": dict_of(_sums),
    "loss_sums": _sums,
    "architecture": text,
    "arch": text,
    "classes": list_of(text),
    "examples": text,
    "meta": record(META),
    "lemniscate": entries({"memory": tensor(2)}),
    "criterion": _WEIGHTS,
    "objective": _WEIGHTS,
    description.KEY: description.check,
}


def load(path: str | Path, *keys: str) -> dict[str, Any]:
    """Load a checkpoint of any phase; a ValueError lists all entries that are missing or wrong."""
    return checkpoint.load_dict(path, *keys, schema=SCHEMA)


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
        found = _guess(state, weights.model_weights(state, source), kind, source)
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
    recorded, values = options.get("nce_t"), state.get(BANK, {}).get("params")
    if isinstance(values, Tensor) and values.shape in ((2,), (4,)):
        # (T, momentum) of the full softmax, (K, T, Z, momentum) of NCE
        recorded = float(values[len(values) // 2 - 1])
    usable = not list(description.SCHEMA["temperature"](recorded, "T"))
    return recorded if usable else IMAGENET_TEMPERATURE if imagenet else TEMPERATURE


def _guess(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str, source: str | Path
) -> Description:
    metric, options = kind == METRIC, state.get("meta", {}).get("options", {})
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
    size = options.get("image_size", IMAGENET_SIZE if imagenet else SMALL_SIZE)
    if wrong := list(description.SCHEMA["image_size"](size, "meta.options.image_size")):
        raise ValueError(f"{source}: {wrong[0]}")
    stats, luma = STATS.get(str(dataset), IMAGENET_STATS), ()
    if arguments.get("in_channels") == 1:  # older files of this project have a record `meta`
        stats, luma = (stats, LUMA) if "meta" in state else (GRAY_STATS, GRAY_LUMA)
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
