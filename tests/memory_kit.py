"""The target of a child process: extraction, kNN and linear within a limit of memory, on generated images."""

from __future__ import annotations

import json
import re
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from evals_kit import make_job
from sslbench_plugins.evals.knn import Knn, KnnConfig
from sslbench_plugins.evals.linear import Linear, LinearConfig
from torch import Tensor, nn

from sslbench.config.options import Options
from sslbench.config.schema import DataOptions
from sslbench.data.sources import ArraySource
from sslbench.evaluation import classifiers, shards
from sslbench.evaluation.job import EvaluationJob, run_protocol
from sslbench.plugin import rows
from sslbench.plugin.api import Backbone, Dataset, DatasetInfo, Features

IMAGES, DIM, ALLOWED = 120_000, 1024, 112 << 20


class Wide(Backbone):
    """A linear map of 4x4 pixels to many features."""

    name = "wide"

    def __init__(self) -> None:
        super().__init__(Options(), image_size=4)
        self.dim, self.stride, self.provides = DIM, 4, frozenset[str]()
        self.map = nn.Linear(48, DIM)

    def forward(self, images: Tensor) -> Features:
        pooled = self.map(images.flatten(1))
        return Features(pooled, pooled[:, :, None, None])


@cache
def images() -> ArraySource:
    """The pixels are held by every process, before the limit."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(IMAGES) % 4
    noise = torch.randint(0, 160, (IMAGES, 3, 4, 4), generator=generator)
    return ArraySource((noise + 20 * targets[:, None, None, None]).to(torch.uint8), targets)


class Colours(Dataset):
    """Images of noise that is a little brighter in one of four classes than in the next."""

    name = "colours"
    Config = Options

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(tuple("abcd"), 4, (0.5,) * 3, (0.3,) * 3, ("train", "test"))

    def split(self, name: str) -> ArraySource:
        return images()

    def fingerprint(self) -> str:
        return "colours"


def status(name: str) -> int:
    """Bytes of private memory that a line of the kernel's report on this process gives."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def jobs(folder: Path, place: Any) -> list[tuple[Any, EvaluationJob]]:
    linear = LinearConfig(epochs=1, lrs=(0.1, 0.3), refit=False)
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "image_size": 4,
        "data": DataOptions(features=place, val_fraction=0.003),
        "backbone": Wide(),
        "dataset": Colours(Options()),
        "cache_dir": folder / "cache",
    }
    return [(p, make_job(p, folder, **options)) for p in (Knn(KnnConfig(ks=())), Linear(linear))]


def main(folder: Path, place: str) -> None:
    torch.set_num_threads(1)
    # Chunks are scaled down with the table, which would otherwise take minutes.
    rows.HELD = rows.STREAMED = 1 << 20
    classifiers.QUERIES = 256
    shards.SHARD_ROWS = 2048
    found = jobs(folder, place)
    images()
    (torch.rand(512, DIM) @ torch.rand(DIM, 512)).sort()  # what libraries allocate once
    limit = status("VmData") + ALLOWED
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    metrics = [run_protocol(protocol, job) for protocol, job in found]
    print(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
