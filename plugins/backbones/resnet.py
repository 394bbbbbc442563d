"""torchvision ResNets without the classifier, with a stem for small images, and ResNet-50s of SwAV's widths."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl

SMALL_IMAGE = 64
"""`stem: auto` takes the cifar stem up to this many pixels: the imagenet stem would leave a 2x2 map or less."""


class ResNetOptions(Options):
    """Options of the torchvision ResNets."""

    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    """`imagenet`: 7x7 convolution of stride 2 and max-pooling; `cifar`: 3x3 convolution of stride 1 without
    pooling; `auto`: `cifar` for images of up to 64 pixels."""
    zero_init_residual: bool = False
    """Start each residual branch at zero (Goyal et al., 2017)."""


class _ResNet(Backbone):
    """State-dict keys are torchvision's without ``fc``, so published weights load as they are."""

    Config = ResNetOptions
    provides = frozenset({"pooled", "map", "stem"})
    stem_dim = 64
    mean_pooled = True
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        options = cast(ResNetOptions, cfg)
        for name, child in self._network(options).named_children():
            self.add_module(name, child)
        self.stride = 32
        if _takes_small_stem(options, image_size):
            self._shrink_stem()

    def _network(self, options: ResNetOptions) -> nn.Module:
        """The trunk's modules under torchvision's names."""
        # Imported here: listing or checking this plugin must not pay for torchvision.
        from torchvision import models

        network: nn.Module = getattr(models, self.name)(
            weights=None, zero_init_residual=options.zero_init_residual
        )
        del network.fc, network.avgpool
        return network

    def _shrink_stem(self) -> None:
        """Chen et al., "A simple framework" (ICML 2020), appendix B.9."""
        conv = nn.Conv2d(3, self.stem_dim, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = conv
        self.maxpool = nn.Identity()
        self.stride = 8

    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to features of :attr:`dim` channels."""
        stem = self.relu(self.bn1(self.conv1(images)))
        x = self.layer1(self.maxpool(stem))
        x = self.layer4(self.layer3(self.layer2(x)))
        return Features(pooled=x.mean((2, 3)), map=x, stem=stem)


class _WideResNet50(_ResNet):
    """ResNet-50 in which every layer, the stem included, is a multiple as wide (Caron et al., "Unsupervised
    learning of visual features by contrasting cluster assignments", NeurIPS 2020, section 4.4).

    Not torchvision's ``wide_resnet50_2``, which widens the inner convolutions only.
    """

    width: ClassVar[int]
    """Factor on the channels of ResNet-50."""

    def _network(self, options: ResNetOptions) -> nn.Module:
        channels = 64 * self.width
        network = nn.Module()
        network.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        network.bn1 = nn.BatchNorm2d(channels)
        network.relu = nn.ReLU(inplace=True)
        network.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for number, blocks in enumerate((3, 4, 6, 3)):
            inner = 64 * self.width * 2**number
            network.add_module(f"layer{number + 1}", _stage(channels, inner, blocks, 2 if number else 1))
            channels = 4 * inner
        _initialise(network, options.zero_init_residual)
        return network


def _stage(channels: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    """Bottleneck blocks of 4 x ``inner`` channels; the first one projects its shortcut and may shrink the map."""
    from torchvision.models.resnet import Bottleneck

    outer = 4 * inner
    shortcut = nn.Sequential(nn.Conv2d(channels, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
    first = Bottleneck(channels, inner, stride, shortcut)
    return nn.Sequential(first, *(Bottleneck(outer, inner) for _ in range(blocks - 1)))


def _initialise(network: nn.Module, zero_residual: bool) -> None:
    """As torchvision does."""
    from torchvision.models.resnet import Bottleneck

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_residual and isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def _takes_small_stem(options: ResNetOptions, image_size: int) -> bool:
    return options.stem == "cifar" or (options.stem == "auto" and image_size <= SMALL_IMAGE)


class ResNet18(_ResNet):
    """11,176,512 parameters with the imagenet stem."""

    name = "resnet18"
    dim = 512


class ResNet34(_ResNet):
    """21,284,672 parameters with the imagenet stem."""

    name = "resnet34"
    dim = 512


class ResNet50(_ResNet):
    """23,508,032 parameters with the imagenet stem."""

    name = "resnet50"
    dim = 2048


class ResNet101(_ResNet):
    """42,500,160 parameters with the imagenet stem."""

    name = "resnet101"
    dim = 2048


class ResNet50W2(_WideResNet50):
    """Twice as wide: 93,907,072 parameters with the imagenet stem."""

    name = "resnet50w2"
    dim = 4096
    width = 2
    stem_dim = 128


class ResNet50W4(_WideResNet50):
    """Four times as wide: 375,378,176 parameters with the imagenet stem."""

    name = "resnet50w4"
    dim = 8192
    width = 4
    stem_dim = 256


class ResNet50W5(_WideResNet50):
    """Five times as wide: 586,450,240 parameters with the imagenet stem."""

    name = "resnet50w5"
    dim = 10240
    width = 5
    stem_dim = 320


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [ResNet18, ResNet34, ResNet50, ResNet101, ResNet50W2, ResNet50W4, ResNet50W5]
