"""Where the pixels of a training set live: one tensor, in memory or in a mapped file, or files to be decoded."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.cache import MappedPixels, PixelCache, read_sized
from sslbench.data.entry import cache_folder
from sslbench.data.imagefile import threaded
from sslbench.data.locking import Log
from sslbench.data.placing import WORTH_KEEPING, Images, Place, Room, choose_place
from sslbench.errors import ConfigError, DataError
from sslbench.plugin.api import Source

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
        pixels: uint8 ``[N,3,H,W]`` on the training device, or on the host, perhaps a file mapped into memory.
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
            return self.pixels.index_select(0, index.to(self.device, non_blocking=True))
        return to_device(rows(self.pixels, index, pinned=self.device.type == "cuda"), self.device)


def rows(pixels: Tensor, index: Tensor, *, pinned: bool) -> Tensor:
    """Some images of a tensor on the host; ``index_select`` copies 20 times as fast as ``pixels[index]`` does.

    Args:
        pinned: into memory from which a device copies while the host goes on. torch keeps such memory and uses it
            again once the copy is done.
    """
    out = torch.empty((len(index), *pixels.shape[1:]), dtype=pixels.dtype, pin_memory=pinned)
    return torch.index_select(pixels, 0, index, out=out)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def next_sample(number: int, samples: Tensor, unreadable: Collection[int]) -> int:
    """The readable sample that follows ``number``, cyclically, in ``samples`` (sorted int64 ``[M]``)."""
    start = int(torch.searchsorted(samples, number))
    for step in range(1, len(samples)):
        following = int(samples[(start + step) % len(samples)])
        if following not in unreadable:
            return following
    raise DataError("none of the images can be read", hint="repair or remove the files")


def open_store(source: Source, options: DataOptions, device: torch.device, log: Log) -> Store:
    """Choose where the pixels live and bring them there. All ranks choose what the first one chooses.

    Pixels that workers decode differ by rounding: a cache that one rank cannot have is used by none.

    Args:
        source: the training images.
        options: decide, with the free memory.
        device: the training device.
        log: receives the choice with its reason, progress, and the names of unreadable images.

    Raises:
        DataError: too many images are unreadable.
        ConfigError: ``data.resident`` asks for residence and the images differ in size.
    """
    images, cache = comm.patiently(lambda: _look_at(source, options, log))
    if images.total is None and options.resident not in ("auto", "off"):
        raise ConfigError(
            f"data.resident={options.resident} needs images of one size, and these differ",
            hint="data.resident=auto",
        )
    place, reason = comm.broadcast_object(choose_place(images, options, Room.of(device)))
    log(f"images: {place} ({reason})")
    wanted = cache if place is not Place.WORKERS else None
    mapped = comm.patiently(lambda: _noted(source, wanted.find_or_build() if wanted else None))
    if place is Place.MAPPED and (lacking := _lacking(mapped)):
        if comm.world() > 1:
            log(f"decoded images could not be kept for {lacking}, so no process uses kept ones")
        free = Room.of(device)
        place, reason = comm.broadcast_object(choose_place(replace(images, cacheable=False), options, free))
        log(f"images: {place} ({reason})")
    unreadable = Unreadable(source, options.max_unreadable, log)
    if place is Place.WORKERS:
        return DecodedStore(unreadable)
    target = device if place is Place.DEVICE else torch.device("cpu")
    apart = mapped is not None and place is not Place.MAPPED
    pixels = comm.patiently(lambda: _pixels(source, mapped, unreadable).to(target, copy=apart))
    return ResidentStore(pixels, device, unreadable)


def _lacking(mapped: MappedPixels | None) -> str:
    """The processes that have no mapped pixels, in words; empty if all have them."""
    without = comm.gather(torch.tensor([float(mapped is None)])).nonzero().flatten().tolist()
    return f"process {', '.join(map(str, without))} of {comm.world()}" if without else ""


def mapped_pixels(source: Source, options: DataOptions, log: Log, *, build: bool) -> MappedPixels | None:
    """The decoded images of a source that are kept on disk; None if there are none, or they are not wanted.

    Args:
        source: its images are decoded one at a time.
        options: of the store.
        log: receives progress.
        build: decode and keep them now if they are not there, by the rule for training.
    """
    if options.resident == "off":
        return None
    if source in _opened:
        return _opened[source]
    images, cache = _look_at(source, options, log)
    if cache is None:
        return None
    # An accelerator's memory holds training images, which are read more than once.
    place, _ = choose_place(images, options, Room.of(torch.device("cpu")))
    return _noted(source, cache.find_or_build() if build and place is not Place.WORKERS else cache.find())


_opened: WeakKeyDictionary[Source, MappedPixels] = WeakKeyDictionary()
"""What this process has mapped already, so that probes do not look for it in each epoch."""


def _noted(source: Source, mapped: MappedPixels | None) -> MappedPixels | None:
    if mapped is not None:
        _opened[source] = mapped
    return mapped


def _look_at(source: Source, options: DataOptions, log: Log) -> tuple[Images, PixelCache | None]:
    """What decides, and the source's place on disk if its pixels are worth keeping."""
    size = None if options.resident == "off" else source.common_size()
    if size is None:
        return Images(total=None), None
    total, in_memory = len(source) * 3 * size[0] * size[1], source.pixels() is not None
    cache = None if in_memory else _pixel_cache(source, size, options, log)
    return Images(total, in_memory, cache is not None), cache


def _pixel_cache(source: Source, size: tuple[int, int], options: DataOptions, log: Log) -> PixelCache | None:
    """The place on disk of decoded images of one size; None if they are not to be kept."""
    worth = options.cache and len(source) * 3 * size[0] * size[1] >= WORTH_KEEPING
    if not worth and options.resident != "mmap":
        return None
    revision = source.revision()
    if revision is None:
        return None
    return PixelCache(source, revision, size, cache_folder(options), log)


def _pixels(source: Source, mapped: MappedPixels | None, unreadable: Unreadable) -> Tensor:
    """uint8 ``[N,3,H,W]`` on the host."""
    if mapped is not None:
        unreadable.add(mapped.unreadable)
        return mapped.pixels
    pixels = source.pixels()
    return _decode_all(source, unreadable) if pixels is None else pixels


def _decode_all(source: Source, unreadable: Unreadable) -> Tensor:
    """Decode every image once, in threads."""
    size = source.common_size() or (0, 0)
    pixels = torch.zeros(len(source), 3, *size, dtype=torch.uint8)

    def decode(index: int) -> str | None:
        image = read_sized(source, index, size)
        if isinstance(image, str):
            return image
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
