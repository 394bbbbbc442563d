"""plugin-template: labelled images in folders, ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg.

Replace the layout by that of your data set. The first line above is what `sslbench list datasets` shows.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from sslbench.config.options import cosmetic
from sslbench.data.encoded import FileSource
from sslbench.data.filesets import files_digest
from sslbench.data.paths import PathTable, find_images
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options
from sslbench.plugin.hooks import hookimpl

API_VERSION = "1.0"

SPLITS = ("train", "test")
LAYOUT = """expected layout, with jpg, png or webp files:
  ROOT/train/CLASS/*.jpg
  ROOT/test/CLASS/*.jpg"""


class PluginTemplateOptions(Options):
    """Options of `plugin-template`; the text below each is shown by `sslbench info`."""

    root: Path = cosmetic(...)
    """The folder with `train` and `test`. Where it lies changes no result, so it is not part of a run's hash."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the training images, per channel, in [0, 1]; the default is ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of the training images, per channel, in units of [0, 1]."""


class PluginTemplate(Dataset):
    """Classes are the sorted names of the folders below ``train``.

    It has no ``val``, so evaluations choose on a tenth of ``train``.
    """

    name = "plugin-template"
    Config = PluginTemplateOptions
    cfg: PluginTemplateOptions

    def __init__(self, cfg: PluginTemplateOptions) -> None:
        super().__init__(cfg)
        self.root = cfg.root.expanduser()
        self._files = {split: self._listed(split) for split in SPLITS}
        self._sources: dict[str, FileSource] = {}

    def _listed(self, split: str) -> PathTable:
        files = find_images(self.root / split)
        if not files or "" in files.tops():
            found = "images outside class folders" if files else "no images"
            raise DataError(
                f"data set '{self.name}' found {found} under {self.root / split}; {LAYOUT}",
                hint="dataset.root=PATH",
            )
        return files

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._files["train"].tops())))

    @cached_property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self._classes,
            size=self.split("train").common_side(),
            mean=self.cfg.mean,
            std=self.cfg.std,
            splits=SPLITS,
        )

    def split(self, name: str) -> FileSource:
        """Kept once opened: a source remembers the headers that it has read."""
        if name not in self._files:
            raise DataError(f"data set '{self.name}' has no split '{name}' (it has {', '.join(SPLITS)})")
        if name not in self._sources:
            files = self._files[name]
            self._sources[name] = FileSource(files, torch.from_numpy(files.numbered(self._classes)))
        return self._sources[name]

    def fingerprint(self) -> str:
        """Of names and contents, whatever the root and the dates."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return files_digest(self._files)


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [PluginTemplate]
