"""Contrast of two views of each image with the rest of the batch (Chen et al. 2020, arXiv 2002.05709)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.loading.batches import Batch
from lib.objectives.objective import Network
from lib.objectives.projection import Projected
from lib.runtime.devices import Device
from lib.runtime.distributed import all_gather_rows_with_gradient

LAYERS = (1024, 128)  # of the head


class TwoViews(Projected):
    """InfoNCE over the 2 N views of a batch of N images (NT-Xent, equation 1 of SimCLR).

    The loss of a view is -log softmax of its similarity, divided by the temperature, to the other view of
    its image, among those to all 2 N - 1 other views of all processes.

    Args:
        batch_size: N of a full batch.
    """

    def __init__(self, width: int, device: Device, *, temperature: float, batch_size: int) -> None:
        super().__init__(width, LAYERS, device, views=2)
        self.temperature, self.batch_size = temperature, batch_size

    def forward(self, network: Network, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        own = self.projections(network, batch)
        every = all_gather_rows_with_gradient(own, batch.total)
        similarities = own.flatten(0, 1) @ every.flatten(0, 1).T / self.temperature
        place = 2 * batch.first + torch.arange(len(similarities), device=own.device)
        others = similarities.scatter(1, place[:, None], -torch.inf)
        loss = F.cross_entropy(others, place ^ 1, reduction="sum") / (2 * batch.total)
        return {"loss": loss}, None

    @property
    def chance(self) -> float:
        return math.log(2 * self.batch_size - 1)
