"""torchvision ResNets without the classifier (ResNet-18, -34, -50, -101), with a stem for small images."""

from __future__ import annotations

from typing import Literal, cast

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
        # Imported here: listing or checking this plugin must not pay for torchvision.
        from torchvision import models

        options = cast(ResNetOptions, cfg)
        network = getattr(models, self.name)(weights=None, zero_init_residual=options.zero_init_residual)
        del network.fc, network.avgpool
        for name, child in network.named_children():
            self.add_module(name, child)
        self.stride = 32
        if _takes_small_stem(options, image_size):
            self._shrink_stem()

    def _shrink_stem(self) -> None:
        """Chen et al., "A simple framework" (ICML 2020), appendix B.9."""
        conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = conv
        self.maxpool = nn.Identity()
        self.stride = 8

    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to features of :attr:`dim` channels."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return Features(pooled=x.mean((2, 3)), map=x)


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


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [ResNet18, ResNet34, ResNet50, ResNet101]
