"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146), any depth and width.

Parameter names are those of the published checkpoints: `conv1`, `block{1,2,3}.layer.{i}.*`, `bn1`,
`fc`. Blocks are pre-activated; where the width changes, the 1x1 shortcut reads the *activated* input.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import EmbeddingNet, global_pool, init_he, linear_head


class PreActBlock(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)
            if in_planes != out_planes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class Stage(nn.Module):
    """`num_blocks` blocks of one width; the attribute name `layer` is part of the file format."""

    def __init__(self, num_blocks: int, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreActBlock(in_planes, out_planes, stride),
            *(PreActBlock(out_planes, out_planes, 1) for _ in range(num_blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(EmbeddingNet):
    """WRN-`depth`-`widen_factor` for small images.

    Args:
        depth: 6 n + 4 layers, n blocks in each of the three stages.
        widen_factor: K; the stages are 16 K, 32 K and 64 K channels wide.
        out_features: outputs of the head: embedding dimensions, or classes; 0: there is no head.
        in_channels: 3, or 1 for gray images.
        normalize: whether outputs are scaled to the unit sphere (phase 1).

    Raises:
        ValueError: if `depth` is not 6 n + 4 or a size is not positive.
    """

    head_name = "fc"

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        out_features: int,
        *,
        in_channels: int = 3,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
            raise ValueError(
                f"wrn-{depth}-{widen_factor}: the depth must be 6n + 4 (10, 16, 22, 28, 34, 40 ...)"
                " and the width at least 1"
            )
        num_blocks = (depth - 4) // 6
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.normalize = normalize
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.block1 = Stage(num_blocks, widths[0], widths[1], stride=1)
        self.block2 = Stage(num_blocks, widths[1], widths[2], stride=2)
        self.block3 = Stage(num_blocks, widths[2], widths[3], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = linear_head(widths[3], out_features)
        init_he(self)
        if out_features:
            nn.init.zeros_(self.fc.bias)

    def pooled(self, images: Tensor) -> Tensor:
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        return global_pool(F.relu(self.bn1(maps)))
