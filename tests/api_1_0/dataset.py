"""Striped images that are made when they are asked for; all of what API 1.0 asks of a data set."""

import hashlib

import torch
from pydantic import Field
from torch import Tensor

from sslbench.config.options import cosmetic
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options, Published, Source
from sslbench.plugin.hooks import hookimpl

API_VERSION = "1.0"


class StripesOptions(Options):
    """Options of `api10_stripes`."""

    images: int = Field(128, ge=16)
    """Training images; half as many to test."""
    note: str = cosmetic("")
    """Free text, which changes nothing."""


class Stripes(Source):
    """Class k has stripes of another direction."""

    def __init__(self, count: int, first: int) -> None:
        self._count = count
        self._first = first

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._first + index)
        noise = torch.randint(0, 64, (3, 16, 16), generator=generator)
        lines = (torch.arange(16) // 4 % 2 * 128).expand(16, 16)
        return (noise + (lines if index % 2 else lines.T)).to(torch.uint8)

    @property
    def targets(self) -> Tensor:
        return torch.arange(self._count) % 2

    def image_sizes(self) -> Tensor:
        return torch.full((self._count, 2), 16)

    def describe(self, index: int) -> str:
        return f"stripes {index}"


class StripesDataset(Dataset):
    name = "api10_stripes"
    Config = StripesOptions
    published = Published(images=128, size=(16, 16), classes=2, same_size=True)

    cfg: StripesOptions

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=("down", "across"), size=16, mean=(0.37,) * 3, std=(0.26,) * 3, splits=("train", "test")
        )

    def split(self, name: str) -> Source:
        if name == "train":
            return Stripes(self.cfg.images, 0)
        if name == "test":
            return Stripes(self.cfg.images // 2, 1_000_000)
        raise DataError(f"api10_stripes has no split '{name}'", hint="train or test")

    def fingerprint(self) -> str:
        return hashlib.sha256(f"stripes {self.cfg.images}".encode()).hexdigest()


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [StripesDataset]
