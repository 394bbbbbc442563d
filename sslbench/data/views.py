"""Executes view specifications on whole batches: where to crop, the crop itself, colours.

Random numbers are drawn on the CPU as a pure function of each sample's position (:class:`sslbench.rng.Draws`), so
the geometry of a sample does not depend on the batch, worker or rank that computes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sslbench.data.augment import normalize, normalize_levels
from sslbench.data.boxes import CROP_TRIES, center_box, overlapping_box, padded_box, random_resized_box
from sslbench.data.cropping import Geometry, side_of
from sslbench.data.photometric import augment_colors
from sslbench.data.resample import resample, resize_matrix, to_rows
from sslbench.errors import ConfigError
from sslbench.plugin.api import View
from sslbench.plugin.viewspec import ViewSpec
from sslbench.rng import Draws


def expand(specs: Sequence[ViewSpec], default_size: int) -> tuple[ViewSpec, ...]:
    """One specification per view: counts multiplied out, missing sizes filled in.

    Raises:
        ConfigError: ``near`` names no earlier view.
    """
    views = tuple(
        spec.model_copy(update={"count": 1, "size": spec.size or default_size})
        for spec in specs
        for _ in range(spec.count)
    )
    for number, view in enumerate(views):
        if view.near is not None and view.near >= number:
            raise ConfigError(
                f"view {number} has near={view.near}, which is not an earlier view",
                hint="views are numbered from 0 in the order of method.views, each one of a count by itself",
            )
    return views


def draw_geometry(
    spec: ViewSpec, sizes: Tensor, draws: Draws, stream: str, anchor: Geometry | None = None
) -> Geometry:
    """Crop box and flip of one view of each sample.

    Args:
        spec: the view.
        sizes: int64 heights and widths ``[B,2]``.
        draws: random numbers of these B samples.
        stream: prefix of this view's random streams.
        anchor: the view that ``spec.near`` names.
    """
    box = _draw_box(spec, sizes.double(), draws, stream)
    if anchor is not None:
        tries = draws.uniform(f"{stream}/near", CROP_TRIES, 4).double()
        box = overlapping_box(sizes.double(), spec, tries, anchor.box.double(), otherwise=box)
    flip = draws.uniform(f"{stream}/flip") < spec.flip
    return Geometry(box.float(), flip)


def _draw_box(spec: ViewSpec, sizes: Tensor, draws: Draws, stream: str) -> Tensor:
    if spec.crop == "resized":
        return random_resized_box(sizes, spec, draws.uniform(f"{stream}/crop", CROP_TRIES + 1, 2).double())
    if spec.crop == "padded":
        return padded_box(sizes, spec, draws.uniform(f"{stream}/crop", 2).double())
    return center_box(sizes, spec)


class ViewExecutor:
    """Turns images into the views that ``specs`` describe.

    Args:
        specs: what a method declares.
        size: side in pixels of views whose specification leaves it open.
        mean: per channel, of images in [0, 1].
        std: per channel.
        device: where :meth:`crop` and :meth:`finish` run.
        channels_last: memory format of the finished images.
    """

    def __init__(
        self,
        specs: Sequence[ViewSpec],
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.specs = expand(specs, size)
        self.size = size
        self.device = device
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def like(self, specs: Sequence[ViewSpec]) -> ViewExecutor:
        """An executor of other views of the same images on the same device."""
        other = copy.copy(self)
        other.specs = expand(specs, self.size)
        return other

    def geometry(self, draws: Draws, sizes: Tensor) -> list[Geometry]:
        """Draw crop boxes and flips, one :class:`Geometry` per view; ``sizes`` int64 ``[B,2]`` heights, widths."""
        geometry: list[Geometry] = []
        for v, spec in enumerate(self.specs):
            anchor = None if spec.near is None else geometry[spec.near]
            geometry.append(draw_geometry(spec, sizes, draws, f"view{v}", anchor))
        return geometry

    def crop(self, images: Tensor, geometry: list[Geometry]) -> list[Tensor]:
        """Crop, resize and flip images of one size.

        Args:
            images: uint8 ``[B,3,H,W]`` on the device.
            geometry: one per view.

        Returns:
            Per view float32 ``[B,3,S,S]`` in [0, 1].
        """
        rows = to_rows(images).div_(255)
        return [self._crop_view(rows, spec, g) for spec, g in zip(self.specs, geometry, strict=True)]

    def _crop_view(self, rows: Tensor, spec: ViewSpec, geometry: Geometry) -> Tensor:
        height, width, side = rows.shape[1], rows.shape[3], side_of(spec)
        x0, y0, x1, y1 = geometry.box.to(self.device, non_blocking=True).unbind(1)
        flip = geometry.flip.to(self.device, non_blocking=True)
        margin = math.ceil(max(height, width) * spec.padding) if spec.crop == "padded" else 0
        vertical = resize_matrix(y0, y1, height, side, spec.interpolation, margin=margin)
        horizontal = resize_matrix(x0, x1, width, side, spec.interpolation, flip, margin)
        return resample(rows, vertical, horizontal)

    def finish(
        self,
        crops: list[Tensor],
        geometry: list[Geometry],
        draws: Draws,
        sizes: Tensor,
        colored: Sequence[bool] | None = None,
    ) -> tuple[View, ...]:
        """Colour operations and normalisation.

        Args:
            crops: per view ``[B,3,S,S]`` on the device, float in [0, 1] or uint8; not modified.
            geometry: what the crops were cut with.
            draws: the random numbers the geometry was drawn with.
            sizes: int64 ``[B,2]`` heights and widths of the source images, on the CPU.
            colored: per view, whether its crops, then uint8, have their colours already; None: none has.
        """
        done = colored or [False] * len(crops)
        return tuple(
            self._finish_view(v, crop, g, None if done[v] else draws, sizes)
            for v, (crop, g) in enumerate(zip(crops, geometry, strict=True))
        )

    def _finish_view(
        self, number: int, crop: Tensor, geometry: Geometry, draws: Draws | None, sizes: Tensor
    ) -> View:
        if draws is None:
            images = normalize_levels(crop, self.mean, self.std, self.memory_format)
        else:
            images = crop if crop.is_floating_point() else crop.float().div_(255)
            images = augment_colors(images, self.specs[number], draws, f"view{number}")
            images = normalize(images, self.mean, self.std).contiguous(memory_format=self.memory_format)
        source_size = sizes.flip(1).float()
        box = geometry.box / source_size.repeat(1, 2)
        return View(images, box, geometry.flip, source_size)
