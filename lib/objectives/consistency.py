"""Consistency training from the pseudo-labels of a graph: one target for an image, however it is augmented.

The target of an unlabeled image is a mixture of two posteriors: that of the graph (phase 2), whose share
falls to zero, and that of the network for a weakly augmented view, aligned so that all classes are equally
probable on average (Berthelot et al. 2020, ReMixMatch). The network learns it on two other views: one is
strongly augmented, and in the other a box is taken from a second image (CutMix, Yun et al. 2019). How much an
image counts depends on how sure its target is, compared with the targets so far (SoftMatch, Chen et al. 2023;
FreeMatch, Wang et al. 2023).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.loading.batches import Batch
from lib.objectives.objective import Network, Objective, at_least_float32
from lib.runtime.distributed import all_reduce_sum
from lib.runtime.seeding import generator

WEIGHTS = ("softmatch", "freematch")
MOMENTUM = 0.99  # of the means over the targets so far; 0.999 is for a million steps
NUM_SIGMAS = 2.0  # standard deviations at which SoftMatch's Gaussian is cut
UNLABELED_WEIGHT = 2.0  # of the loss on unlabeled images
GRAPH_SHARE, GRAPH_UNTIL = 0.9, 0.4  # at the first step; share of the run after which it is zero
LEAST = 1e-6  # of a mean probability that is divided by


class Consistency(Objective):
    """Cross-entropy on labeled images, plus that of two views of unlabeled ones with their common target.

    A batch holds labeled images and, as `batch.unlabeled`, others in two views: weak and strong.

    Args:
        labels: class numbers of the labeled images, by the `positions` of a batch.
        posteriors: U x C probabilities of the graph, by the positions of `batch.unlabeled`.
        ratio: unlabeled images for each labeled one.
        num_batches: length of the run.
        weights: one of `WEIGHTS`.
        seed: seed of the boxes.
    """

    labels: Tensor
    posteriors: Tensor

    def __init__(
        self,
        labels: Tensor,
        posteriors: Tensor,
        *,
        ratio: int,
        num_batches: int,
        weights: str = "softmatch",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.views, self.ratio = 1 + 3 * ratio, ratio
        self.num_batches, self.kind, self.seed = num_batches, weights, seed
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("posteriors", posteriors, persistent=False)
        confidence = posteriors.amax(dim=1).float()
        self.register_buffer("mean_probabilities", posteriors.mean(dim=0).float())
        self.register_buffer("mean_confidence", confidence.mean())
        self.register_buffer("confidence_variance", confidence.var(correction=0))

    def draw(self, total: int, place: int) -> tuple[Tensor, ...]:
        """Draw for each labeled image the boxes of `ratio` unlabeled ones, and repeat the graph's share."""
        rng = generator(self.seed, "boxes", place)
        boxes = torch.rand(total, self.ratio, 3, generator=rng)
        done = place / self.num_batches
        share = GRAPH_SHARE * max(0.0, 1 - done / GRAPH_UNTIL)
        return boxes, torch.full((total,), share)

    def forward(self, network: Network, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        assert batch.unlabeled is not None
        boxes, share = batch.drawn
        weak, strong = batch.unlabeled.views
        boxes = boxes.flatten(0, 1)
        mixed, own_part, partner = cut_mix(weak, boxes)
        parts = [batch.images, weak, mixed, strong]
        outputs = at_least_float32(network(torch.cat(parts)))
        labeled, weak_out, mixed_out, strong_out = outputs.split([len(part) for part in parts])
        labels = self.labels[batch.positions]
        supervised = F.cross_entropy(labeled, labels, reduction="sum") / batch.total

        total = batch.unlabeled.total
        graph = self.posteriors[batch.unlabeled.positions].float()
        own = self._aligned(weak_out.detach().softmax(dim=1), total)
        share = share.repeat_interleave(self.ratio)[:, None]
        confidence, target = (share * graph + (1 - share) * own).max(dim=1)
        weights = self._weights(confidence, target, total)
        on_strong = weights * F.cross_entropy(strong_out, target, reduction="none")
        losses = F.cross_entropy(mixed_out, target, reduction="none")
        others = F.cross_entropy(mixed_out, target[partner], reduction="none")
        on_mixed = own_part * weights * losses + (1 - own_part) * weights[partner] * others
        consistency = (on_strong + on_mixed).sum() / (2 * total)
        agreed = own.argmax(dim=1) == graph.argmax(dim=1)
        measured = {
            "top1": (labeled.argmax(dim=1) == labels).sum() * (100 / batch.total),
            "supervised": supervised,
            "consistency": consistency,
            "weight": weights.sum() / total,
            "used": (weights > 0.5).sum() * (100 / total),
            "agreement": agreed.sum() * (100 / total),
        }
        loss = supervised + UNLABELED_WEIGHT * consistency
        return {"loss": loss} | {k: v.detach().double() for k, v in measured.items()}, None

    @torch.no_grad()
    def _aligned(self, probabilities: Tensor, total: int) -> Tensor:
        """Divide by the mean of the probabilities so far: on average, all classes are equally probable."""
        mean = all_reduce_sum(probabilities.sum(dim=0)) / total
        self.mean_probabilities.lerp_(mean, 1 - MOMENTUM)
        scaled = probabilities / self.mean_probabilities.clamp_min(LEAST)
        return scaled / scaled.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def _weights(self, confidence: Tensor, target: Tensor, total: int) -> Tensor:
        """Compute how much each image counts, in [0, 1]."""
        mean = all_reduce_sum(confidence.sum()) / total
        variance = all_reduce_sum((confidence - mean).square().sum()) / max(total - 1, 1)
        self.mean_confidence.lerp_(mean, 1 - MOMENTUM)
        self.confidence_variance.lerp_(variance, 1 - MOMENTUM)
        if self.kind == "freematch":
            share = self.mean_probabilities / self.mean_probabilities.max()
            return (confidence >= self.mean_confidence * share[target]).to(confidence.dtype)
        below = (confidence - self.mean_confidence).clamp_max(0)
        return (-below.square() / (2 * self.confidence_variance / NUM_SIGMAS**2)).exp()


def cut_mix(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put a box of the neighboring image into each of B images.

    Args:
        images: B x C x H x W.
        boxes: B x 3 uniform numbers: share of the area that stays, and the middle of the box.

    Returns:
        The mixed images, the share of its own pixels in each (B), and the numbers of the neighbors (B).
    """
    count, _, h, w = images.shape
    numbers = torch.arange(count, device=images.device)
    partner = (numbers ^ 1).clamp(max=max(count - 1, 0))
    side = (1 - boxes[:, 0]).sqrt()
    inside = []
    for place, length in ((1, h), (2, w)):
        steps = torch.arange(length, device=images.device) + 0.5
        middle = boxes[:, place, None] * length
        inside.append((steps - middle).abs() < side[:, None] * length / 2)
    box = inside[0][:, :, None] & inside[1][:, None, :]
    own = 1 - box.float().mean(dim=(1, 2))
    return torch.where(box[:, None], images[partner], images), own, partner
