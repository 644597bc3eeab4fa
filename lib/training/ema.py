"""Moving average of a network's weights, which generalizes better than its last step (Polyak averaging)."""

from copy import deepcopy

import torch
from torch import nn

DECAY = 0.999


class MovingAverage:
    """A copy of a network whose weights follow those in training.

    After step t (from 0) its weights are d times their old value plus 1 - d times those in training, with
    d = min(`DECAY`, t / (9 + t)), so that the start is soon forgotten. BatchNorm's running
    statistics are moving averages themselves, and are taken over.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(DECAY, step / (9 + step))
        own, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(own, theirs, 1 - decay)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
