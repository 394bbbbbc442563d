"""From a configuration to the objects of a run: device, data set, method, loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from sslbench import comm
from sslbench.config.compose import Composed, Selection
from sslbench.config.schema import TrainOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.packed import pack
from sslbench.data.splits import eval_split, source_of
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor, expand
from sslbench.engine.accumulate import check_accumulation, check_part_sizes
from sslbench.engine.blame import blaming
from sslbench.engine.checkpoint import details
from sslbench.engine.firstlook import check_backbone
from sslbench.engine.layout import faster_layout
from sslbench.engine.loop import Plan
from sslbench.engine.precision import Precision, choose_precision
from sslbench.engine.recompute import checkpoint_activations
from sslbench.errors import CheckpointError, ConfigError, DataError, LaunchError, PluginError
from sslbench.nn.sync_norm import share_statistics
from sslbench.plugin.api import Backbone, Build, Dataset, Method, Source, ViewSpec
from sslbench.rng import derive_seed

#: Side of a view when neither the method nor the data set (its images vary in size) says otherwise.
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Start:
    """The weights of another run that a run starts from."""

    run: str
    backbone: str
    weights: Mapping[str, torch.Tensor]
    sha256: str


@dataclass
class Parts:
    """The built objects of one pretraining run."""

    device: torch.device
    precision: Precision
    dataset: Dataset
    method: Method
    image_size: int
    loader: TrainLoader | None
    """None for a method that does not train."""
    plan: Plan | None


def choose_device(options: TrainOptions) -> torch.device:
    """The device this process trains on.

    Raises:
        LaunchError: CUDA was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise LaunchError(
            "train.device=cuda, but torch sees no CUDA device", hint="train.device=cpu, or sslbench doctor"
        )
    if options.device == "cpu" or not available:
        return torch.device("cpu")
    number, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if devices == 1:
        number = 0  # a scheduler shows each process its own device only
    if number >= devices:
        raise LaunchError(
            f"this is process {number} (from 0) of its machine, which has {devices} CUDA devices",
            hint="start one process per device",
        )
    return torch.device("cuda", number)


def choose_layout(options: TrainOptions, device: torch.device, network: nn.Module) -> torch.memory_format:
    """Memory layout of images and weights."""
    if options.channels_last is None:
        return faster_layout(network, device, half=choose_precision(options, device) != "fp32")
    return torch.channels_last if options.channels_last else torch.contiguous_format


def prepare_torch(options: TrainOptions) -> None:
    """Process-wide switches of torch; called once, by a run, never on import."""
    if options.compile:
        torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    else:  # the same without telling the compiler, whose import takes as long as torch's own
        torch.set_deterministic_debug_mode("warn" if options.deterministic else "default")
    # Filling every new tensor with NaN, which comes along, changes no result and takes a seventh of a CPU step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = options.deterministic
    torch.backends.cudnn.benchmark = not options.deterministic


def make_dataset(composed: Composed) -> Dataset:
    dataset: Dataset = composed.dataset.cls(composed.dataset.cfg)
    return dataset


def image_size(specs: tuple[ViewSpec, ...], dataset: Dataset) -> int:
    """Side of the largest view."""
    fallback = dataset.info.size or DEFAULT_SIZE
    return max((spec.size or fallback for spec in specs), default=fallback)


def check_requirements(composed: Composed) -> None:
    """Refuse a backbone that lacks what the method needs, before anything is built."""
    missing = composed.method.cls.requires - composed.backbone.cls.provides
    if missing:
        raise ConfigError(
            f"method '{composed.method.name}' needs {', '.join(sorted(missing))} features, "
            f"which backbone '{composed.backbone.name}' does not provide",
            hint="sslbench list backbones",
        )
    check_accumulation(composed)
    if composed.core.train.parallel == "fsdp" and not composed.method.cls.shardable:
        raise ConfigError(
            f"train.parallel=fsdp: method '{composed.method.name}' itself reads or writes weights of its "
            "backbone, of which each device would have a share only",
            hint="train.parallel=ddp, with train.checkpoint_activations=true for memory",
        )


def build_parts(composed: Composed, log: Callable[[str], None], start: Start | None = None) -> Parts:
    """Build everything a pretraining run needs.

    Args:
        start: weights that every backbone begins with, a teacher's too; None: random ones.

    Raises:
        SslbenchError: of the kind that fits what is wrong.
    """
    check_requirements(composed)
    core = composed.core
    check_part_sizes(composed, comm.world())
    device = choose_device(core.train)
    dataset = make_dataset(composed)
    specs = composed.method.cfg.views  # type: ignore[attr-defined]
    side = image_size(specs, dataset)
    if not composed.method.cls.trains:
        method = _build_method(composed, dataset, side, start, num_images=0, steps_per_epoch=1)
        return Parts(device, "fp32", dataset, method.to(device), side, None, None)
    loader = _make_loader(composed, dataset, specs, device, log)
    method = _build_method(composed, dataset, side, start, loader.num_images, loader.steps_per_epoch)
    layout = choose_layout(core.train, device, method)
    method = _placed(method, core.train, device, layout)
    loader.views.memory_format = layout
    if comm.world() > 1:
        method = cast(Method, share_statistics(method, core.train.sync_bn, device))
    if core.train.compile:
        compile_backbones(method)
    if core.train.checkpoint_activations:
        checkpoint_activations(method)
    plan = Plan(core, loader.steps_per_epoch)
    return Parts(device, choose_precision(core.train, device), dataset, method, side, loader, plan)


