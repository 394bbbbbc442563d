"""Our views for tests that look at the executor from outside only: images in, views out.

Parameters are read off the views of simple images, so these tests hold for any implementation of the executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslbench.data.views import ViewExecutor
from sslbench.plugin.api import View
from sslbench.plugin.viewspec import Jitter, ViewSpec
from sslbench.rng import Draws

BATCH = 500


def executor(*specs: ViewSpec) -> ViewExecutor:
    """Its views are in [0, 1]: normalisation does nothing."""
    return ViewExecutor(specs, size=32, mean=(0, 0, 0), std=(1, 1, 1), device=torch.device("cpu"))


def batches(count: int, seed: int) -> list[Draws]:
    """Random numbers of ``count`` images as training draws them, step by step."""
    starts = range(0, count, BATCH)
    return [Draws(seed, step, torch.arange(min(BATCH, count - start))) for step, start in enumerate(starts)]


def views_of(specs: Sequence[ViewSpec], images: Tensor, seed: int) -> list[View]:
    """All views of uint8 images ``[N,3,H,W]``, one :class:`View` of N rows for each."""
    views = executor(*specs)
    parts = []
    for part, draws in zip(images.split(BATCH), batches(len(images), seed), strict=True):
        sizes = torch.tensor(images.shape[-2:]).expand(len(part), 2)
        geometry = views.geometry(draws, sizes)
        parts.append(views.finish(views.crop(part, geometry), geometry, draws, sizes))
    return [View(*(torch.cat(column) for column in zip(*view, strict=True))) for view in zip(*parts, strict=True)]


def boxes_of(specs: Sequence[ViewSpec], height: int, width: int, count: int, seed: int) -> list[Tensor]:
    """Crop boxes in pixels, float64 ``[count,4]`` for each view."""
    views = executor(*specs)
    drawn = [views.geometry(draws, torch.tensor([[height, width]] * len(draws))) for draws in batches(count, seed)]
    return [torch.cat([geometry.box for geometry in view]).double() for view in zip(*drawn, strict=True)]


def colors(spec: ViewSpec, images: Tensor, seed: int) -> Tensor:
    """The colour operations alone, on float images ``[N,3,S,S]``."""
    views = executor(spec.model_copy(update={"size": images.shape[-1], "crop": "none", "flip": 0.0}))
    parts = []
    for part, draws in zip(images.split(BATCH), batches(len(images), seed), strict=True):
        sizes = torch.tensor(images.shape[-2:]).expand(len(part), 2)
        parts.append(views.finish([part], views.geometry(draws, sizes), draws, sizes)[0].images)
    return torch.cat(parts)


def columns(*pixels: tuple[float, float, float], side: int = 4) -> Tensor:
    """A square image ``[3,S,S]`` whose columns have these colours in turn."""
    return torch.tensor(pixels).T[:, None].expand(3, side, len(pixels)).repeat(1, 1, side // len(pixels))


def _hue(images: Tensor) -> Tensor:
    """Hue (of HSV) of the first pixel as a fraction of the circle, from -0.5 to 0.5."""
    pixels = images[:, :, 0, 0].double()
    red, green, blue = pixels.unbind(1)
    chroma = pixels.amax(1) - pixels.amin(1)
    sectors = torch.stack([(green - blue) / chroma, (blue - red) / chroma + 2, (red - green) / chroma + 4])
    hue = sectors.gather(0, pixels.argmax(1)[None])[0] / 6
    return (hue + 0.5) % 1 - 0.5


class Probe(NamedTuple):
    """An image whose view tells the parameter it was made with."""

    image: Tensor
    read: Callable[[Tensor], Tensor]
    """From views ``[N,3,S,S]`` to parameters ``[N]``."""


def _read_saturation(images: Tensor) -> Tensor:
    return (images[:, 0, 0, 0] - images[:, 2, 0, 0]) / 0.1


PROBES = {
    "brightness": Probe(columns((0.25, 0.25, 0.25)), lambda v: v[:, 0, 0, 0] / 0.25),
    "contrast": Probe(columns((0.45,) * 3, (0.55,) * 3), lambda v: (v[:, 0, 0, 1] - v[:, 0, 0, 0]) / 0.1),
    "saturation": Probe(columns((0.5, 0.45, 0.4)), _read_saturation),
    "hue": Probe(columns((0.75, 0.25, 0.25)), _hue),
}
"""For jitter of one kind alone, with strengths up to 0.8 (hue: 0.5)."""


def jitter_of(name: str, strength: float, p: float = 1.0) -> ViewSpec:
    """A view with one kind of jitter alone."""
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return ViewSpec(jitter=Jitter(p=p, **none | {name: strength}))


def read_parameters(name: str, spec: ViewSpec, count: int, seed: int) -> Tensor:
    """The parameters of that kind of jitter that ``count`` images get, ``[count]``."""
    probe = PROBES[name]
    return probe.read(colors(spec, probe.image.expand(count, -1, -1, -1), seed))
