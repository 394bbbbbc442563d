"""The contracts of the plugin kinds: method, backbone, dataset; those of evaluations come from beside here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sslbench.config.options import Options
from sslbench.deprecation import Renamed
from sslbench.plugin.evaluation import EvalOptions, EvalProtocol, FeatureTable, Job
from sslbench.plugin.rows import FeatureRows, LabelledRows
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

__all__ = [
    "Backbone",
    "Batch",
    "Blur",
    "Build",
    "Dataset",
    "DatasetInfo",
    "EvalOptions",
    "EvalProtocol",
    "FeatureRows",
    "FeatureTable",
    "Features",
    "Jitter",
    "Job",
    "LabelledRows",
    "Method",
    "MethodConfig",
    "Options",
    "Progress",
    "Published",
    "Source",
    "TrainingImages",
    "View",
    "ViewSpec",
]


class View(NamedTuple):
    """One view of each image of a batch: pixels on the device, and on the CPU, so that nobody must wait for the
    device to decide by it, what they show."""

    images: Tensor
    """float ``[B,3,H,W]``, normalised with the data set's mean and standard deviation."""
    box: Tensor
    """float ``[B,4]``: the crop's x0, y0, x1, y1 as fractions of the un-flipped source image."""
    flip: Tensor
    """bool ``[B]``: whether the view is mirrored horizontally."""
    source_size: Tensor
    """float ``[B,2]``: width and height of the source image in pixels."""


