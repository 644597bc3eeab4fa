"""Common parts of the networks: base class, normalization to the unit sphere, initialization, pooling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-8  # lower bound of the norm, so that a zero vector stays zero instead of NaN
UNIT_SLACK = 1e-3  # distance from 1 that the norm of a unit vector stored in 16 bits may have


def l2_normalize(vectors: Tensor) -> Tensor:
    """Scale the rows of `vectors` (N x D) to unit length, in float32; a zero row stays zero.

    The sum of squares is taken in float32 even under bf16 autocast: bf16 keeps 8 bits, so that a
    "unit" vector would be off by up to a percent, and with it every cosine of the metric.
    """
    return F.normalize(vectors.float(), dim=1, eps=NORM_EPS)


def off_unit_sphere(vectors: Tensor) -> Tensor:
    """Tell which rows of `vectors` (N x D, float32) are neither of unit length nor zero: N, bool."""
    norms = vectors.norm(dim=1)
    return ((norms - 1).abs() > UNIT_SLACK) & (norms > NORM_EPS)


def init_he(module: nn.Module) -> None:
    """Initialize weights as He et al. (2015) in fan-out mode, as published for wide residual networks."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


def linear_head(width: int, out_features: int) -> nn.Module:
    """Return the last layer of a network; with no `out_features` it hands its input on."""
    if out_features:
        return nn.Linear(width, out_features)
    head = nn.Identity()
    head.out_features = width
    return head


class Embedding:
    """Common part of every network: the output of its head, on the unit sphere where it is a metric.

    Attributes:
        head_name: name of the last layer, which has an attribute `out_features`.
        normalize: True in phase 1 (the output is a point on the unit sphere), False in phase 3.
    """

    head_name: str
    normalize: bool
    training: bool

    @property
    def out_features(self) -> int:
        """Number of outputs for an image."""
        return getattr(self, self.head_name).out_features

    def pooled(self, images: Tensor) -> Tensor:
        """Compute B x F activations before the head from B x C x H x W images."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        head = getattr(self, self.head_name)
        output = head(self.pooled(images))
        # the projection head of an objective reads the activations as they are
        raw = isinstance(head, nn.Identity) and self.training
        return l2_normalize(output) if self.normalize and not raw else output


class EmbeddingNet(Embedding, nn.Module):
    """Base of the networks for small images: a trunk, global pooling, one linear head, optional unit norm."""


def global_pool(maps: Tensor) -> Tensor:
    """Average B x C x H x W over any H and W to B x C: a 64x64 image stays one row, not four."""
    return torch.mean(maps, dim=(2, 3))
