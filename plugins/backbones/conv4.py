"""Four convolution blocks with 64 features: the small network of the relational-reasoning benchmark."""

from __future__ import annotations

from torch import Tensor, nn

from sslbench.nn.pooling import halve
from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False))
    block.add_module("bn", nn.BatchNorm2d(channels_out))
    block.add_module("relu", nn.ReLU(inplace=True))
    return block


class Conv4(Backbone):
    """Conv4 of Patacchiola & Storkey, "Self-supervised relational reasoning" (NeurIPS 2020), section 4.

    Blocks 1 to 3 end with 2x2 average pooling, so inputs need a side of 8 pixels or more. 24,648 parameters.
    """

    name = "conv4"
    provides = frozenset({"pooled", "map", "stem"})
    dim = 64
    stride = 8
    stem_dim = 8
    mean_pooled = True

    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.block1 = _block(3, 8)
        self.block2 = _block(8, 16)
        self.block3 = _block(16, 32)
        self.block4 = _block(32, 64)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to features of 64 channels."""
        stem = self.block1(images)
        x = halve(stem)
        for block in (self.block2, self.block3):
            x = halve(block(x))
        x = self.block4(x)
        return Features(pooled=x.mean((2, 3)), map=x, stem=stem)

    def segments(self) -> list[nn.Module]:
        return [self.block1, self.block2, self.block3, self.block4]


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [Conv4]
