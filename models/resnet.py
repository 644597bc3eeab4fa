"""ImageNet ResNets of torchvision with an embedding head, under torchvision's parameter names."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.layers import Embedding, linear_head
from models.resnet_cifar import LAYOUTS

STEM = 7  # side of the first convolution, which distinguishes them from networks for small images


class ImageNetResNet(Embedding, ResNet):
    """torchvision's ResNet-`depth` whose `fc` has `out_features` outputs.

    Arguments are as in `models.wideresnet.WideResNet`.
    """

    head_name = "fc"

    def __init__(
        self, depth: int, out_features: int, *, in_channels: int = 3, normalize: bool = False
    ) -> None:
        block = BasicBlock if depth < 50 else Bottleneck
        super().__init__(block, list(LAYOUTS[depth][1]), num_classes=out_features or 1)
        self.normalize = normalize
        if not out_features:
            self.fc = linear_head(self.fc.in_features, 0)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, STEM, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def pooled(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)
