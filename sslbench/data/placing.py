"""Where the pixels of a training set should live: a rule over sizes, free memory and options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from sslbench.config.schema import DataOptions
from sslbench.cores import processes_here
from sslbench.data.memory import free_host_memory

WORTH_KEEPING = 16 << 20
"""Bytes of pixels from which on decoding takes longer (about a second) than a cache is worth explaining."""

_MIB = 1 << 20


class Place(StrEnum):
    """Where images are, in words."""

    DEVICE = "resident on the device"
    HOST = "resident on the host"
    MAPPED = "mapped from the cache"
    WORKERS = "decoded by workers"


@dataclass(frozen=True)
class Images:
    """What the rule has to know about a source."""

    total: int | None
    """Bytes of all pixels; None if images differ in size."""
    in_memory: bool = False
    """Whether the source holds all pixels anyway."""
    cacheable: bool = False
    """Whether pixels can be kept on disk."""


@dataclass(frozen=True)
class Room:
    """Free memory in bytes."""

    host: int
    device: int | None = None
    """Of an accelerator; None: the device is the host."""
    processes: int = 1
    """That share the host, each with its own copy unless the images are mapped."""

    @classmethod
    def of(cls, device: torch.device) -> Room:
        """As it is now."""
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        return cls(free_host_memory(), free, processes_here())


def choose_place(images: Images, options: DataOptions, room: Room) -> tuple[Place, str]:
    """Where the images go, and why."""
    if options.resident == "off":
        return Place.WORKERS, "data.resident=off"
    if images.total is None:
        return Place.WORKERS, "sizes differ"
    if options.resident != "auto":
        return _asked_for(images, options), f"{_mib(images.total)}, data.resident={options.resident}"
    return _by_size(images, images.total, options, room)


def _asked_for(images: Images, options: DataOptions) -> Place:
    if options.resident == "mmap":
        return Place.MAPPED if images.cacheable else Place.HOST
    return Place.DEVICE if options.resident == "device" else Place.HOST


def _by_size(images: Images, total: int, options: DataOptions, room: Room) -> tuple[Place, str]:
    limit = options.resident_limit_mb
    if limit is not None and total > limit * _MIB:
        return Place.WORKERS, f"{_mib(total)} exceed data.resident_limit_mb={limit}"
    if room.device is not None and total <= room.device / 4:
        return Place.DEVICE, f"{_mib(total)} of {_mib(room.device)} free"
    if images.in_memory:
        return Place.HOST if room.device is not None else Place.DEVICE, _mib(total)
    if images.cacheable and total >= WORTH_KEEPING and total <= room.host / 2:
        return Place.MAPPED, f"{_mib(total)}, once for all processes"
    if total * room.processes <= room.host / 2:
        return Place.HOST if room.device is not None else Place.DEVICE, f"{_mib(total)} of {_mib(room.host)} free"
    copies = f" in each of {room.processes} processes" if room.processes > 1 and not images.cacheable else ""
    return Place.WORKERS, f"{_mib(total)}{copies} exceed half of the {_mib(room.host)} free"


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"
