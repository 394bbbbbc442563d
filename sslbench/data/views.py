"""Executes view specifications on whole batches: where to crop, the crop itself, colours.

Random numbers are drawn on the CPU as a pure function of each sample's position (:class:`sslbench.rng.Draws`), so
the geometry of a sample does not depend on the batch, worker or rank that computes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sslbench.data.augment import Normalization, normalize_levels
from sslbench.data.boxes import CROP_TRIES, center_box, overlapping_box, padded_box, random_resized_box
from sslbench.data.cropping import Geometry, crop_image, side_of
from sslbench.data.photometric import Colors, apply_colors, draw_colors
from sslbench.data.resample import crop_matrix, resample, to_rows
from sslbench.errors import ConfigError
from sslbench.plugin.api import View
from sslbench.plugin.viewspec import ViewSpec
from sslbench.rng import Draws

_MOST_PRODUCTS = 5_000_000
"""Multiplications an image up to which matrices crop faster on a CPU than torch's resizing of single images."""
_CACHED_VALUES = 1 << 20
"""Numbers that a CPU treats at a time, so that they are still in its cache when the next operation needs them."""


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
    spec: ViewSpec, sizes: Tensor, draws: Draws, streams: Sequence[str], anchor: Geometry | None = None
) -> Geometry:
    """Crop boxes and flips of V views of B samples, those of the first view first.

    Args:
        spec: that of all these views.
        sizes: int64 heights and widths ``[B,2]``.
        draws: random numbers of these B samples.
        streams: prefix of the random streams of each view.
        anchor: the view that ``spec.near`` names; then V is 1.
    """

    def uniform(name: str, *shape: int) -> Tensor:
        return draws.stacked([f"{stream}/{name}" for stream in streams], *shape).flatten(0, 1)

    extents = sizes.double().repeat(len(streams), 1)
    if spec.crop == "resized":
        box = random_resized_box(extents, spec, uniform("crop", CROP_TRIES + 1, 2).double())
    elif spec.crop == "padded":
        box = padded_box(extents, spec, uniform("crop", 2).double())
    else:
        box = center_box(extents, spec)
    if anchor is not None:
        tries = uniform("near", CROP_TRIES, 4).double()
        box = overlapping_box(extents, spec, tries, anchor.box.double(), otherwise=box)
    return Geometry(box.float(), uniform("flip") < spec.flip)


def _alike(specs: Sequence[ViewSpec]) -> list[list[int]]:
    """Numbers of the views, those together whose specifications differ in no more than where they are cut."""
    groups: dict[str, list[int]] = {}
    for number, spec in enumerate(specs):
        groups.setdefault(spec.model_dump_json(exclude={"near", "overlap"}), []).append(number)
    return list(groups.values())


