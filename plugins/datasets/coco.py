"""COCO: everyday scenes of many objects, without labels; 118,287 photos in train2017."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from sslbench.data.encoded import FileSource
from sslbench.data.filesets import FileDataset, NormalizedOptions, RootOptions, find_base
from sslbench.data.paths import find_images
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Published
from sslbench.plugin.hooks import hookimpl

IMAGES = "train2017"
LAYOUT = """  ROOT/{images}/*.jpg, or
  ROOT/images/{images}/*.jpg
from http://images.cocodataset.org/zips/{images}.zip"""


class CocoOptions(NormalizedOptions, RootOptions):
    """Options of `coco`."""

    images: str = Field(IMAGES, pattern=r"^[\w.-]+$")
    """Folder of images below the root: `train2017` (118,287), `unlabeled2017` (123,403) or `val2017` (5,000)."""


class Coco(FileDataset):
    """Images to pretrain on; evaluate on a labelled data set.

    Layout: `root/train2017/*.jpg` (or the folder that `images` names, also below `root/images/`). The annotations
    are not used.

    Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.
    """

    name = "coco"
    published = Published(118_287, (480, 640))
    Config = CocoOptions
    cfg: CocoOptions

    def __init__(self, cfg: CocoOptions) -> None:
        super().__init__(cfg)
        layout = LAYOUT.format(images=cfg.images)
        self.base = find_base(self.name, cfg.root, ("", "images"), (cfg.images,), layout) / cfg.images

    @property
    def key(self) -> str:
        return self.name if self.cfg.images == IMAGES else f"{self.name}-{self.cfg.images}"

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=(),
            size=None,
            mean=self.cfg.mean,
            std=self.cfg.std,
            splits=("train",),
            task="unlabelled",
        )

    @cached_property
    def sources(self) -> dict[str, FileSource]:
        paths = find_images(self.base)
        if not len(paths):
            raise DataError(f"{self.base} holds no images")
        return {"train": FileSource(paths, None)}


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Coco]
