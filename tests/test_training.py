"""Options of the training step in one process: precision, memory, parts of a batch, learning-rate rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from methods_kit import batch
from pydantic import ValidationError
from sslbench_plugins.backbones import conv4, resnet, resnet_small
from sslbench_plugins.methods import byol, moco, rotationnet, simclr, supervised
from torch import Tensor, nn
from training_kit import Block, Run, Stacked, make

from sslbench.config.schema import OptimOptions, TrainOptions
from sslbench.engine.precision import LossScaler
from sslbench.engine.recompute import checkpoint_activations
from sslbench.engine.schedule import peak_lr
from sslbench.errors import ConfigError
from sslbench.plugin.api import Backbone, Method, Progress

FEW: dict[str, Any] = {"hidden": 9, "out_dim": 5}


def train(cls: type[Method], views: int = 2, norm: bool = False, **options: Any) -> Run:
    method = {} if cls in (supervised.Supervised, rotationnet.RotationNet) else FEW
    return Run(make(cls, norm=norm, **method), views, train=options, optim={"name": "sgd", "lr": 0.05}).train()


def difference(a: Run, b: Run) -> float:
    pairs = zip(a.method.state_dict().values(), b.method.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize(
    ("cls", "views"), [(byol.BYOL, 2), (rotationnet.RotationNet, 1), (supervised.Supervised, 1)]
)
@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_a_batch_add_up_to_it(cls: type[Method], views: int, count: int) -> None:
    """Four parts of six images are of different sizes, too."""
    whole, parts = train(cls, views), train(cls, views, accumulate=count)
    assert difference(whole, parts) < 1e-6
    for line, expected in zip(parts.log.lines, whole.log.lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_batch_normalisation_sees_parts() -> None:
    assert (
        difference(train(supervised.Supervised, norm=True), train(supervised.Supervised, norm=True, accumulate=2))
        > 1e-4
    )


def test_contrasting_images_of_a_part_is_not_contrasting_those_of_the_batch() -> None:
    """Why methods must declare it."""
    assert difference(train(simclr.SimCLR), train(simclr.SimCLR, accumulate=2)) > 1e-4


# ---------------------------------------------------------------- computing activations again


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The sizes of all tensors that are kept for the backward pass."""
    seen: dict[int, int] = {}
    found: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    found.append(sum(seen.values()))


BACKBONES: list[tuple[type[Backbone], float]] = [
    (conv4.Conv4, 0.6), (resnet_small.ResNet8, 0.65), (resnet_small.ResNet32, 0.35), (resnet.ResNet18, 0.6),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "most"), BACKBONES)
def test_recomputation_keeps_results_and_statistics_and_less_memory(cls: type[Backbone], most: float) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found: list[tuple[dict[str, Tensor], list[Tensor], int]] = []
    for again in (False, True):
        torch.manual_seed(0)
        backbone = cls(cls.Config(), 32)
        keys = list(backbone.state_dict())
        if again:
            checkpoint_activations(backbone)
        with saved_bytes() as kept:
            loss = backbone(images).pooled.square().mean() + backbone(images.flip(3)).pooled.abs().mean()
        loss.backward()
        assert list(backbone.state_dict()) == keys
        found.append(
            (backbone.state_dict(), [p.grad for p in backbone.parameters() if p.grad is not None], kept[0])
        )
    (state, gradients, memory), (again_state, again_gradients, again_memory) = found
    assert all(torch.equal(again_state[key], value) for key, value in state.items())
    assert all(torch.equal(a, b) for a, b in zip(again_gradients, gradients, strict=True))
    assert again_memory < most * memory


class Dropping(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(Block(7, True), nn.Dropout(0.5)) for _ in range(2)))


def test_recomputation_draws_the_same_random_numbers() -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        backbone = Dropping()
        if again:
            checkpoint_activations(backbone)
        torch.manual_seed(1)
        backbone(batch().views[0].images).pooled.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


class Undivided(Stacked):
    name = "undivided"

    def segments(self) -> list[nn.Module]:
        return []


def test_a_backbone_without_segments_is_named() -> None:
    with pytest.raises(ConfigError, match="backbone 'undivided' names no segments"):
        checkpoint_activations(nn.Sequential(Undivided()))


def test_segments_are_blocks_by_default() -> None:
    assert [type(part).__name__ for part in Stacked().segments()] == ["Block", "Block"]
    network = resnet.ResNet50(resnet.ResNetOptions(), 32)
    assert [type(part).__name__ for part in network.segments()] == ["Bottleneck"] * 16


# ---------------------------------------------------------------- fp16


class Overflowing(byol.BYOL):
    """Its second step's gradient is too large for the scale."""

    name = "overflowing"

    def forward(self, batch: Any) -> dict[str, Tensor]:
        found = super().forward(batch)
        loss = found["loss"]
        if batch.step == 1:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return {"loss": loss * 1}

    def before_step(self, progress: Progress) -> None:
        self.largest = max(float(p.grad.abs().max()) for p in self.parameters() if p.grad is not None)


