"""The description of a checkpoint's network: enough to build it and to show it images as in training.

Files of this project hold a `Description` under the key `description`. For published and older files, which
hold none, lib/files/published.py guesses it from keys and weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets.images import Stats
from datasets.transforms import LUMA
from lib.files.schema import entries, expect, flag, list_of, number, text, whole

KEY = "description"
METRIC, CLASSIFIER = "metric", "classifier"
KINDS = (METRIC, CLASSIFIER)
NUM_NEIGHBORS, TEMPERATURE = 200, 0.1  # of the kNN monitor for CIFAR-10 (Wu et al. 2018)
# of numbers in a description: a file must not make its reader run out of memory
LARGEST, MOST_PIXELS = 2**20, 2**13


@dataclass(frozen=True)
class Description:
    """A network, the images that it was trained on, and the meaning of its outputs."""

    kind: str  # `METRIC` (phase 1, the output is an embedding) or `CLASSIFIER` (phase 3)
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


ARGUMENTS = {
    "out_features": whole(0, LARGEST),
    "in_channels": whole(1, LARGEST),
    "normalize": flag,
    "imagenet": flag,
}
SCHEMA = {
    "kind": expect(lambda kind: kind in KINDS, f"one of {', '.join(KINDS)}"),
    "architecture": text,
    "arguments": entries(ARGUMENTS),
    "mean": list_of(number(-1000, 1000), 3),
    "std": list_of(number(1e-6, 1000), 3),
    "image_size": whole(1, MOST_PIXELS),
    "resize": whole(1, MOST_PIXELS),
    "classes": list_of(text),
    "num_neighbors": whole(1, LARGEST),
    "temperature": number(1e-3, 1e3),
    "luma": list_of(number(-10, 10)),
}


def check(entry: Any, name: str) -> Iterator[str]:
    """Yield what is wrong with the entry `description` of a checkpoint (a check of `lib.files.schema`)."""
    wrong = list(entries(SCHEMA, required=True)(_completed(entry), name))
    yield from wrong
    if wrong:
        return
    if entry["kind"] == CLASSIFIER and entry["arguments"].get("out_features") == 0:
        yield f"{name} is a classifier without outputs"
    if entry["resize"] < entry["image_size"]:
        yield f"{name}.resize is below image_size"
    is_gray, luma = entry["arguments"].get("in_channels") == 1, entry.get("luma", ())
    if len(luma) not in ((0, 3) if is_gray else (0,)):
        yield f"{name}.luma is not the three weights of a gray network"


def _completed(entry: Any) -> Any:
    return {"luma": [], **entry} if isinstance(entry, dict) else entry  # older files lack it


def read(entry: Any, source: str) -> Description:
    """Read the entry `description` of the checkpoint `source`; a ValueError lists all wrong values."""
    if problems := list(check(entry, KEY)):
        raise ValueError(f"{source}: {'; '.join(problems)}")
    values = {name: _completed(entry)[name] for name in SCHEMA}
    for name in ("mean", "std", "classes", "luma"):
        values[name] = tuple(values[name])
    found = Description(**values)
    return replace(found, luma=LUMA) if found.is_gray and not found.luma else found
