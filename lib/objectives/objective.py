"""The interface of every objective that training minimizes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib.loading.batches import Batch

Network = Callable[[Tensor], Tensor]  # function from images to outputs, in the precision of the run


class Objective(nn.Module):
    """A loss of a batch, and the memory (a memory bank, a moving average) that it keeps in buffers.

    Buffers move to the device and into the checkpoint. `forward` computes on the device alone, with shapes
    that depend on the batch size only, and never makes the host wait.
    """

    views: int = 1  # augmented views of each image that `forward` puts through the network

    def draw(self, total: int, place: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of batch number `place`, on the CPU: tensors of `total` rows each.

        `forward` finds this process's rows of them in `batch.drawn`, on the device.
        """
        return ()

    def forward(self, network: Network, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Compute the loss and other means of one batch by name, and return with them data for `after_step`.

        `network` maps B x C x S x S images to B x D outputs under autocast. Each mean is this process's part
        of that over the `batch.total` rows. Training minimizes `loss`; all of them are logged.
        """
        raise NotImplementedError

    def after_step(self, kept: Sequence[Any]) -> None:
        """Update the memory after the optimizer's step, from `forward`'s data of each of its batches."""

    @property
    def chance(self) -> float:
        """Loss of outputs that know nothing; NaN where that is not a number known beforehand."""
        return math.nan

    @property
    def bank_rows(self) -> Tensor | None:
        """N x D memory bank of the training images' embeddings; None for a loss without one."""
        return None

    def flops_per_image(self) -> float:
        """Count the floating point operations of the loss for one image, without the network's."""
        return 0.0

    def checkpoint_entries(self) -> dict[str, Any]:
        """Return the entries of a checkpoint that hold the memory, if there is any."""
        state = self.state_dict()
        return {"objective": state} if state else {}

    def load_entries(self, state: Mapping[str, Any]) -> None:
        """Restore the memory; KeyError or RuntimeError if an entry is missing or does not fit."""
        if self.state_dict():
            self.load_state_dict(state["objective"])


def at_least_float32(outputs: Tensor) -> Tensor:
    """Cast outputs of lower precision to float32, so that a loss can be computed on them."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
