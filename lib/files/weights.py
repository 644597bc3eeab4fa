"""Match the weights of a checkpoint to a network by name, and prove that the right ones arrived."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lib.files.checkpoint import listed

WRAPPERS = ("module.", "_orig_mod.")  # DataParallel / DDP, torch.compile
NETWORKS = ("net", "state_dict")  # where CIFAR and ImageNet checkpoints keep their weights
# The colorization backbone numbers the parts of a wide residual network, and ends before its last
# normalization.
COLORIZATION = {"0": "conv1", "1": "block1", "2": "block2", "3": "block3"}
COLORIZATION_ENDS_BEFORE = "bn1."


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under names without the prefixes that wrappers of a model add."""
    plain = {}
    for name, value in weights.items():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        plain[name] = value
    return plain


def model_weights(state: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Find the weights in a checkpoint: `net` (CIFAR), `state_dict` (ImageNet), or a bare state dict.

    If there are none, this is a ValueError.
    """
    weights = next((state[key] for key in NETWORKS if key in state), state)
    if isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights):
        plain = strip_wrappers(weights)
        if any(isinstance(value, Tensor) for value in plain.values()):
            return plain
    raise ValueError(f"{path} holds no network weights; its entries are: {listed(state, 20)}")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did with each name."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                parts.append(f"{len(names)} {kind} ({listed(names, 6)})")
        return "; ".join(parts)


def _fits(given: Any, own: Tensor) -> bool:
    same_kind = isinstance(given, Tensor) and given.is_floating_point() == own.is_floating_point()
    return same_kind and given.shape == own.shape


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path, keep_head: bool = True
) -> LoadReport:
    """Copy weights into a model by name and prove that the right ones arrived.

    A colorization backbone (`0.weight` ...) gets the names of a wide residual network. It has neither a
    head nor the normalization before it, so these keep their start values.

    Args:
        model: a network of `models`, with `head_name`.
        weights: weights under names without the prefixes of wrappers.
        source: the file, for messages.
        keep_head: whether to load the last layer too; False leaves it as it is (phase 1 -> phase 3).

    Returns:
        What was loaded; with `keep_head=False` exactly the head is missing.

    Raises:
        ValueError: if anything else is missing, left over or of another shape. The model is unchanged.
    """
    own = model.state_dict()
    head = {f"{model.head_name}.weight", f"{model.head_name}.bias"}
    absent = set(head)
    if weights and all(re.match(r"[0-3]\.", name) for name in weights):
        weights = {COLORIZATION[name[0]] + name[1:]: value for name, value in weights.items()}
        absent |= {name for name in own if name.startswith(COLORIZATION_ENDS_BEFORE)}
    given = dict(weights) if keep_head else {k: v for k, v in weights.items() if k not in head}
    # This counter is absent in files from before PyTorch 0.4.1.
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    same = [name for name in given if name in own and _fits(given[name], own[name])]
    report = LoadReport(
        loaded=tuple(same),
        missing=tuple(n for n in own if n not in given and n not in optional),
        unexpected=tuple(n for n in given if n not in own),
        mismatched=tuple(n for n in given if n in own and n not in same),
    )
    allowed = set() if keep_head else absent
    if set(report.missing) - allowed or report.unexpected or report.mismatched:
        raise ValueError(
            f"{source} does not fit this network: {report}. Was it trained with another "
            "--architecture or --objective, for another number of classes or --low-dim, or on gray "
            "images (--input-gray)?"
        )
    model.load_state_dict({name: given[name] for name in report.loaded}, strict=False)
    return report
