"""Tiny backbones and images for checks of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.sources import ArraySource
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor, expand
from sslbench.nn.vit import VisionTransformer, ViTOptions
from sslbench.plugin.api import Backbone, Features, Options, Source, ViewSpec

Norm = Literal["batch", "group"]
"""Of the backbone: over the rows of the batch, or of each row by itself, whatever the number of processes."""

SIDE, CLASSES = 32, 5


class ToyBackbone(Backbone):
    """Two normalised convolutions: 32 pixels to a 4x4 map of 16 features."""

    name = "toy"
    provides = frozenset({"pooled", "map", "stem"})
    dim = 16
    stride = 8
    stem_dim = 8

    def __init__(self, norm: Norm = "batch") -> None:
        super().__init__(Options(), SIDE)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), _norm(norm, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(8, self.dim, 3, stride=2, padding=1, bias=False), _norm(norm, self.dim))

    def forward(self, images: Tensor) -> Features:
        stem = self.stem(images)
        feature_map = self.top(stem)
        return Features(feature_map.relu().mean(dim=(2, 3)), feature_map, stem)


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(4, channels)


class ToyTransformer(VisionTransformer):
    """Two blocks on patches of 8 pixels: 32 pixels to a 4x4 map of 16 features."""

    name = "toy-transformer"
    dim = 16
    heads = 2

    def __init__(self) -> None:
        super().__init__(ViTOptions(patch_size=8, depth=2), SIDE)


def toy_backbone(requires: frozenset[str], norm: Norm) -> Backbone:
    """One that provides what a method requires. With tokens, ``norm`` has no say: each row is normalised alone."""
    return ToyTransformer() if "tokens" in requires else ToyBackbone(norm)


def toy_images(count: int) -> ArraySource:
    """Blurred patches of colour, some common to a class and some an image's own.

    Images that hardly differ would let batch normalisation blow rounding errors up.
    """
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(count) % CLASSES
    common = torch.rand(CLASSES, 3, 4, 4, generator=generator)[classes]
    patches = 128 * common + 127 * torch.rand(count, 3, 4, 4, generator=generator)
    pixels = nn.functional.interpolate(patches, (SIDE, SIDE), mode="bilinear")
    return ArraySource(pixels.byte(), classes)


def toy_loader(
    specs: Sequence[ViewSpec], source: Source, batch_size: int, *, labels: bool, seed: int
) -> TrainLoader:
    """This rank's batches of toy images in a method's own views."""
    cpu = torch.device("cpu")
    views = ViewExecutor(expand(specs, SIDE), size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), device=cpu)
    store = open_store(source, DataOptions(resident="host"), cpu, lambda line: None)
    return TrainLoader(
        source,
        store,
        views,
        seed=seed,
        global_batch=batch_size,
        rank=comm.rank(),
        world=comm.world(),
        labels=labels,
        workers=0,
    )
