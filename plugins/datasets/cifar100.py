"""CIFAR-100: 60,000 32x32 photos of 100 classes."""

from __future__ import annotations

from sslbench.data.cifar import Cifar100Files
from sslbench.plugin.api import Dataset, Published
from sslbench.plugin.hooks import hookimpl


class Cifar100(Cifar100Files):
    """50,000 training and 10,000 test images with the 100 fine labels."""

    name = "cifar100"
    published = Published(50_000, (32, 32), 100, same_size=True)
    targets_key = "fine_labels"
    names_key = "fine_label_names"


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Cifar100]
