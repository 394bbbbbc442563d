"""Frozen features of a split: one pass through the backbone, kept in a content-addressed cache."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.loader import EvalLoader
from sslbench.data.store import Unreadable
from sslbench.engine.checkpoint import load_tensors
from sslbench.engine.layout import faster_layout
from sslbench.errors import CheckpointError, DataError, write_failure
from sslbench.plugin.api import Backbone, Source

logger = logging.getLogger(__name__)

#: Bytes of a cache file from which on its place is told, so that a user can delete it.
_WORTH_A_LINE = 100_000_000

CACHE_VERSION = 2
"""Part of every cache key. Bump it when the same inputs may give other features."""


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


@torch.no_grad()
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

    Every rank must call it; each computes its share and all get the whole. The backbone is used as it is: the
    caller puts it into eval mode.

    Args:
        indices: int64 ``[N]``, samples of ``source``.
        data: how images are read and how many may be left out because they cannot be; None: inline, none.

    Raises:
        DataError: more images are unreadable.
    """
    max_unreadable = data.max_unreadable if data else 0
    loader = EvalLoader(
        source,
        indices,
        **asdict(preprocessing),
        batch_size=batch_size,
        device=device,
        data=data,
        workers=data.workers if data else 0,
        channels_last=faster_layout(backbone, device) == torch.channels_last,
        rank=comm.rank(),
        world=comm.world(),
        unreadable=Unreadable(source, max_unreadable, logger.info),
    )
    features, numbers = _pooled(backbone, loader, len(indices), device)
    found, order = comm.gather(numbers).sort()
    check_complete(len(indices) - len(found), max_unreadable)
    rows = comm.gather(features)
    return IndexedFeatures(rows if comm.world() == 1 else rows[order], found)


def _pooled(backbone: Backbone, loader: EvalLoader, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and sample numbers of this rank's share, written where they stay: lists would double the memory."""
    features = torch.empty(-(-most // comm.world()), backbone.dim, device=device)
    numbers = torch.empty(len(features), dtype=torch.int64, device=device)
    end = 0
    with torch.autocast(device.type, enabled=False):
        for images, batch_indices in loader:
            rows = slice(end, end := end + len(images))
            features[rows] = backbone(images).pooled
            numbers[rows] = batch_indices
    return features[:end], numbers[:end]


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


class FeatureCache:
    """A folder of feature files, each named by a digest of everything the features depend on.

    Deleting files or the whole folder is always safe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the features of ``key`` are or would be."""
        return self.folder / f"{json_digest({**key, 'version': CACHE_VERSION})}.pt"

    def load(self, key: Mapping[str, Any]) -> IndexedFeatures | None:
        """The features stored under ``key``; None if there are none or the file is damaged (which is logged)."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            content = load_tensors(path, mapped=True)
            if tensor_digest(content["features"]) != content["sha256"]:
                raise ValueError(f"{path} does not match its checksum")
            return IndexedFeatures(content["features"], content["indices"])
        except (CheckpointError, KeyError, TypeError, AttributeError, ValueError) as error:
            logger.warning("the feature cache is damaged: %s; computing its features again", error)
            return None

    def store(self, key: Mapping[str, Any], table: IndexedFeatures) -> None:
        """Write the features so that readers see the whole file or none. A full disk is logged, not raised."""
        path = self.path(key)
        features = table.features.cpu()
        content = {
            "features": features,
            "indices": table.indices.cpu(),
            "sha256": tensor_digest(features),
            "key": json.dumps(key, default=str),
        }
        try:
            save_atomically(content, path)
        except OSError as error:
            logger.warning("features were not cached in %s: %s", self.folder, error)
        else:
            size = path.stat().st_size
            if size >= _WORTH_A_LINE:
                logger.info("cached %.0f MB of features in %s", size / 1e6, self.folder)


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
