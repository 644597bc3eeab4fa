"""Networks by name. `build_model` is the only entry the rest of the project uses."""

import re

from torch import nn

from models.resnet import ImageNetResNet
from models.resnet_cifar import LAYOUTS, SmallResNet
from models.wideresnet import WideResNet

SMALL_ARCHITECTURES = "wrn-D-K (wrn-28-2, wrn-28-10, wrn-16-2 ...), " + ", ".join(
    f"resnet{depth}" for depth in LAYOUTS
)
IMAGENET_ARCHITECTURES = tuple(f"resnet{depth}" for depth in LAYOUTS)


def build_model(
    architecture: str,
    out_features: int,
    *,
    in_channels: int = 3,
    normalize: bool = False,
    imagenet: bool = False,
) -> nn.Module:
    """Build a network from its published name.

    Args:
        architecture: `wrn-D-K` or `resnetD`; see `SMALL_ARCHITECTURES`.
        out_features: embedding dimensions (phase 1) or number of classes (phase 3); 0 leaves out the head,
            so that the embedding is the network's pooled activations.
        in_channels: 3, or 1 for gray images.
        normalize: whether outputs are scaled to the unit sphere.
        imagenet: whether to take the ResNet with the 7x7 stem and torchvision's names.

    Raises:
        ValueError: if the name is unknown, listing the known ones.
    """
    # three digits: a name out of a file must not keep its reader busy for hours
    if match := re.fullmatch(r"wrn-(\d{1,3})-(\d{1,3})", architecture):
        if imagenet:
            raise ValueError(f"{architecture} is a network for small images; take a resnet here")
        depth, width = int(match[1]), int(match[2])
        return WideResNet(depth, width, out_features, in_channels=in_channels, normalize=normalize)
    match = re.fullmatch(r"resnet(\d+)", architecture)
    if match is None or int(match[1]) not in LAYOUTS:
        raise ValueError(
            f"unknown architecture {architecture!r}: take one of {SMALL_ARCHITECTURES}"
        )
    family = ImageNetResNet if imagenet else SmallResNet
    return family(int(match[1]), out_features, in_channels=in_channels, normalize=normalize)
