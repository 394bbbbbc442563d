"""A small convolutional network that uses all of what API 1.0 asks of a backbone."""

from pydantic import Field
from torch import Tensor, nn

from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl

API_VERSION = "1.0"


class TinyOptions(Options):
    """Options of `api10_tiny`."""

    width: int = Field(16, ge=4)
    """Channels of the last map."""


class Tiny(Backbone):
    name = "api10_tiny"
    Config = TinyOptions
    provides = frozenset({"pooled", "map", "stem"})
    stride = 4
    stem_dim = 8

    cfg: TinyOptions

    def __init__(self, cfg: TinyOptions, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.dim = cfg.width
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, cfg.width, 3, 2, 1, bias=False), nn.BatchNorm2d(cfg.width), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Features:
        stem = self.stem(images)
        x = self.body(stem)
        return Features(pooled=x.mean((2, 3)), map=x, stem=stem)

    def segments(self) -> list[nn.Module]:
        return [self.stem, self.body]


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [Tiny]
