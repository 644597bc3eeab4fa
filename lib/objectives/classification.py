"""Supervised training on labels and pseudo-labels."""

from typing import Any

import torch
from torch import Tensor, nn

from lib.loading.batches import Batch
from lib.objectives.objective import Network, Objective, at_least_float32


class Classification(Objective):
    """The weighted mean loss of the images of a batch (equation 6 of the paper).

    M class numbers and M weights (ones, or the confidence of pseudo-labels) are indexed by the `positions`
    of a batch. The criterion is a class of torch.nn. `top1` is the percentage of the images whose class
    number the network predicts.
    """

    labels: Tensor
    weights: Tensor

    def __init__(
        self, labels: Tensor, weights: Tensor, criterion: str = "CrossEntropyLoss"
    ) -> None:
        super().__init__()
        self.register_buffer("labels", labels, persistent=False)  # checkpoints need no copy of them
        self.register_buffer("weights", weights, persistent=False)
        self.criterion = getattr(nn, criterion)(reduction="none")

    def forward(self, network: Network, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        outputs = at_least_float32(network(batch.images))
        labels = self.labels[batch.positions]
        losses = self.criterion(outputs, labels) * self.weights[batch.positions]
        hits = (outputs.argmax(dim=1) == labels).sum(dtype=torch.float64)
        return {"loss": losses.sum() / batch.total, "top1": hits * (100 / batch.total)}, None
