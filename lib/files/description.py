"""The description of a checkpoint's network: enough to build it and to show it images as in training.

Files of this project hold a `Description` under the key `description`. For published and older files, which
hold none, lib/files/published.py guesses it from keys and weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "description"
METRIC, CLASSIFIER = "metric", "classifier"
KINDS = (METRIC, CLASSIFIER)
NUM_NEIGHBORS, TEMPERATURE = 200, 0.1  # of the kNN monitor (Wu et al. 2018)
LARGEST = 2**20  # of a size in a description: a file must not make its reader run out of memory


@dataclass(frozen=True)
class Description:
    """A network, the images that it was trained on, and the meaning of its outputs.

    Attributes:
        kind: `METRIC` (phase 1, the last layer is an embedding) or `CLASSIFIER` (phase 3).
        architecture: name for `models.build_model` or `lib.features.backbones`; empty if a published file
            does not record it.
        arguments: arguments of its constructor: `out_features`, `in_channels`, `normalize`, `imagenet`.
        mean, std: of red, green and blue in [0, 1], by which the input is normalized; a gray network takes
            their averages.
        image_size: side in pixels of the network's input.
        resize: length of the shorter side in evaluation, before the central crop.
        classes: class names, in the order of their numbers.
        num_neighbors, temperature: K and T of a metric's kNN monitor.
    """

    kind: str
    architecture: str
    arguments: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize: int
    classes: tuple[str, ...] = ()
    num_neighbors: int = NUM_NEIGHBORS
    temperature: float = TEMPERATURE

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


@dataclass
class _Problems:
    """The problems of an entry, collected so that one message lists them all."""

    found: list[str] = field(default_factory=list)

    def unless(self, good: bool, problem: str) -> None:
        if not good:
            self.found.append(problem)


def _all_of(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, kind) for v in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _check(entry: Mapping[str, Any]) -> Sequence[str]:
    problems = _Problems()
    problems.unless(entry["kind"] in KINDS, f"kind is none of {', '.join(KINDS)}")
    problems.unless(isinstance(entry["architecture"], str), "architecture is not a name")
    arguments = entry["arguments"]
    named = isinstance(arguments, Mapping) and all(isinstance(k, str) for k in arguments)
    problems.unless(named, "arguments are not named")
    sizes = [v for v in arguments.values() if not isinstance(v, bool)] if named else []
    problems.unless(
        all(_is_count(v) for v in sizes), "arguments are not positive whole numbers or booleans"
    )
    for name in ("mean", "std"):
        finite = _all_of(entry[name], float) and all(map(math.isfinite, entry[name]))
        problems.unless(finite and len(entry[name]) == 3, f"{name} is not three finite numbers")
    problems.unless(not finite or min(entry["std"]) > 0, "std is not positive")
    for name in ("image_size", "resize", "num_neighbors"):
        problems.unless(_is_count(entry[name]), f"{name} is not a positive whole number")
    if _is_count(entry["resize"]) and _is_count(entry["image_size"]):
        problems.unless(entry["resize"] >= entry["image_size"], "resize is below image_size")
    temperature = entry["temperature"]
    good = isinstance(temperature, float) and 0 < temperature < float("inf")
    problems.unless(good, "temperature is not a positive number")
    problems.unless(_all_of(entry["classes"], str), "classes are not a list of names")
    return problems.found


def read(entry: Any, source: str) -> Description:
    """Read the entry `description` of the checkpoint `source`.

    Raises:
        ValueError: if values are missing or of a wrong kind, listing them all.
    """
    names = tuple(Description.__dataclass_fields__)
    if not isinstance(entry, Mapping) or any(name not in entry for name in names):
        raise ValueError(f"{source}: its description must hold {', '.join(names)}")
    problems = _check(entry)
    if problems:
        raise ValueError(f"{source}: its description is wrong: {'; '.join(problems)}")
    values = {name: entry[name] for name in names}
    for name in ("mean", "std", "classes"):
        values[name] = tuple(values[name])
    return Description(**values)
