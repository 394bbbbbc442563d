"""Your own images in tar archives (WebDataset shards): KEY.jpg, perhaps with KEY.cls.

The libraries ``webdataset`` and ``wids`` are not used: the former is a stream, whose order depends on the number
of processes and which cannot resume at a sample; the latter wants an index file made beforehand.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import field_validator

from sslbench.config.options import cosmetic
from sslbench.data.filesets import NormalizedOptions
from sslbench.data.shardindex import find_shards
from sslbench.data.shards import ShardSource
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo
from sslbench.plugin.hooks import hookimpl


class ShardsOptions(NormalizedOptions):
    """Options of `shards`."""

    shards: tuple[str, ...] = cosmetic(..., min_length=1)
    """The training archives, uncompressed: a path with braces (`/data/train-{000000..000146}.tar`), with
    wildcards, or a list of such."""
    val: tuple[str, ...] = cosmetic(())
    """Archives of validation images; unset: evaluations carve `val` off the training images."""
    test: tuple[str, ...] = cosmetic(())
    """Archives of test images."""
    label: str | None = cosmetic(None)
    """Its name in tables and metric keys; unset: `shards-` and the name of the first archive's folder."""

    @field_validator("shards", "val", "test", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Shards(Dataset):
    """Images in archives, for sets of many files or on slow disks.

    A member KEY.jpg (jpeg, png, webp) is an image and KEY.cls its class number. Other members are ignored. Each
    archive is indexed once, in a hidden file beside it or in the user's cache folder. Training visits the archives
    in random order, several at a time, and shuffles within these.
    """

    name = "shards"
    Config = ShardsOptions
    cfg: ShardsOptions

    def __init__(self, cfg: ShardsOptions) -> None:
        super().__init__(cfg)
        named = {"train": cfg.shards, "val": cfg.val, "test": cfg.test}
        self._files = {split: find_shards(patterns) for split, patterns in named.items() if patterns}

    @property
    def key(self) -> str:
        folder: Path = self._files["train"][0].resolve().parent
        return self.cfg.label or f"{self.name}-{folder.name}"

    @cached_property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self._classes,
            size=self.split("train").common_side(),
            mean=self.cfg.mean,
            std=self.cfg.std,
            splits=tuple(self._files),
            task="classification" if self._classes else "unlabelled",
        )

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        targets = self._sources["train"].targets
        return () if targets is None else tuple(str(number) for number in range(int(targets.max()) + 1))

    def split(self, name: str) -> ShardSource:
        if name not in self._files:
            raise DataError(f"data set 'shards' has no split '{name}' (it has {', '.join(self._files)})")
        source = self._sources[name]
        if source.targets is not None and int(source.targets.max()) >= len(self._classes):
            raise DataError(f"class {int(source.targets.max())} of split '{name}' has no training images")
        return source

    @cached_property
    def _sources(self) -> dict[str, ShardSource]:
        return {split: ShardSource(files) for split, files in self._files.items()}

    def fingerprint(self) -> str:
        """Covers names, sizes, labels and archives of all images, and the first 64 KiB of 4,000 of each split."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = "".join(f"{split} {source.digest()}\n" for split, source in self._sources.items())
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Shards]
