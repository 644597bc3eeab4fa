"""The description of a checkpoint's network: enough to build it and to show it images as in training.

Files of this project hold a `Description` under the key `description`. For published and older files, which
hold none, lib/files/published.py guesses it from keys and weights.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets.images import Stats
from datasets.transforms import LUMA

KEY = "description"
METRIC, CLASSIFIER = "metric", "classifier"
KINDS = (METRIC, CLASSIFIER)
NUM_NEIGHBORS, TEMPERATURE = 200, 0.1  # of the kNN monitor for CIFAR-10 (Wu et al. 2018)
LARGEST = 2**20  # of a size in a description: a file must not make its reader run out of memory


@dataclass(frozen=True)
class Description:
    """A network, the images that it was trained on, and the meaning of its outputs."""

    kind: str  # `METRIC` (phase 1, the last layer is an embedding) or `CLASSIFIER` (phase 3)
    architecture: str  # for `build_model` or `lib.features.backbones`; may be empty if published
    arguments: Mapping[str, Any]  # `out_features`, `in_channels`, `normalize`, `imagenet`
    mean: tuple[float, float, float]  # of red, green and blue in [0, 1]
    std: tuple[float, float, float]  # both normalize the input; a gray network takes their averages
    image_size: int  # side in pixels of the network's input
    resize: int  # length of the shorter side in evaluation, before the central crop
    classes: tuple[str, ...] = ()  # names, in the order of their numbers
    num_neighbors: int = NUM_NEIGHBORS  # K of a metric's kNN monitor
    temperature: float = TEMPERATURE  # T of that monitor, and of the loss
    luma: tuple[float, ...] = ()  # weights of red, green and blue in the input of a gray network

    @property
    def stats(self) -> Stats:
        """Mean and standard deviation, as `datasets.transforms.Augmentation` takes them."""
        return self.mean, self.std

    @property
    def is_gray(self) -> bool:
        """Whether the network reads gray images."""
        return self.arguments.get("in_channels", 3) == 1

    @property
    def is_imagenet(self) -> bool:
        """Whether the network is for ImageNet-sized images; those of a folder stay in their files."""
        return bool(self.arguments.get("imagenet", False))

    @property
    def has_margin(self) -> bool:
        """Whether evaluation crops a margin; otherwise images are shown whole."""
        return self.resize > self.image_size

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint: plain values and lists."""
        plain = asdict(self) | {"arguments": dict(self.arguments)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, kind) for v in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _problems(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values of an entry that has them all."""
    if entry["kind"] not in KINDS:
        yield f"kind is none of {', '.join(KINDS)}"
    if not isinstance(entry["architecture"], str):
        yield "architecture is not a name"
    arguments = entry["arguments"]
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        yield "arguments are not named"
    elif not all(isinstance(v, bool) or _is_count(v) for v in arguments.values()):
        yield "arguments are not positive whole numbers or booleans"
    for name in ("mean", "std"):
        values = entry[name]
        if not _are(values, float) or len(values) != 3 or not all(map(math.isfinite, values)):
            yield f"{name} is not three finite numbers"
        elif name == "std" and min(values) <= 0:
            yield "std is not positive"
    for name in ("image_size", "resize", "num_neighbors"):
        if not _is_count(entry[name]):
            yield f"{name} is not a positive whole number"
    sizes = entry["image_size"], entry["resize"]
    if all(map(_is_count, sizes)) and sizes[0] > sizes[1]:
        yield "resize is below image_size"
    temperature = entry["temperature"]
    if not isinstance(temperature, float) or not 0 < temperature < math.inf:
        yield "temperature is not a positive number"
    if not _are(entry["classes"], str):
        yield "classes are not a list of names"
    luma = entry["luma"]
    if not _are(luma, float) or len(luma) not in (0, 3) or not all(map(math.isfinite, luma)):
        yield "luma is not three finite numbers"
    elif luma and isinstance(arguments, Mapping) and arguments.get("in_channels") != 1:
        yield "luma is of a network that reads colors"


def read(entry: Any, source: str) -> Description:
    """Read the entry `description` of the checkpoint `source`.

    A ValueError lists all values that are missing or of a wrong kind.
    """
    names = tuple(Description.__dataclass_fields__)
    if isinstance(entry, Mapping):
        entry = {"luma": (), **entry}  # older files do not have it
    if not isinstance(entry, Mapping) or any(name not in entry for name in names):
        raise ValueError(f"{source}: its description must hold {', '.join(names)}")
    if problems := list(_problems(entry)):
        raise ValueError(f"{source}: its description is wrong: {'; '.join(problems)}")
    values = {name: entry[name] for name in names}
    for name in ("mean", "std", "classes", "luma"):
        values[name] = tuple(values[name])
    found = Description(**values)
    return replace(found, luma=LUMA) if found.is_gray and not found.luma else found
