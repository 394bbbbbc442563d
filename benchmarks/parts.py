"""Plugins that only benchmarks need: images from a file, and a small vision transformer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslbench.data.sources import ArraySource
from sslbench.plugin.api import Backbone, Dataset, DatasetInfo, Features, Options, Source
from sslbench.plugin.hooks import hookimpl

CLASSES = 10


class ArrayOptions(Options):
    """Options of images in a file."""

    images: Path = Field(...)
    """uint8 ``[N,H,W,3]``, written by ``numpy.save``."""


class ArrayImages(Dataset):
    """Square images of one size, with labels that mean nothing."""

    name = "array"
    Config = ArrayOptions

    def __init__(self, cfg: Options) -> None:
        super().__init__(cfg)
        pixels = torch.from_numpy(np.load(cast(ArrayOptions, cfg).images, allow_pickle=False))
        self._pixels = pixels.permute(0, 3, 1, 2).contiguous()

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=tuple(f"class{number}" for number in range(CLASSES)),
            size=self._pixels.shape[-1],
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            splits=("train",),
        )

    def split(self, name: str) -> Source:
        return ArraySource(self._pixels, torch.arange(len(self._pixels)) % CLASSES)

    def fingerprint(self) -> str:
        return f"{tuple(self._pixels.shape)}"


class ViTSmall16(Backbone):
    """torchvision's VisionTransformer as ViT-S/16: 12 layers of width 384, 6 heads, patches of 16 pixels."""

    name = "vit_s16"
    dim = 384
    stride = 16

    def __init__(self, cfg: Options, image_size: int) -> None:
        from torchvision.models import VisionTransformer

        super().__init__(cfg, image_size)
        self.network = VisionTransformer(image_size, self.stride, 12, 6, self.dim, 4 * self.dim)
        del self.network.heads

    def forward(self, images: Tensor) -> Features:
        patches = self.network.conv_proj(images)
        tokens = patches.flatten(2).transpose(1, 2)
        first = self.network.class_token.expand(len(tokens), -1, -1)
        encoded = self.network.encoder(torch.cat([first, tokens], dim=1))
        return Features(encoded[:, 0], encoded[:, 1:].transpose(1, 2).unflatten(2, patches.shape[2:]))


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [ArrayImages]


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [ViTSmall16]
