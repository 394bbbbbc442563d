"""A teacher-student method that uses all of what API 1.0 offers to a method."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sslbench import comm
from sslbench.nn.ema import EMA, cosine_momentum
from sslbench.nn.heads import mlp
from sslbench.nn.losses import byol_distance, no_autocast
from sslbench.nn.two_views import TwoViewConfig
from sslbench.plugin.api import (
    Backbone,
    Batch,
    Blur,
    Build,
    Features,
    Jitter,
    Method,
    Options,
    Progress,
    TrainingImages,
    View,
    ViewSpec,
)
from sslbench.plugin.hooks import hookimpl

API_VERSION = "1.0"


class HeadOptions(Options):
    """Options of the heads."""

    hidden: int = Field(32, ge=1)
    """Hidden width."""
    dim: int = Field(16, ge=1)
    """Width of the embeddings."""


class FollowConfig(TwoViewConfig):
    """Options of `api10_follow`."""

    views: tuple[ViewSpec, ...] = (
        ViewSpec(scale=(0.3, 1.0), jitter=Jitter(p=0.5), gray=0.1, blur=Blur(p=0.2)),
        ViewSpec(scale=(0.3, 1.0), solarize=0.1),
    )
    head: HeadOptions = HeadOptions()
    """Projector and predictor."""
    momentum: float = Field(0.9, ge=0, le=1)
    """Momentum of the teacher at the first step."""
    spread: float = Field(0.1, ge=0)
    """Weight of the spread of the embeddings."""


class Follow(Method):
    name = "api10_follow"
    Config = FollowConfig
    defaults: Mapping[str, Any] = {"optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 1e-4}}
    requires = frozenset({"pooled", "map"})
    uses_labels = False

    cfg: FollowConfig

    def __init__(self, cfg: FollowConfig, build: Build) -> None:
        super().__init__(cfg, build)
        assert min(build.global_batch, build.num_images, build.steps, build.steps_per_epoch) > 0
        assert build.num_classes is None
        self.backbone = build.backbone()
        self.projector = mlp(self.backbone.dim, cfg.head.hidden, cfg.head.dim)
        self.predictor = mlp(cfg.head.dim, cfg.head.hidden, cfg.head.dim, final_bias=False)
        self.teacher = EMA.copy_of(nn.ModuleList([self.backbone, self.projector]))
        self.register_buffer("epochs_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = [self._loss(*pair, batch) for pair in (batch.views, batch.views[::-1])]
        return {"loss": (losses[0][0] + losses[1][0]) / 2, "distance": losses[0][1]}

    def _loss(self, student: View, teacher: View, batch: Batch) -> tuple[Tensor, Tensor]:
        assert len(student.box) == len(teacher.flip) == len(batch.index) == len(batch)
        features: Features = self.backbone(student.images)
        z = self.projector(features.pooled)
        noise = batch.uniform(z.shape[1]).to(z) - 0.5
        prediction = self.predictor(z + 0.01 * noise)
        with torch.no_grad():
            backbone, projector = self.teacher.module
            target = projector(backbone(teacher.images).pooled)
        with no_autocast(z):
            distance = comm.global_mean(byol_distance(prediction, target))
            everyone = comm.gather(z.float())
            loss = distance - self.cfg.spread * torch.tanh(everyone.std(0).mean())
        return loss, distance.detach()

    def param_groups(self) -> list[dict[str, Any]]:
        head = [(name, p) for name, p in self.named_parameters() if name.startswith("predictor")]
        names = {name for name, _ in head}
        rest = [(name, p) for name, p in self.named_parameters() if p.requires_grad and name not in names]
        return [{"params": rest}, {"params": head, "lr_scale": 2.0}]

    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        self.epochs_seen.fill_(epoch + 1)

    def before_step(self, progress: Progress) -> None:
        assert 0 <= progress.fraction < 1

    def after_step(self, progress: Progress) -> None:
        online = nn.ModuleList([self.backbone, self.projector])
        self.teacher.update(online, cosine_momentum(self.cfg.momentum, progress.fraction))

    def export(self) -> Backbone:
        return self.backbone


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [Follow]