def fp16_run(cls: type[Method] = Overflowing, optim: Mapping[str, Any] | None = None, **train: Any) -> Run:
    """With a scale that nothing but the test's own overflow exceeds."""
    run = Run(make(cls, **FEW), train={"precision": "fp16", **train}, optim=optim or {"lr": 0.01})
    run.trained.scaler = LossScaler("cpu", init_scale=256.0)
    return run


def test_a_step_that_overflows_leaves_everything_where_it_was() -> None:
    run = fp16_run().train(stop=1)
    before = {key: value.clone() for key, value in run.method.state_dict().items()}
    steps = [float(state["step"]) for state in run.trained.optimizer.state.values()]
    assert run.trained.scaler is not None
    scale = run.trained.scaler.get_scale()
    assert run.method.largest < 100, "before_step saw scaled gradients"  # type: ignore[operator]
    run.train(start=1, stop=2)
    assert all(torch.equal(value, before[key]) for key, value in run.method.state_dict().items())
    assert [float(state["step"]) for state in run.trained.optimizer.state.values()] == steps
    assert run.trained.scaler.get_scale() == scale / 2
    run.train(start=2, stop=3)
    assert [line["train/skipped"] for line in run.log.lines] == [0, 1, 0]
    assert any(not torch.equal(value, before[key]) for key, value in run.method.state_dict().items())


def test_the_loss_scale_is_part_of_the_state() -> None:
    half = fp16_run().train(stop=2)
    state = half.trained.state()
    whole = fp16_run().train()
    rest = fp16_run().train(start=2, state=state)
    assert rest.trained.scaler is not None
    assert rest.trained.state()["scaler"] == whole.trained.state()["scaler"]
    assert difference(rest, whole) == 0


def test_gradients_are_clipped_without_the_scale() -> None:
    """With the scale of 256 they would be longer than the limit."""
    optim, limit = {"name": "sgd", "lr": 0.1, "momentum": 0, "weight_decay": 0}, 1.0
    full = Run(make(byol.BYOL, **FEW), train={"clip_grad": limit}, optim=optim).train(stop=1)
    runs = [full, fp16_run(byol.BYOL, optim, clip_grad=limit).train(stop=1)]
    start = make(byol.BYOL, **FEW).backbone.state_dict()["stem.weight"]
    moved = [run.method.backbone.state_dict()["stem.weight"] - start for run in runs]
    assert moved[0].norm() > 1e-5
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()


def test_a_queue_stays_whole_under_fp16() -> None:
    run = Run(make(moco.MoCo, queue=12, bn_groups=1, **FEW), train={"precision": "fp16"}).train()
    taken = sum(1 - line["train/skipped"] for line in run.log.lines)
    assert int(run.method.queue.pushed) == 6 * taken  # type: ignore[union-attr, arg-type]


# ---------------------------------------------------------------- options


def test_the_square_root_rule() -> None:
    assert peak_lr(OptimOptions(lr=0.075, lr_per=1, lr_rule="sqrt"), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimOptions(lr=0.3, lr_per=256), 4096) == 0.3 * 4096 / 256
    with pytest.raises(ValidationError, match="scales by lr_per, which is not set"):
        OptimOptions(lr_rule="sqrt")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compile": True, "parallel": "fsdp"}, "exclude each other: shards"),
        ({"compile": True, "checkpoint_activations": True}, "decides by itself"),
        ({"accumulate": 5, "batch_size": 4}, "accumulate must not exceed batch_size 4"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TrainOptions.model_validate(options)


def test_options_are_shown_and_refused_before_anything_is_built(cli: Any) -> None:
    shown = cli("pretrain", "--method", "byol", "--dataset", "digits", "--dry-run", "train.precision=fp16",
        "train.accumulate=2", "train.parallel=fsdp", "optim.lr_per=1", "optim.lr_rule=sqrt", "optim.lr=0.1",
        "train.batch_size=64").stdout  # fmt: skip
    assert "precision fp16, fsdp on several devices, gradient of 2 parts" in " ".join(shown.split())
    assert "0.8 (0.1 per 1 images, sqrt)" in shown
    refused = cli(
        "pretrain", "--method", "simclr", "--dataset", "digits", "--dry-run", "train.accumulate=2", check=2
    )
    assert "is not a mean over images that do not see each other" in refused.stderr
    assert "train.checkpoint_activations=true" in refused.stderr


def test_methods_declare_what_adds_up() -> None:
    from sslbench.plugin.catalog import Catalog

    catalog = Catalog()
    methods = {entry.name: catalog.load("method", entry.name) for entry in catalog.entries("method")}
    assert {name for name, cls in methods.items() if cls.accumulates} == {
        "byol",
        "dino",
        "mae",
        "rotationnet",
        "simsiam",
        "supervised",
    }
