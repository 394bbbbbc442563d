"""ResNets for 32-pixel images with 64 features (6n+2 layers, three stages): ResNet-8, -32 and -56."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, projected by 1x1 convolution where the shape changes (option B)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(residual.add_(self.downsample(x)))
        return out


def _stage(channels_in: int, channels_out: int, stride: int, blocks: int) -> nn.Sequential:
    first = _BasicBlock(channels_in, channels_out, stride)
    rest = [_BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class _SmallResNet(Backbone):
    """CIFAR ResNet of He et al., "Deep residual learning" (CVPR 2016), section 4.2, with option B shortcuts."""

    provides = frozenset({"pooled", "map", "stem"})
    dim = 64
    stride = 4
    stem_dim = 16
    mean_pooled = True
    blocks: ClassVar[int]
    """Residual blocks in each of the three stages."""

    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, 1, self.blocks)
        self.layer2 = _stage(16, 32, 2, self.blocks)
        self.layer3 = _stage(32, 64, 2, self.blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to features of 64 channels."""
        stem = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(stem)))
        return Features(pooled=x.mean((2, 3)), map=x, stem=stem)


class ResNet8(_SmallResNet):
    """77,392 parameters."""

    name = "resnet8"
    blocks = 1


class ResNet32(_SmallResNet):
    """466,256 parameters."""

    name = "resnet32"
    blocks = 5


class ResNet56(_SmallResNet):
    """855,120 parameters."""

    name = "resnet56"
    blocks = 9


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [ResNet8, ResNet32, ResNet56]
