"""A tiny backbone and synthetic batches for the tests of methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslbench.plugin.api import Backbone, Batch, Build, Features, Method, Options, View
from sslbench.rng import Draws
from sslbench.testing.toys import ToyTransformer

SIDE = 32


class TinyBackbone(Backbone):
    """Two convolutions, 32 px to a 4x4 map of 16 features. Without normalisation its rows are independent."""

    name = "tiny"
    provides = frozenset({"pooled", "map", "stem"})
    dim = 16
    stride = 8
    stem_dim = 8

    def __init__(self, norm: bool = True) -> None:
        super().__init__(Options(), SIDE)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, self.dim, 3, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> Features:
        stem = self.layers[:3](images)
        feature_map = self.layers[3](stem)
        return Features(feature_map.mean(dim=(2, 3)), feature_map, stem)


def build(norm: bool = True, num_classes: int | None = 10, tokens: bool = False) -> Build:
    return Build(lambda: ToyTransformer() if tokens else TinyBackbone(norm), 8, 100, 50, 10, num_classes)


def make(cls: type[Method], seed: int = 0, norm: bool = True, **options: object) -> Method:
    """A method with reproducible initial weights."""
    torch.manual_seed(seed)
    return cls(cls.Config(**options), build(norm, tokens="tokens" in cls.requires))


def view(images: Tensor, generator: torch.Generator) -> View:
    """Random crops of 40x30 sources with at least 60 % of each side."""
    n = len(images)
    extent = 0.6 + 0.4 * torch.rand(n, 2, generator=generator)
    corner = (1 - extent) * torch.rand(n, 2, generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    return View(images, torch.cat([corner, corner + extent], dim=1), flip, torch.tensor([40.0, 30.0]).expand(n, 2))


def batch(size: int = 8, views: int = 2, seed: int = 0, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shapes = (size, 3, SIDE, SIDE)
    made = tuple(view(torch.randn(shapes, generator=generator), generator) for _ in range(views))
    labels = torch.randint(0, 10, (size,), generator=generator)
    return Batch(made, torch.arange(size), Draws(seed, step, torch.arange(size)), labels)


def rows(whole: Batch, start: int, stop: int) -> Batch:
    """The share of ``whole`` that a rank with these rows would get."""
    part = slice(start, stop)
    views = tuple(View(*(field[part] for field in each)) for each in whole.views)
    draws = Draws(whole.draws.seed, whole.draws.step, whole.draws.positions[part])
    labels = None if whole.labels is None else whole.labels[part]
    return Batch(views, whole.index[part], draws, labels)
