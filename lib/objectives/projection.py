"""The projection head, through which a metric is trained and which is then thrown away (SimCLR)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.loading.batches import Batch
from lib.objectives.objective import Network, Objective, at_least_float32
from lib.runtime.devices import Device
from models.layers import NORM_EPS


class Projected(Objective):
    """Base of objectives on the projections of several views of the images of a batch (Chen et al. 2020).

    Args:
        width: numbers that the network gives for an image.
        layers: outputs of each layer of the head.
        device: the head computes in its precision.
        views: augmentations of each image.
        normalized: whether BatchNorm stands between the layers. Its statistics are those of this process's
            rows, and none are kept.

    Raises:
        ValueError: if there are fewer than two views.
    """

    def __init__(
        self,
        width: int,
        layers: Sequence[int],
        device: Device,
        *,
        views: int,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        if views < 2:
            raise ValueError(
                f"{views} views: this objective compares views of an image, 2 at least"
            )
        self.views, self.device = views, device
        parts: list[nn.Module] = []
        for outputs in layers:
            if parts and normalized:
                parts.append(nn.BatchNorm1d(width, track_running_stats=False))
            if parts:
                parts.append(nn.ReLU())
            parts.append(nn.Linear(width, outputs))
            width = outputs
        self.head = nn.Sequential(*parts)

    def projections(self, network: Network, batch: Batch) -> Tensor:
        """Compute the unit vectors of all views of this process's images: B x V x D."""
        rows = network(batch.stacked)
        count = len(rows)
        if not count:  # a process without rows takes part in backward, and BatchNorm needs two rows
            rows = torch.cat([rows, rows.new_zeros(2, rows.shape[1])])
        with self.device.autocast():
            projected = self.head(rows)[:count]
        z = F.normalize(at_least_float32(projected), dim=1, eps=NORM_EPS)
        return z.unflatten(0, (self.views, -1)).transpose(0, 1)

    def flops_per_image(self) -> float:
        """Count the products of the head, forward and for both gradients."""
        return 6.0 * self.views * sum(w.numel() for w in self.head.parameters() if w.ndim == 2)
