"""CIFAR-10: 60,000 32x32 photos of 10 classes."""

from __future__ import annotations

from typing import ClassVar

from sslbench.data.cifar import CifarDataset
from sslbench.plugin.api import Dataset, Published
from sslbench.plugin.hooks import hookimpl


class Cifar10(CifarDataset):
    """50,000 training and 10,000 test images, balanced."""

    name = "cifar10"
    published = Published(50_000, (32, 32), 10, same_size=True)
    folder = "cifar-10-batches-py"
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test": ("test_batch",),
    }
    meta = "batches.meta"
    targets_key = "labels"
    names_key = "label_names"
    torchvision_class = "CIFAR10"
    mean = (0.491, 0.482, 0.447)
    std = (0.247, 0.243, 0.262)


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Cifar10]