@dataclass
class Batch:
    """This rank's share of one global batch."""

    views: tuple[View, ...]
    """In the order the method declared them, a spec with ``count: k`` giving k neighbours."""
    index: Tensor
    """int64 ``[B]``: numbers of the samples in the data set."""
    draws: Draws
    labels: Tensor | None = None
    """int64 ``[B]``; None unless the method declares ``uses_labels``."""
    _uses: int = field(default=0, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def step(self) -> int:
        """Zero-based step of the run, of which schedules within ``forward`` are pure functions."""
        return self.draws.step

    def uniform(self, *shape: int) -> Tensor:
        """float32 ``[B, *shape]`` in [0, 1): a pure function of (seed, step, sample position, call number)."""
        self._uses += 1
        return self.draws.uniform(f"method/{self._uses}", *shape, device=self.index.device)


class Features(NamedTuple):
    """What a backbone returns."""

    pooled: Tensor
    """``[B,D]``"""
    map: Tensor
    """``[B,D,h,w]``: the last feature map, before pooling."""
    stem: Tensor | None = None
    """``[B,C,h,w]``: after the first convolution, normalisation and activation, before any pooling; given by
    backbones that provide ``stem``."""
    tokens: Tensor | None = None
    """``[B,P+N,D]``: P tokens of the whole image (class token, registers; perhaps none), then those of the N
    patches, row by row; given by backbones that provide ``tokens``."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Schedules are pure functions of it."""

    step: int
    """Zero-based step."""
    steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Share of the run that lies behind the current step, in [0, 1)."""
        return self.step / self.steps

    @property
    def epoch(self) -> int:
        """Zero-based epoch."""
        return self.step // self.steps_per_epoch


class Backbone(nn.Module, ABC):
    """A feature extractor without a head.

    One that provides ``tokens`` cuts images into square patches of :attr:`stride` pixels and can look at some of
    them: ``forward(images, visible)`` takes int64 ``[B,K]``, for each image the numbers of K different patches,
    counted from 0 row by row, or None for all. The others take no part: :attr:`Features.tokens` is ``[B,P+K,D]``,
    in the order of ``visible``, and :attr:`Features.map` ``[B,D,1,K]``. Without ``visible`` the cells of the map
    are the patches, row by row.

    Args:
        cfg: its validated options.
        image_size: side in pixels of the largest view it will see; lets ``stem: auto`` choose.
    """

    name: ClassVar[str]
    renamed: ClassVar[Mapping[str, Renamed]] = {}
    """Its old names, each still an entry point in the group with ``.renamed`` behind its name."""
    Config: ClassVar[type[Options]] = Options
    selector: ClassVar[str | None] = None
    """The option that VALUE sets where a user writes ``NAME:VALUE``; None: there is no such form."""
    provides: ClassVar[frozenset[str]] = frozenset({"pooled", "map"})

    dim: int
    """Number of features D."""
    stride: int
    """Input pixels per cell of the feature map."""
    stem_dim: int
    """Channels of the stem's map; only of backbones that provide ``stem``."""
    mean_pooled: bool = False
    """True claims that ``pooled`` is the mean of ``map`` over its places. The conformance kit checks it."""
    input_sizes: Literal["any", "one"] = "any"
    """``any``: images may be smaller or larger than ``image_size``, and need not be square, as multi-crop and
    evaluations at another size want it; ``one``: only squares of ``image_size``."""
    cfg: Options
    """What it takes to build it again before weights are loaded into it; checkpoints keep this."""

    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_size = image_size

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """``[B,3,H,W]`` to :class:`Features`."""

    @classmethod
    def initial_weights(cls, cfg: Options) -> str | None:
        """A digest of the weights that a backbone of these options begins with; None: it draws them.

        Runs that begin with different weights are never averaged. The option that names a file of them should be
        cosmetic, so that the file may lie anywhere.

        Raises:
            CheckpointError: they are not to be had.
        """
        return None

    @classmethod
    def without_weights(cls, cfg: Options) -> Options:
        """Options of the same backbone that draws its weights: it is built with them where those of a checkpoint
        follow, so that nothing is read which may be gone by then."""
        return cfg

    def segments(self) -> list[nn.Module]:
        """The parts in which activations are computed again and parameters are sharded, in order.

        Each must be called as a module (``part(x)``), once in a forward pass. By default, the members of lists of
        modules (``nn.Sequential``, ``nn.ModuleList``) that have parts themselves, such as residual blocks.
        """
        return _composite_members(self)


def _composite_members(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        listed = isinstance(module, nn.Sequential | nn.ModuleList) and next(child.children(), None) is not None
        found += [child] if listed else _composite_members(child)
    return found


class TrainingImages(Protocol):
    """The images a method pretrains on, for methods that look at all of them before an epoch."""

    def clean(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of all images in order, un-augmented, in the size of the first view.

        Yields:
            Normalised images ``[b,3,S,S]`` and their int64 sample numbers ``[b]``.
        """
        ...

    def augmented(self, number: int) -> Iterator[Batch]:
        """This rank's share of all images, shuffled, each in the method's own views, in about equal batches.

        All ranks get the same number of batches. :attr:`Batch.step` is negative here.

        Args:
            number: another one gives other views and another order; pass the epoch.
        """
        ...


@dataclass(frozen=True)
class Build:
    """What a method may know when it is built."""

    make_backbone: Callable[[], Backbone]
    global_batch: int
    num_images: int
    steps: int
    steps_per_epoch: int
    num_classes: int | None = None
    """None unless the method declares ``uses_labels``."""

    def backbone(self) -> Backbone:
        """A freshly initialised backbone. Each call gives another initialisation."""
        return self.make_backbone()


class MethodConfig(Options):
    """Options every method has. Subclass it and give ``views`` a default."""

    views: tuple[ViewSpec, ...] = ()
    """The views of each image, in order."""

    @model_validator(mode="after")
    def _near_names_an_earlier_view(self) -> Self:
        number = 0
        for spec in self.views:
            if not isinstance(spec, ViewSpec):
                raise ValueError("the field views must be annotated as tuple[ViewSpec, ...]")
            if spec.near is not None and spec.near >= number:
                raise ValueError(f"view {number} must overlap an earlier view, got near: {spec.near}")
            number += spec.count
        return self


class Method(nn.Module, ABC):
    """A self-supervised method: images in, a loss out.

    A method owns its networks and its mathematics. It never sees loggers, optimisers, ranks or files, and no
    labels unless it declares ``uses_labels``.
    """

    name: ClassVar[str]
    renamed: ClassVar[Mapping[str, Renamed]] = {}
    """As :attr:`Backbone.renamed`."""
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    selector: ClassVar[str | None] = None
    """As :attr:`Backbone.selector`."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Core options this method wants, as a nested mapping (``{"optim": {"name": "lars"}}``)."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled"})
    """What it needs of a backbone: ``pooled``, ``map``, ``stem``, ``tokens``."""
    uses_labels: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    """False for a method that only provides weights, such as the random control."""
    accumulates: ClassVar[bool] = False
    """True if the loss is an unweighted mean over images that do not see each other (but in batch normalisation),
    and ``forward`` leaves nothing behind that a second call in the same step would overwrite. Then the gradient of
    a batch is the average of its parts' (``train.accumulate``)."""
    shardable: ClassVar[bool] = True
    """False for a method that itself reads or writes weights or gradients of its backbones, other than by
    :class:`sslbench.nn.ema.EMA`: with ``train.parallel=fsdp`` a rank has only its share of them. Heads are whole
    on every rank."""

    backbone: Backbone

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__()
        self.cfg = cfg

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"loss": fp32 scalar, ...}``; other scalars are logged as ``train/<key>``."""

    def param_groups(self) -> list[dict[str, Any]] | None:
        """Optimiser groups ``{"params": [(name, parameter)], "lr_scale": 1.0}``; None: one group of everything.

        ``"schedule": "constant"`` keeps a group at the peak learning rate, without warm-up and decay.
        """
        return None

    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        """Called before the first step of each epoch (zero-based); never in the middle of one.

        A run that resumes within an epoch does not call it again, so what it computes belongs into buffers.
        torch's generators hold the same state on every rank then, whatever the number of ranks.
        """

    def before_step(self, progress: Progress) -> None:
        """Called after backward and before the optimiser's step: edit gradients here."""

    def after_step(self, progress: Progress) -> None:
        """Called after the optimiser's step: EMA, queues, prototype normalisation."""

    def export(self) -> Backbone:
        """The network that evaluations use."""
        return self.backbone


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set."""

    classes: tuple[str, ...]
    size: int | None
    """Side of its square images in pixels; None if sizes vary."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    splits: tuple[str, ...]
    """``train`` and ``test``; perhaps ``val`` and ``unlabeled``."""
    pretrain_split: str = "train"
    task: Literal["classification", "multilabel", "unlabelled"] = "classification"


@dataclass(frozen=True)
class Published:
    """What is known of a data set without its files, so that a run on it can be planned."""

    images: int
    """Of the split that pretraining uses."""
    size: tuple[int, int]
    """Height and width of an image; typical ones if sizes vary."""
    classes: int = 0
    same_size: bool = False
    """Whether all images have this size."""


class Source(ABC):
    """The raw images of one split."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """uint8 ``[3,H,W]``."""

    @property
    @abstractmethod
    def targets(self) -> Tensor | None:
        """int64 ``[N]`` class numbers; None for unlabelled images. Of a multi-label data set ``[N,C]``: 1 for
        present, 0 for absent, -1 for not to be judged ("difficult")."""

    @property
    def blocks(self) -> Tensor | None:
        """int64 ``[N]``: which archive each image lies in, if reading neighbours is much cheaper than jumping.

        Training then visits the archives in random order, a few at a time, and shuffles within those few.
        None: every image costs the same.
        """
        return None

    def pixels(self) -> Tensor | None:
        """All images as uint8 ``[N,3,H,W]`` if they are in memory already, else None."""
        return None

    def image_sizes(self) -> Tensor:
        """int64 ``[N,2]`` heights and widths, without decoding where the format allows it."""
        pixels = self.pixels()
        if pixels is None:
            raise NotImplementedError(f"{type(self).__name__} must define image_sizes()")
        return torch.tensor(pixels.shape[-2:]).expand(len(self), 2)

    def common_size(self) -> tuple[int, int] | None:
        """Height and width if all readable images share them, else None."""
        pixels = self.pixels()
        if pixels is not None:
            return pixels.shape[2], pixels.shape[3]
        sizes = self.image_sizes()
        known = sizes[sizes[:, 0] > 0]
        if len(known) == 0 or bool((known != known[0]).any()):
            return None
        return int(known[0, 0]), int(known[0, 1])

    def revision(self) -> str | None:
        """A digest that changes when what the images are read from may have changed, such as dates of files.

        It must be quick and need not be the same elsewhere. None: nobody can tell without reading everything, so
        decoded images are not kept from one run to the next.
        """
        return None

    def describe(self, index: int) -> str:
        """A name for the image in messages, such as its path."""
        return f"image {index}"


class Dataset(ABC):
    """A named data set with fixed splits.

    Raises:
        DataError: from ``__init__`` or :meth:`split` when files are missing, naming the layout that is expected
            and how to get it.
    """

    name: ClassVar[str]
    renamed: ClassVar[Mapping[str, Renamed]] = {}
    """As :attr:`Backbone.renamed`."""
    Config: ClassVar[type[Options]] = Options
    selector: ClassVar[str | None] = None
    """As :attr:`Backbone.selector`."""
    published: ClassVar[Published | None] = None
    """Lets ``sslbench plan`` do without the files, if the data set has a published size."""

    def __init__(self, cfg: Options) -> None:
        self.cfg = cfg

    @property
    def key(self) -> str:
        """Its name in metric keys and tables; a data set made of user files adds which files."""
        return self.name

    @property
    @abstractmethod
    def info(self) -> DatasetInfo: ...

    @abstractmethod
    def split(self, name: str) -> Source:
        """One of ``info.splits``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest that changes when images or targets change (contents, not paths or dates)."""
