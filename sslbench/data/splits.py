"""Which samples an evaluation may use: fixed, class-balanced splits that do not depend on the run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslbench.data.sources import ConcatSource
from sslbench.errors import DataError, PluginError
from sslbench.plugin.api import Dataset, Source
from sslbench.rng import derive_seed, hash_uniform

EVAL_SPLITS = ("train", "val", "trainval", "test")


def carve(targets: Tensor, fraction: float, salt: str = "val") -> tuple[Tensor, Tensor]:
    """Split samples class by class, the same way in every run.

    Within each class the samples with the smallest hash of (salt, class, number within the class) are carved off.

    Args:
        targets: int64 ``[N]`` class numbers.
        fraction: share of each class to carve off, in (0, 1). A class of two or more gives and keeps at least one.
        salt: name of the split; different names give independent splits.

    Returns:
        Sorted int64 indices of the samples that stay and of those carved off.
    """
    carved = torch.zeros(len(targets), dtype=torch.bool)
    labels, counts = np.unique(targets.numpy(), return_counts=True)
    by_class = torch.split(targets.argsort(stable=True), counts.tolist())
    for label, members in zip(labels.tolist(), by_class, strict=True):
        carved[members[_chosen(len(members), fraction, derive_seed("split", salt, label))]] = True
    return (~carved).nonzero().flatten(), carved.nonzero().flatten()


def _chosen(total: int, fraction: float, key: int) -> Tensor:
    """Which of ``total`` class members are carved off."""
    count = min(max(round(total * fraction), 1), total - 1)
    order = hash_uniform(key, torch.arange(total), 1).flatten().argsort(stable=True)
    return order[:count]


def eval_split(dataset: Dataset, name: str, fraction: float) -> tuple[Source, Tensor]:
    """The images behind an evaluation's split.

    Args:
        dataset: any labelled data set.
        name: ``train`` (without ``val``), ``val``, ``trainval`` or ``test``.
        fraction: share of ``train`` that is carved off as ``val`` if the data set has no ``val`` of its own.

    Returns:
        A source and the sorted int64 indices into it.

    Raises:
        DataError: the split does not exist, has no labels, or cannot be carved.
    """
    source = _source(dataset, name)
    targets = source.targets
    if targets is None:
        raise DataError(
            f"data set '{dataset.name}' has no labels in split '{name}', so it cannot be evaluated on",
            hint="evaluate on a labelled data set (sslbench eval PROTOCOL --dataset NAME)",
        )
    if name in ("train", "val") and "val" not in dataset.info.splits:
        if targets.ndim > 1:
            raise DataError(
                f"data set '{dataset.name}' has several labels per image, so no validation images can be carved "
                "off its training images class by class: it needs a split 'val' of its own"
            )
        kept, carved = carve(targets, fraction)
        return source, kept if name == "train" else carved
    return source, torch.arange(len(source))


def _source(dataset: Dataset, name: str) -> Source:
    splits = dataset.info.splits
    if name not in EVAL_SPLITS or (name == "test" and "test" not in splits):
        raise DataError(f"data set '{dataset.name}' has no split '{name}' (it has {', '.join(splits)})")
    if "val" not in splits and name != "test":
        return source_of(dataset, "train")
    if name == "trainval":
        return ConcatSource(source_of(dataset, "train"), source_of(dataset, "val"))
    return source_of(dataset, name)


def source_of(dataset: Dataset, name: str) -> Source:
    """The images of one of a data set's own splits.

    Raises:
        DataError: from the data set, if it has no such split or lacks files.
        PluginError: what the data set returned is no source.
    """
    source: object = dataset.split(name)
    if not isinstance(source, Source):
        raise PluginError(
            f"data set '{dataset.name}': split('{name}') must return a Source, got a {type(source).__name__}",
            hint=f"sslbench check dataset {dataset.name}   tries all that is expected of a data set",
        )
    return source
