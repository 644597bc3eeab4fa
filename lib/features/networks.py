"""Networks of checkpoints, built from their descriptions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.features import backbones
from lib.files import weights
from lib.files.description import CLASSIFIER, Description
from lib.files.published import describe
from models import build_model


def build_network(found: Description, source: str | Path) -> nn.Module:
    """Build what a checkpoint describes, with random weights; ValueError if that is not enough to build."""
    if "out_features" not in found.arguments:
        raise ValueError(
            f"{source} holds no network that this project builds, from conv1 to its head"
        )
    if not found.architecture:
        raise ValueError(f"{source} does not name its network: name it with --architecture")
    if backbones.is_external(found.architecture):
        outputs = found.arguments["out_features"]
        return backbones.classifier(found.architecture, outputs, weighted=False)
    try:
        return build_model(found.architecture, **found.arguments)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{source}: its network cannot be built ({error}); it needs another version of this project"
        ) from error


def load_network(
    state: Mapping[str, Any],
    source: str | Path,
    architecture: str = "",
    *,
    unsaid: str = CLASSIFIER,
) -> tuple[nn.Module, Description]:
    """Build the network of a checkpoint of any phase, and load its weights; arguments as in `describe`.

    Raises:
        ValueError: if it holds no network of ours, does not name it, or does not fit it.
    """
    tensors = weights.model_weights(state, source)
    found = describe(state, source, architecture, unsaid=unsaid)
    if not backbones.is_external(found.architecture):
        with torch.device("meta"):  # a description must not make its reader run out of memory
            wanted = sum(p.numel() for p in build_network(found, source).parameters())
        held = sum(t.numel() for t in tensors.values() if isinstance(t, torch.Tensor))
        if wanted > 2 * held:
            raise ValueError(
                f"{source} does not fit the network that it describes, which has {wanted} parameters: it "
                f"holds {held} numbers"
            )
    model = build_network(found, source)
    weights.load_weights(model, tensors, source=source)
    return model, found
