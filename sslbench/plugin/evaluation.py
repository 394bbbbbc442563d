"""The contracts of evaluation protocols; plugins import them from :mod:`sslbench.plugin.api`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from sslbench.config.options import Options, cosmetic
from sslbench.deprecation import Renamed

if TYPE_CHECKING:
    from sslbench.plugin.api import Backbone, Batch
    from sslbench.plugin.rows import LabelledRows
    from sslbench.plugin.viewspec import ViewSpec


class FeatureTable(NamedTuple):
    """Frozen features of a split, in data set order."""

    features: Tensor
    """float32 ``[N,D]`` on the job's device."""
    labels: Tensor
    """int64 ``[N]``; of a multi-label data set ``[N,C]``"""
    indices: Tensor
    """int64 ``[N]``: numbers of the samples in their data set split."""


class Job(Protocol):
    """What an evaluation protocol may do. Splits: ``train`` (without ``val``), ``val``, ``trainval``, ``test``."""

    seed: int
    device: torch.device
    classes: tuple[str, ...]
    run_dir: Path
    """Run directory of the pretrained model."""
    out_dir: Path
    """This evaluation's own directory."""
    dataset_key: str
    """Name of the data set in metric keys."""

    def backbone(self) -> Backbone:
        """The frozen backbone in eval mode. Evaluations must leave it unchanged; this is checked."""
        ...

    def features(self, split: str) -> FeatureTable:
        """Pooled features of the whole split without augmentation on the device, from the cache if possible."""
        ...

    def rows(self, split: str) -> LabelledRows:
        """The same features wherever they are, to be streamed: for tables larger than the device's memory."""
        ...

    def images(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's share of a split without augmentation, for protocols that look at more than pooled
        features: normalised images ``[b,3,S,S]``, labels ``[b]`` and sample numbers ``[b]``.

        Shares are in order and each image is in one of them, so ``comm.gather`` of all rows is the whole split.
        Every process must go through all of its share.
        """
        ...

    def batches(
        self, split: str, views: Sequence[ViewSpec], batch_size: int, epoch: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """One shuffled epoch of augmented batches with their labels, for protocols that cannot cache."""
        ...

    def generator(self, stream: str) -> torch.Generator:
        """A CPU generator seeded by (run seed, protocol, stream)."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a point of this evaluation's curves."""
        ...

    def save(self, name: str, tensors: Mapping[str, Any]) -> Path:
        """Write a file of tensors and plain values into ``out_dir``."""
        ...

    def load_from(self, protocol: str, name: str) -> dict[str, Any]:
        """Load a file that another protocol saved for the same model and data set."""
        ...

    def write_report(self, name: str, content: Any) -> Path:
        """Write a JSON report into ``out_dir``."""
        ...

    def child(
        self, protocol: str, dataset: str, dataset_options: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, float]:
        """Run another protocol on the same model as an evaluation of its own and return its metrics."""
        ...


class EvalOptions(Options):
    """Options of every protocol that looks at images through the backbone."""

    size: int | None = Field(None, ge=4)
    """Side of the images in pixels; unset: the side the model was pretrained with."""
    center: float | None = Field(None, gt=0, le=1)
    """Side of the centred square that is kept, as a fraction of the short side; unset: 1 for data sets of one
    fixed size, 0.875 ("resize 256, crop 224") where sizes vary."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How images are resized, antialiased as PIL does it. Programs built on torchvision resize bilinearly."""
    batch_size: int = cosmetic(512, ge=1)
    """Images per forward pass of the frozen backbone."""


class EvalProtocol(ABC):
    """An evaluation protocol. Bump ``version`` whenever its numbers may change."""

    name: ClassVar[str]
    renamed: ClassVar[Mapping[str, Renamed]] = {}
    """As :attr:`~sslbench.plugin.api.Backbone.renamed`."""
    version: ClassVar[int]
    Config: ClassVar[type[Options]] = Options
    metrics: ClassVar[Mapping[str, Literal["max", "min"]]]
    """What it returns and which direction is better."""
    primary: ClassVar[str]
    """The headline metric, a key of ``metrics``."""
    splits: ClassVar[frozenset[str]]
    """The splits it may open. Only protocols named ``test`` or ``test_...`` may open ``test``, and these open
    nothing else but ``trainval``."""
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    """Kinds of labelled data sets (:attr:`DatasetInfo.task`) it can evaluate on."""
    after: ClassVar[tuple[str, ...]] = ()
    """Protocols whose files it loads with :meth:`Job.load_from`. The conformance kit runs them before it."""

    def __init__(self, cfg: Options) -> None:
        self.cfg = cfg

    def subject(self, dataset_key: str) -> str:
        """What the result is about, in metric keys and folders: the data set, unless the options name others."""
        return dataset_key

    def chance(self, classes: int) -> float | None:
        """What ``primary`` is, in percent, where features say nothing and all classes are equally frequent.

        None: it cannot be told, or is no percentage. The conformance kit asks.
        """
        return 100 / classes

    @abstractmethod
    def run(self, job: Job) -> dict[str, float]:
        """Evaluate and return the values of ``metrics``. Percentages are in [0, 100]."""
