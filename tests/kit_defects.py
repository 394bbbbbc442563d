"""A right method, and others that each break one rule of the contract of methods."""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, field_validator
from torch import Tensor, nn

from sslbench import comm
from sslbench.nn.ema import EMA
from sslbench.nn.heads import mlp
from sslbench.nn.losses import nt_xent
from sslbench.nn.two_views import TwoViewConfig, stack_views
from sslbench.plugin.api import (
    Backbone,
    Batch,
    Build,
    Method,
    MethodConfig,
    Options,
    Progress,
    TrainingImages,
    ViewSpec,
)


class Config(TwoViewConfig):
    """Options."""

    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.3, 1.0)),)
    """Two."""
    temperature: float = 0.5
    """Of the softmax."""


class Right(Method):
    """Contrasts two views."""

    name = "right"
    Config = Config
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 3e-3}}

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.head = mlp(self.backbone.dim, 16, 8)

    def forward(self, batch: Batch) -> dict[str, Any]:
        first, second = self.embed(batch).chunk(2)
        return {"loss": nt_xent(first, second, 0.5)}

    def embed(self, batch: Batch) -> Tensor:
        return self.head(self.backbone(stack_views(batch)).pooled)


class WithTarget(Right):
    """Predicts a target network, which must not train."""

    name = "with_target"

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.target = self.make_target(build)

    def make_target(self, build: Build) -> nn.Module:
        return EMA(build.backbone())

    def forward(self, batch: Batch) -> dict[str, Any]:
        targets = F.normalize(self.target(stack_views(batch)).pooled, dim=1)
        predicted = F.normalize(self.backbone(stack_views(batch)).pooled, dim=1)
        loss = super().forward(batch)["loss"]
        return {"loss": loss - comm.global_mean((predicted * targets).sum(1)) / 10}

    def after_step(self, progress: Progress) -> None:
        self.target.update(self.backbone, 0.9)


class NoBackbone(Right):
    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.encoder = self.backbone
        del self.backbone


class UndocumentedConfig(Config):
    strength: float = 1.0


class UndocumentedOption(Right):
    Config = UndocumentedConfig


class LaxConfig(Config):
    model_config = ConfigDict(extra="ignore")


class IgnoresMisspeltOptions(Right):
    Config = LaxConfig


class PercentConfig(Config):
    strength: float = 50.0
    """In per cent."""

    @field_validator("strength")
    @classmethod
    def _as_share(cls, value: float) -> float:
        return value / 100


class OptionChangesWhenRead(Right):
    Config = PercentConfig


class MisspeltDefaults(Right):
    defaults: ClassVar[dict[str, Any]] = {"optimizer": {"lr": 1e-3}}


class HalfLoss(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"loss": super().forward(batch)["loss"].half()}


