"""The published optimizer, and the choice of its parameters."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer


def sgd(
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
) -> Optimizer:
    """Build the published SGD: momentum 0.9, and Nesterov's for small images.

    It is fused: one kernel updates all parameters, to the same bits as a loop over them.
    """
    decay = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    return torch.optim.SGD(parameters, lr=lr, fused=True, **decay)


def trainable(model: nn.Module, *, head_only: bool) -> list[nn.Parameter]:
    """Return the parameters to optimize; with `head_only` the others are frozen and get no gradient."""
    if head_only:
        model.requires_grad_(False)
        getattr(model, model.head_name).requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]
