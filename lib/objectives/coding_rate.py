"""Many small crops of an image that agree, while images spread out (Tong et al. 2023, arXiv 2304.03977)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.loading.batches import Batch
from lib.objectives.objective import Network
from lib.objectives.projection import Projected
from lib.runtime.devices import Device
from lib.runtime.distributed import all_gather_rows_with_gradient

LAYERS = (4096, 4096, 1024)  # of the head
EPS = 0.2  # distortion of the coding rate
ATTRACTION = 200.0  # weight of the similarity of patches


def total_coding_rate(z: Tensor, eps: float = EPS) -> Tensor:
    """Compute 1/2 log det(I + D / (B eps) Z'Z) of each B x D matrix in z (... x B x D): shape (...).

    The determinant is that of the smaller of Z'Z and ZZ', which have the same nonzero eigenvalues. Without
    rows it is 0.
    """
    *_, count, dim = z.shape
    gram = z @ z.mT if count < dim else z.mT @ z
    scaled = gram * (dim / (max(count, 1) * eps))
    identity = torch.eye(min(count, dim), dtype=z.dtype, device=z.device)
    factor = torch.linalg.cholesky_ex(identity + scaled).L  # never waits for the device
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


class ManyPatches(Projected):
    """EMP-SSL: 200 (1 - cosine to the mean of an image's patches) - total coding rate of the images.

    The rate is computed for each place among the patches of an image over all images of the batch, of all
    processes, and averaged. `similarity` and `coding_rate` are logged.
    """

    def __init__(self, width: int, device: Device, *, views: int) -> None:
        super().__init__(width, LAYERS, device, views=views, normalized=True)

    def forward(self, network: Network, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        own = self.projections(network, batch)
        every = all_gather_rows_with_gradient(own, batch.total)
        share = len(own) / batch.total  # of this process
        cosines = F.cosine_similarity(own, own.mean(dim=1, keepdim=True), dim=2)
        similarity = cosines.sum() / (batch.total * self.views)
        rate = total_coding_rate(every.transpose(0, 1)).mean() * share
        loss = ATTRACTION * (share - similarity) - rate
        return {"loss": loss, "similarity": similarity.detach(), "coding_rate": rate.detach()}, None