class LossPerImage(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        first, second = self.embed(batch).chunk(2)
        return {"loss": (first - second).square().sum(1)}


class ReportsNumbers(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        return super().forward(batch) | {"temperature": 0.5}


class LossWithoutGradient(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"loss": super().forward(batch)["loss"].detach()}


class InfiniteLoss(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        first, second = self.embed(batch).chunk(2)
        return {"loss": -(first - first).abs().sum().log() + nt_xent(first, second, 0.5)}


class InfiniteGradient(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        z = self.embed(batch)
        first, second = z.chunk(2)
        return {"loss": nt_xent(first, second, 0.5) + (first - first).square().sum().sqrt()}


class OpenConfig(MethodConfig):
    """Any views."""

    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.3, 1.0)),)
    """Any, it says."""


class UnpacksTwoViews(Right):
    Config = OpenConfig

    def embed(self, batch: Batch) -> Tensor:
        first, second = batch.views
        return self.head(self.backbone(torch.cat([first.images, second.images])).pooled)


class UnusedParameter(Right):
    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.predictor = nn.Linear(8, 8)


class WithoutEffect(UnusedParameter):
    def forward(self, batch: Batch) -> dict[str, Any]:
        output = super().forward(batch)
        return {"loss": output["loss"] + 0 * self.predictor(torch.ones(1, 8)).sum()}


class Teacher(nn.Module):
    """Follows, but is not frozen."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        return self.module(images)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        for mine, theirs in zip(self.module.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)


class TrainableTeacher(WithTarget):
    def make_target(self, build: Build) -> nn.Module:
        return Teacher(copy.deepcopy(self.backbone))


class FrozenInGroups(WithTarget):
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.named_parameters())}]


class ReadsLabels(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        loss = super().forward(batch)["loss"]
        return {"loss": loss if batch.labels is None else F.cross_entropy(self.embed(batch), batch.labels)}


class NeedsLabels(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"loss": F.cross_entropy(self.embed(batch)[: len(batch)], batch.labels)}


class AsksTheDataSet(Right):
    """Reaches around the batch."""

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.register_buffer("weights", torch.ones(build.num_images))

    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        self.weights.copy_(0.9 + 0.1 * images._loader.source.targets.float() / 5)

    def forward(self, batch: Batch) -> dict[str, Any]:
        weight = comm.global_mean(self.weights[batch.index])
        return {"loss": weight * super().forward(batch)["loss"]}


class AsksInSecret(AsksTheDataSet):
    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        self.weights.copy_(0.9 + 0.1 * vars(images._loader.source)["_targets"].float() / 5)


class OwnDice(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"loss": super().forward(batch)["loss"] * (1 + random.random() / 10)}


class TorchsDice(Right):
    def embed(self, batch: Batch) -> Tensor:
        z = super().embed(batch)
        return z + 0.1 * torch.rand_like(z)


class SeedsForAll(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        np.random.seed(batch.step)
        return super().forward(batch)


class SetsForAll(Right):
    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        torch.set_float32_matmul_precision("medium")


class CentreInAnAttribute(Right):
    """A centre that no checkpoint holds."""

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.centre = torch.zeros(8)

    def embed(self, batch: Batch) -> Tensor:
        z = super().embed(batch)
        self.centre = 0.9 * self.centre + 0.1 * comm.gather(z).mean(0).detach()
        return z - self.centre


class LateBuffer(Right):
    def after_step(self, progress: Progress) -> None:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(()))
        self.seen += 1


class Unlearns(Right):
    """The right value with the gradient turned."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        loss = super().forward(batch)["loss"]
        return {"loss": 2 * loss.detach() - loss}


class AccumulatesNegatives(Right):
    accumulates = True


class HalfUnderAutocast(Right):
    """A matrix product, which autocast computes in half precision, and nothing that brings it back."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        first, second = self.embed(batch).chunk(2)
        logits = first @ comm.gather(second).T / 4
        rows = torch.arange(len(batch)) + comm.row_offset(first)
        return {"loss": comm.global_mean(logits.logsumexp(1) - logits[torch.arange(len(batch)), rows])}


class Suspicious(Backbone):
    """Computes something else when it is compiled."""

    name = "suspicious"

    def __init__(self, inner: Backbone) -> None:
        super().__init__(Options(), 32)
        self.inner, self.dim = inner, inner.dim

    def forward(self, images: Tensor) -> Any:
        return self.inner(-images if torch.compiler.is_compiling() else images)


class OtherwiseCompiled(Right):
    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = Suspicious(self.backbone)


class MeanOfOwnRows(Right):
    """Each rank contrasts its own rows only."""

    def forward(self, batch: Batch) -> dict[str, Any]:
        first, second = (F.normalize(part, dim=1) for part in self.embed(batch).chunk(2))
        return {"loss": F.cross_entropy(first @ second.T, torch.arange(len(batch)))}


#: For each the rule it breaks, words of what is found, and words of how to mend it.
DEFECTS: dict[type[Method], tuple[str, str, str]] = {
    NoBackbone: ("can be built", "no attribute 'backbone'", "self.backbone = build.backbone()"),
    UndocumentedOption: (
        "options are documented and survive a round trip",
        "UndocumentedConfig.strength",
        "write a string under each field",
    ),
    IgnoresMisspeltOptions: (
        "options are documented and survive a round trip",
        "LaxConfig accepts options that it does not have",
        "misspelt",
    ),
    OptionChangesWhenRead: (
        "options are documented and survive a round trip",
        "strength: 0.5 is read from a file as 0.005",
        "validators that accept their own results",
    ),
    MisspeltDefaults: ("can be built", "defaults have optimizer", "train, optim, data"),
    HalfLoss: ("the loss is a float32 scalar", "float16", "no_autocast"),
    LossPerImage: ("the loss is a float32 scalar", "shape [32]", "comm.global_mean"),
    ReportsNumbers: ("the loss is a float32 scalar", "'temperature'", "scalar tensors"),
    LossWithoutGradient: ("the loss is a float32 scalar", "no gradient", ".detach()"),
    InfiniteLoss: ("loss and gradients are finite", "the loss is inf", "logarithms"),
    InfiniteGradient: ("loss and gradients are finite", "gradients that are not finite", "root"),
    UnpacksTwoViews: ("every layout of views that it accepts works", "a view more: ValueError", "refuse others"),
    UnusedParameter: ("every trained parameter gets a gradient", "predictor.weight, predictor.bias", "freeze"),
    WithoutEffect: ("every trained parameter gets a gradient", "0 in all of 4 steps: predictor", "freeze"),
    TrainableTeacher: ("target networks are frozen", "target.module.stem.0.weight follows backbone.stem", "EMA"),
    FrozenInGroups: ("target networks are frozen", "param_groups() names frozen", "requires_grad"),
    ReadsLabels: ("sees no labels", "reads batch.labels in", "uses_labels = True"),
    NeedsLabels: ("sees no labels", "reads batch.labels in", "uses_labels = True"),
    AsksTheDataSet: ("sees no labels", "labels of the data set in", "uses_labels = True"),
    AsksInSecret: ("sees no labels", "with other labels", "uses_labels = True"),
    OwnDice: ("same seed, same training", "another loss", "batch.uniform"),
    TorchsDice: ("random numbers come from the batch", "torch's generator", "batch.uniform"),
    SeedsForAll: ("leaves global state alone", "numpy.random.seed", "batch.uniform"),
    SetsForAll: ("leaves global state alone", "torch.set_float32_matmul_precision", "settings"),
    CentreInAnAttribute: ("resumes to the bit", "after resuming at step 6 the loss", "register_buffer"),
    LateBuffer: ("resumes to the bit", "refuses the saved state", "in __init__"),
    Unlearns: ("the loss falls", "after 40 steps", "detach"),
    AccumulatesNegatives: ("accumulates as it says", "two half batches", "accumulates at False"),
    HalfUnderAutocast: ("right under bf16 autocast", "bfloat16", "no_autocast"),
    OtherwiseCompiled: ("right when compiled", "with compiled backbones", "hooks"),
    MeanOfOwnRows: ("several ranks train as one", "", "comm.g"),
}
