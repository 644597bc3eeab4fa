"""Residual networks (He et al. 2016) with a 3x3 stem for 32x32 images.

Parameter names are those of the published `ckpt_instance_cifar10_resnet18`: `conv1`, `bn1`,
`layer{1..4}.{i}.*`, `shortcut.{0,1}` where the shape changes, `linear`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import EmbeddingNet, global_pool, linear_head


def _shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Sequential:
    if in_planes == out_planes and stride == 1:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_planes),
    )


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        out_planes = planes * self.expansion
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = _shortcut(in_planes, out_planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


# depth -> block and blocks per stage (He et al. 2016, table 1)
LAYOUTS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class SmallResNet(EmbeddingNet):
    """ResNet-`depth` for small images; arguments as in `models.wideresnet.WideResNet`.

    Its start weights are torch's own, uniform in +-1/sqrt(fan-in), as published; those of the other networks
    are from He et al. (2015).
    """

    head_name = "linear"

    def __init__(
        self, depth: int, out_features: int, *, in_channels: int = 3, normalize: bool = False
    ) -> None:
        super().__init__()
        block, num_blocks = LAYOUTS[depth]
        self.normalize = normalize
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        for stage, count in enumerate(num_blocks):
            planes = 64 * 2**stage
            blocks = []
            for i in range(count):
                blocks.append(block(width, planes, 2 if stage > 0 and i == 0 else 1))
                width = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = linear_head(width, out_features)

    def pooled(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        return global_pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
