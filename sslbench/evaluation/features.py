"""Frozen features of a split: one pass through the backbone."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.loader import EvalLoader, rank_share
from sslbench.data.store import Unreadable
from sslbench.engine.layout import faster_layout
from sslbench.errors import DataError, write_failure
from sslbench.plugin.api import Backbone, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the backbone's input, without augmentation."""

    size: int
    center: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class IndexedFeatures:
    """Features ``[N,D]`` (float32) of the samples ``indices`` ``[N]`` (int64, ascending)."""

    def __init__(self, features: Tensor, indices: Tensor) -> None:
        self.features = features
        self.indices = indices


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_digests(module: torch.nn.Module) -> dict[str, str]:
    """The digest of each parameter and buffer of a module."""
    return {name: tensor_digest(value) for name, value in module.state_dict().items()}


def json_digest(content: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Extractor:
    """One pass of some samples through a backbone, which is used as it is: the caller puts it into eval mode."""

    backbone: Backbone
    source: Source
    indices: Tensor
    """int64 ``[N]``, samples of ``source``, ascending."""
    preprocessing: Preprocessing
    batch_size: int
    device: torch.device
    data: DataOptions | None = None
    """How images are read and how many may be left out because they cannot be; None: inline, none."""

    @property
    def max_unreadable(self) -> int:
        """How many images may be left out."""
        return self.data.max_unreadable if self.data else 0

    def share(self, rank: int, world: int, place: torch.device) -> tuple[Tensor, Tensor]:
        """Features ``[n,D]`` of this rank's share, and int64 ``[n]`` on the CPU: the positions of its samples.

        Args:
            place: where the features are to be.

        Raises:
            DataError: more images are unreadable.
        """
        rows = rank_share(len(self.indices), rank, world)
        # Written where they stay: lists would double the memory.
        features, found, end = torch.empty(len(rows), self.backbone.dim, device=place), [], 0
        for batch, places in self._batches(torch.arange(rows.start, rows.stop), len(self.indices)):
            features[end : (end := end + len(batch))] = batch
            found.append(places)
        return features[:end], torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def shards(
        self, ranges: Sequence[range], numbers: Sequence[int], total: int
    ) -> Iterator[tuple[int, Tensor, list[int]]]:
        """Some shards, ascending, each as soon as it is complete.

        Args:
            ranges: positions of the samples of every shard.
            numbers: the shards to compute.
            total: samples that all ranks compute.

        Yields:
            The shard's number, its features ``[n,D]`` on the CPU, which are valid until the next one, and the
            positions of its unreadable images.

        Raises:
            DataError: more images are unreadable.
        """
        if not numbers:
            return
        filling = [_Filling(ranges[number], self.backbone.dim, self.device) for number in numbers[:1]]
        waiting = list(numbers)
        positions = torch.cat([torch.arange(ranges[n].start, ranges[n].stop) for n in numbers])
        for batch, places in self._batches(positions, total):
            while len(places):
                if int(places[0]) >= filling[0].rows.stop:
                    yield waiting.pop(0), *filling.pop().done()
                    filling = [_Filling(ranges[waiting[0]], self.backbone.dim, self.device)]
                    continue
                count = int(torch.searchsorted(places, filling[0].rows.stop))
                filling[0].add(batch[:count], places[:count])
                batch, places = batch[count:], places[count:]
        while waiting:
            yield waiting.pop(0), *filling.pop().done()
            filling = [_Filling(ranges[number], self.backbone.dim, self.device) for number in waiting[:1]]

    def _batches(self, positions: Tensor, total: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and positions, on the CPU, of the readable ones of some samples."""
        for images, samples in self.images(positions, total):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                features = self.backbone(images).pooled
            yield features, torch.searchsorted(self.indices, samples.cpu())

    def images(self, positions: Tensor, total: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the backbone is shown: images ``[b,3,S,S]`` and sample numbers of the readable ones of some.

        Args:
            positions: int64 ``[n]`` in ``indices``, ascending.
            total: samples that all ranks look at.
        """
        return iter(
            EvalLoader(
                self.source,
                self.indices[positions],
                **asdict(self.preprocessing),
                batch_size=self.batch_size,
                device=self.device,
                data=self.data,
                workers=self.data.workers if self.data else 0,
                channels_last=faster_layout(self.backbone, self.device) == torch.channels_last,
                unreadable=Unreadable(self.source, self.max_unreadable, logger.info),
                total=total,
            )
        )


class _Filling:
    """A shard that is being computed."""

    def __init__(self, rows: range, dim: int, device: torch.device) -> None:
        self.rows = rows
        self._features = torch.zeros(len(rows), dim, device=device)
        self._found = torch.zeros(len(rows), dtype=torch.bool)

    def add(self, features: Tensor, places: Tensor) -> None:
        """Rows of these positions."""
        at = places - self.rows.start
        self._features[at.to(self._features.device)] = features.float()
        self._found[at] = True

    def done(self) -> tuple[Tensor, list[int]]:
        """All rows on the CPU, and the positions of those that never came."""
        return self._features.cpu(), ((~self._found).nonzero().flatten() + self.rows.start).tolist()


def extract(
    backbone: Backbone,
    source: Source,
    indices: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    data: DataOptions | None = None,
) -> IndexedFeatures:
    """Pooled features of some samples, in fp32, each sample exactly once whatever the number of ranks.

    Every rank must call it; each computes its share and all get the whole, on the device. The backbone is used as
    it is: the caller puts it into eval mode.

    Args:
        indices: int64 ``[N]``, samples of ``source``.
        data: how images are read and how many may be left out because they cannot be; None: inline, none.

    Raises:
        DataError: more images are unreadable.
    """
    extractor = Extractor(backbone, source, indices, preprocessing, batch_size, device, data)
    rows, places = comm.patiently(lambda: extractor.share(comm.rank(), comm.world(), device))
    found = comm.gather(places)
    check_complete(len(indices) - len(found), extractor.max_unreadable)
    return IndexedFeatures(comm.gather(rows), indices[found].to(device))


def check_complete(missing: int, allowed: int) -> None:
    """Refuse features of a split with too many unreadable images, counted over all ranks.

    Raises:
        DataError: more than ``allowed`` are missing.
    """
    if missing > allowed:
        raise DataError(
            f"{missing} images of the split cannot be read, {allowed} allowed",
            hint=f"repair or remove the files named above, or skip them: data.max_unreadable={missing}",
        )


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` that leaves the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except RuntimeError as error:  # torch hides why a write failed
        number = errno.ENOSPC if write_failure(error, path) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
