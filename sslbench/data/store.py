"""Where the pixels of a training set live: in memory as one tensor, or in files that workers decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sslbench.config.schema import DataOptions
from sslbench.data.imagefile import threaded
from sslbench.errors import ConfigError, DataError, SslbenchError
from sslbench.plugin.api import Source

Log = Callable[[str], None]

_PROGRESS_SECONDS = 5.0
_NAMED = 10


@dataclass
class Unreadable:
    """The images that could not be read. Each is named in the log once.

    A slot whose image cannot be read shows the next readable one of the samples in use, with that one's number and
    label, in every epoch: the batch keeps its size and no image is paired with another one's label.
    """

    source: Source
    limit: int
    """How many are tolerated (``data.max_unreadable``)."""
    log: Log
    reasons: dict[int, str] = field(default_factory=dict)
    """By number of the sample."""

    def add(self, found: Mapping[int, str]) -> None:
        """Note images by number, with the reason.

        Raises:
            DataError: more images than the limit are unreadable.
        """
        new = {index: reason for index, reason in found.items() if index not in self.reasons}
        self.reasons.update(new)
        if new and len(self.reasons) > self.limit:
            named = "\n  ".join(list(self.reasons.values())[:_NAMED])
            raise DataError(
                f"{len(self.reasons)} unreadable image(s), {self.limit} allowed:\n  {named}",
                hint=f"repair or remove the files, or skip some: data.max_unreadable={2 * len(self.reasons)}",
            )
        for reason in new.values():
            self.log(f"skipping an unreadable image: {reason}")


class Store(Protocol):
    """How a loader gets at the images of a source."""

    unreadable: Unreadable


class DecodedStore:
    """Images stay with their source; worker processes decode and crop them, batch after batch."""

    def __init__(self, unreadable: Unreadable) -> None:
        self.unreadable = unreadable


class ResidentStore:
    """All images as one uint8 tensor.

    Args:
        pixels: uint8 ``[N,3,H,W]`` on the training device, or on the host.
        device: the training device.
        unreadable: the images whose pixels are missing.
    """

    def __init__(self, pixels: Tensor, device: torch.device, unreadable: Unreadable) -> None:
        self.pixels = pixels
        self.device = device
        self.unreadable = unreadable

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def take(self, index: Tensor) -> Tensor:
        """uint8 ``[B,3,H,W]`` on the training device; ``index`` is int64 ``[B]`` on the CPU."""
        if self.pixels.device.type == self.device.type:
            return self.pixels[index.to(self.device, non_blocking=True)]
        return self.pixels[index].pin_memory().to(self.device, non_blocking=True)


def next_sample(number: int, samples: Tensor, unreadable: Collection[int]) -> int:
    """The readable sample that follows ``number``, cyclically, in ``samples`` (sorted int64 ``[M]``)."""
    start = int(torch.searchsorted(samples, number))
    for step in range(1, len(samples)):
        following = int(samples[(start + step) % len(samples)])
        if following not in unreadable:
            return following
    raise DataError("none of the images can be read", hint="repair or remove the files")


def open_store(source: Source, options: DataOptions, device: torch.device, log: Log) -> Store:
    """Choose where the pixels live and bring them there.

    Args:
        source: the training images.
        options: ``resident``, ``resident_limit_mb`` and ``max_unreadable`` decide.
        device: the training device.
        log: receives the choice with its reason, progress, and the names of unreadable images.

    Raises:
        DataError: too many images are unreadable.
        ConfigError: ``data.resident`` asks for residence and the images differ in size.
    """
    unreadable = Unreadable(source, options.max_unreadable, log)
    place, reason = _place(source, options, device)
    log(f"images: {place} ({reason})")
    if place == "decoded by workers":
        return DecodedStore(unreadable)
    pixels = source.pixels()
    if pixels is None:
        pixels = _decode_all(source, unreadable)
    on_device = place == "resident on the device"
    return ResidentStore(pixels.to(device) if on_device else pixels, device, unreadable)


def _place(source: Source, options: DataOptions, device: torch.device) -> tuple[str, str]:
    """Where the images go and why."""
    if options.resident == "off":
        return "decoded by workers", "data.resident=off"
    size = source.common_size()
    if size is None:
        if options.resident != "auto":
            raise ConfigError(
                f"data.resident={options.resident} needs images of one size, and these differ",
                hint="data.resident=auto",
            )
        return "decoded by workers", "sizes differ"
    megabytes = len(source) * 3 * size[0] * size[1] / 2**20
    if options.resident == "auto" and megabytes > options.resident_limit_mb:
        return (
            "decoded by workers",
            f"{megabytes:.0f} MiB exceed data.resident_limit_mb={options.resident_limit_mb}",
        )
    fits = _free_megabytes(device) >= 2 * megabytes
    if options.resident == "device" or (options.resident == "auto" and fits):
        return "resident on the device", f"{megabytes:.0f} MiB"
    return "resident on the host", f"{megabytes:.0f} MiB"


def _free_megabytes(device: torch.device) -> float:
    """Free memory of an accelerator; without one the limit option alone decides."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] / 2**20


def _decode_all(source: Source, unreadable: Unreadable) -> Tensor:
    """Decode every image once, in threads."""
    height, width = source.common_size() or (0, 0)
    pixels = torch.zeros(len(source), 3, height, width, dtype=torch.uint8)

    def decode(index: int) -> str | None:
        image = read_or_reason(source, index)
        if isinstance(image, str):
            return image
        if image.shape != pixels.shape[1:]:
            return f"{source.describe(index)}: decoded to {tuple(image.shape)}, not {tuple(pixels.shape[1:])}"
        pixels[index] = image
        return None

    reasons: dict[int, str] = {}
    told = time.monotonic()
    for index, reason in enumerate(threaded(decode, range(len(source)))):
        if reason is not None:
            reasons[index] = reason
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            unreadable.log(f"decoded {index + 1} of {len(source)} images")
    unreadable.add(reasons)
    return pixels


def read_or_reason(source: Source, index: int) -> Tensor | str:
    """The image, or why it cannot be read."""
    try:
        return source.image(index)
    except (SslbenchError, OSError) as error:
        return str(error)