def shards_parameters(options: TrainOptions) -> bool:
    """Whether ranks are to keep shares of the backbones' parameters; without other processes there are none."""
    return options.parallel == "fsdp" and comm.is_active()


def _placed(method: Method, options: TrainOptions, device: torch.device, layout: torch.memory_format) -> Method:
    """Where and how weights lie at first: those to be sharded on the host, contiguous, which FSDP2 insists on."""
    if shards_parameters(options):
        return method
    return method.to(device=device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def _make_backbone(selection: Selection, side: int, start: Start | None) -> Backbone:
    backbone: Backbone = selection.cls(selection.cfg, side)
    if start is None:
        return backbone
    try:
        backbone.load_state_dict(start.weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"--init-from {start.run}: its backbone '{start.backbone}' does not fit '{selection.name}': "
            f"{details(error)}",
            hint=f"pass --backbone {start.backbone}",
        ) from error
    return backbone


def _backbones(composed: Composed, side: int, start: Start | None) -> Callable[[], Backbone]:
    """Makes one after another, with a look at what the first one gives."""
    looked = False

    def make() -> Backbone:
        nonlocal looked
        backbone = _make_backbone(composed.backbone, side, start)
        if not looked:
            check_backbone(backbone, side, choose_device(composed.core.train))
            looked = True
        return backbone

    return make


def initial_weights(selection: Selection, start: Start | None) -> str:
    """What identifies the weights that a run begins with; empty if it draws them."""
    return start.sha256 if start else selection.cls.initial_weights(selection.cfg) or ""


def compile_backbones(method: nn.Module, backend: str = "inductor") -> None:
    """Compile each backbone in place, which leaves state-dict keys alone."""
    for module in method.modules():
        if isinstance(module, Backbone):
            module.compile(backend=backend)


def _build_method(
    composed: Composed, dataset: Dataset, side: int, start: Start | None, num_images: int, steps_per_epoch: int
) -> Method:
    core = composed.core
    torch.manual_seed(derive_seed(core.run.seed, "initialisation"))
    build = Build(
        make_backbone=_backbones(composed, side, start),
        global_batch=core.train.batch_size,
        num_images=num_images,
        steps=core.train.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        num_classes=len(dataset.info.classes) if composed.method.cls.uses_labels else None,
    )
    with blaming((composed.method.cls, composed.backbone.cls), "while it was built"):
        method: Any = composed.method.cls(composed.method.cfg, build)
    if not isinstance(getattr(method, "backbone", None), Backbone):
        raise PluginError(
            f"method '{composed.method.name}' has no attribute 'backbone' that is a Backbone",
            hint="set self.backbone = build.backbone() in its __init__",
        )
    return method  # type: ignore[no-any-return]


def _make_loader(
    composed: Composed,
    dataset: Dataset,
    specs: tuple[ViewSpec, ...],
    device: torch.device,
    log: Callable[[str], None],
) -> TrainLoader:
    core, info = composed.core, dataset.info
    if not specs:
        raise PluginError(f"method '{composed.method.name}' declares no views")
    source, indices = _training_images(composed, dataset)
    source = pack(source, core.data, log)
    executor = ViewExecutor(
        expand(specs, info.size or DEFAULT_SIZE),
        size=info.size or DEFAULT_SIZE,
        mean=info.mean,
        std=info.std,
        device=device,
        colors=core.data.colors,
    )
    return TrainLoader(
        source,
        open_store(source, core.data, device, log),
        executor,
        seed=core.run.seed,
        global_batch=core.train.batch_size,
        rank=comm.rank(),
        world=comm.world(),
        labels=composed.method.cls.uses_labels,
        indices=indices,
        workers=core.data.workers,
        device=device,
    )


def _training_images(composed: Composed, dataset: Dataset) -> tuple[Source, torch.Tensor | None]:
    """All images of the pretraining split; a method that sees labels must not see those of ``val``."""
    if composed.method.cls.uses_labels:
        if dataset.info.task == "unlabelled":
            raise DataError(
                f"method '{composed.method.name}' learns from labels, and {dataset.key} has none",
                hint="sslbench list datasets, or another method: sslbench list methods",
            )
        if dataset.info.task == "multilabel":
            raise ConfigError(
                f"method '{composed.method.name}' learns from one label per image, and {dataset.key} has several",
                hint="another data set (sslbench list datasets) or another method (sslbench list methods)",
            )
        return eval_split(dataset, "train", composed.core.data.val_fraction)
    return source_of(dataset, dataset.info.pretrain_split), None
