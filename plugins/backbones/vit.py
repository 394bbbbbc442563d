"""Vision transformers of three widths, with patches that fit the size of the images."""

from __future__ import annotations

from sslbench.nn.vit import VisionTransformer
from sslbench.plugin.api import Backbone
from sslbench.plugin.hooks import hookimpl


class ViTTiny(VisionTransformer):
    """5,524,416 parameters with patches of 16 pixels, for images of 224."""

    name = "vit_tiny"
    dim = 192
    heads = 3


class ViTSmall(VisionTransformer):
    """21,665,664 parameters with patches of 16 pixels, for images of 224."""

    name = "vit_small"
    dim = 384
    heads = 6


class ViTBase(VisionTransformer):
    """85,798,656 parameters with patches of 16 pixels, for images of 224."""

    name = "vit_base"
    dim = 768
    heads = 12


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [ViTTiny, ViTSmall, ViTBase]