class ViewExecutor:
    """Turns images into the views that ``specs`` describe.

    Views of one specification are computed in one go, which changes none of their numbers.

    Args:
        specs: what a method declares.
        size: side in pixels of views whose specification leaves it open.
        mean: per channel, of images in [0, 1].
        std: per channel.
        device: where :meth:`crop` and :meth:`finish` run.
        channels_last: memory format of the finished images.
        colors: ``fused`` approximates jitter and greyscale by one affine map per image
            (:mod:`sslbench.data.fused`).
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
        colors: Literal["exact", "fused"] = "exact",
    ) -> None:
        self.colors = colors
        self.size = size
        self.device = device
        self.normalization = Normalization(
            *(torch.tensor(part, dtype=torch.float32, device=device) for part in (mean, std))
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._declare(specs)

    def _declare(self, specs: Sequence[ViewSpec]) -> None:
        self.specs = expand(specs, self.size)
        self._groups = _alike(self.specs)

    def like(self, specs: Sequence[ViewSpec]) -> ViewExecutor:
        """An executor of other views of the same images on the same device."""
        other = copy.copy(self)
        other._declare(specs)
        return other

    def geometry(self, draws: Draws, sizes: Tensor) -> list[Geometry]:
        """Draw crop boxes and flips, one :class:`Geometry` per view; ``sizes`` int64 ``[B,2]`` heights, widths."""
        free = [v for v, spec in enumerate(self.specs) if spec.near is None]
        geometry: dict[int, Geometry] = {}
        for group in ([v for v in group if v in free] for group in self._groups):
            if group:
                drawn = draw_geometry(self.specs[group[0]], sizes, draws, _streams(group))
                parts = zip(*(part.tensor_split(len(group)) for part in drawn), strict=True)
                geometry |= {v: Geometry(*part) for v, part in zip(group, parts, strict=True)}
        for v, spec in enumerate(self.specs):
            if spec.near is not None:
                geometry[v] = draw_geometry(spec, sizes, draws, _streams([v]), geometry[spec.near])
        return [geometry[v] for v in range(len(self.specs))]

    def crop(self, images: Tensor, geometry: list[Geometry]) -> list[Tensor]:
        """Crop, resize and flip images of one size.

        Args:
            images: uint8 ``[B,3,H,W]`` on the device.
            geometry: one per view.

        Returns:
            Per view ``[B,3,S,S]``: float32 in [0, 1], or uint8.
        """
        crops: dict[int, Tensor] = {}
        rows: Tensor | None = None
        for group in self._groups:
            spec = self.specs[group[0]]
            if self.device.type == "cpu" and _products(images, side_of(spec)) > _MOST_PRODUCTS:
                crops |= {v: _crop_singly(images, spec, geometry[v]) for v in group}
                continue
            rows = to_rows(images).div_(255) if rows is None else rows
            cut = self._crop_alike(rows, spec, _joined(geometry, group))
            crops |= dict(zip(group, cut.tensor_split(len(group)), strict=True))
        return [crops[v] for v in range(len(self.specs))]

    def _crop_alike(self, rows: Tensor, spec: ViewSpec, geometry: Geometry) -> Tensor:
        height, width, side = rows.shape[1], rows.shape[3], side_of(spec)
        margin = math.ceil(max(height, width) * spec.padding) if spec.crop == "padded" else 0
        x0, y0, x1, y1 = geometry.box.unbind(1)
        upright = torch.zeros_like(geometry.flip)
        vertical = crop_matrix(y0, y1, height, side, spec.interpolation, upright, margin, self.device)
        horizontal = crop_matrix(x0, x1, width, side, spec.interpolation, geometry.flip, margin, self.device)
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
            colored: per view, whether its crops, then uint8, have their colours already (views of one
                specification all or none); None: none has.
        """
        source = sizes.flip(1).float()
        boxes = torch.stack([g.box for g in geometry]) / source.repeat(1, 2)
        flips = torch.stack([g.flip for g in geometry])
        images: dict[int, Tensor] = {}
        for group in self._groups:
            joined = torch.cat([crops[v] for v in group])
            if colored is not None and colored[group[0]]:
                finished = normalize_levels(joined, *self.normalization, self.memory_format)
            else:
                finished = self._finish_alike(joined, group, draws)
            images |= dict(zip(group, finished.tensor_split(len(group)), strict=True))
        return tuple(View(images[v], boxes[v], flips[v], source) for v in range(len(self.specs)))

    def _finish_alike(self, images: Tensor, group: list[int], draws: Draws) -> Tensor:
        spec = self.specs[group[0]]
        colors = draw_colors(spec, draws, _streams(group), self.colors == "fused")
        share = len(images) if self.device.type != "cpu" else max(1, _CACHED_VALUES // images[0].numel())
        parts = [slice(start, start + share) for start in range(0, len(images), share)]
        if len(parts) == 1:
            return self._finish_part(images, spec, colors).contiguous(memory_format=self.memory_format)
        finished = torch.empty(images.shape, device=images.device, memory_format=self.memory_format)
        for rows in parts:
            finished[rows] = self._finish_part(images[rows], spec, colors.of(rows))
        return finished

    def _finish_part(self, images: Tensor, spec: ViewSpec, colors: Colors) -> Tensor:
        images = images if images.is_floating_point() else images.float().div_(255)
        return apply_colors(images, spec, colors, self.normalization)


def _streams(group: Sequence[int]) -> list[str]:
    return [f"view{number}" for number in group]


def _joined(geometry: Sequence[Geometry], group: Sequence[int]) -> Geometry:
    return Geometry(*(torch.cat(parts) for parts in zip(*(geometry[v] for v in group), strict=True)))


def _products(images: Tensor, side: int) -> int:
    """Multiplications that one image's pair of matrices takes."""
    channels, height, width = images.shape[1:]
    return channels * height * side * (width + side)


def _crop_singly(images: Tensor, spec: ViewSpec, geometry: Geometry) -> Tensor:
    rows = zip(*(part.tensor_split(len(images)) for part in geometry), strict=True)
    return torch.stack(
        [crop_image(image, [spec], [Geometry(*row)])[0] for image, row in zip(images, rows, strict=True)]
    )
