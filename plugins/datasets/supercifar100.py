"""CIFAR-100's images with its 20 superclasses (coarse labels)."""

from __future__ import annotations

from sslbench.data.cifar import Cifar100Files
from sslbench.plugin.api import Dataset, Published
from sslbench.plugin.hooks import hookimpl


class SuperCifar100(Cifar100Files):
    """50,000 training and 10,000 test images with the coarse labels the files carry, five fine classes each."""

    name = "supercifar100"
    published = Published(50_000, (32, 32), 20, same_size=True)
    targets_key = "coarse_labels"
    names_key = "coarse_label_names"


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [SuperCifar100]
