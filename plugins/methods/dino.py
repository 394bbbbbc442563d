"""DINO: a student predicts, from every crop, how a slow teacher sorts the large crops of the same image.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021: cross-entropy of every
student view with every other teacher view (equations 1 to 3), EMA teacher with cosine momentum, centring (equation
4) and sharpening, head of three layers, unit bottleneck and weight-normalised prototypes (section 3.1 and appendix
C). The teacher is what evaluations use. As in the authors' program the loss is divided by the number of its terms,
the teacher's temperature rises once per epoch, and the prototypes stand still in the first epochs.

Collapse shows in `entropy`, that of the teacher's predictions: at 0 one prototype has won (a slower
``center_momentum``), at the logarithm of ``prototypes`` nothing is told apart (a lower ``teacher_temperature``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslbench import comm
from sslbench.nn.ema import EMA, cosine_momentum
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.multi_crop import encode_views
from sslbench.nn.prototypes import NormedPrototypes, swapped_prediction
from sslbench.nn.transformer import initialise
from sslbench.plugin.api import Backbone, Batch, Build, Jitter, Method, MethodConfig, Progress, View, ViewSpec
from sslbench.plugin.hooks import hookimpl

_JITTER = Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)


class DINOConfig(MethodConfig):
    """Options of DINO."""

    views: tuple[ViewSpec, ...] = (
        ViewSpec(count=2, scale=(0.25, 1.0), jitter=_JITTER, gray=0.2),
        ViewSpec(count=4, size=16, scale=(0.05, 0.25), jitter=_JITTER, gray=0.2),
    )
    """Large crops first, then any number of small ones, those of one size in a row. The default is for images of
    32 pixels; the paper has 2 of 224 and 6 to 10 of 96, blur and solarisation."""
    teacher_views: int = Field(2, ge=1)
    """So many views, from the first on, are shown to the teacher too."""
    prototypes: int = Field(1024, ge=2)
    """Outputs of the head (paper: 65536)."""
    hidden: int = Field(512, ge=1)
    """Width of the head's two hidden layers (paper: 2048)."""
    bottleneck: int = Field(128, ge=1)
    """Width of the embeddings that prototypes score (paper: 256)."""
    head_norm: bool = False
    """Batch normalisation in the head."""
    fixed_length: bool = True
    """Prototypes keep their length (paper: for all networks but ViT-S, where a learned one helps)."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temperature: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax (paper: 0.07 for long runs)."""
    teacher_temperature_from: float = Field(0.04, gt=0)
    """Where it starts."""
    teacher_warmup_epochs: int = Field(0, ge=0)
    """Epochs in which it rises."""
    momentum: float = Field(0.99, ge=0, le=1)
    """EMA momentum of the teacher at the first step; it rises to 1 along a cosine (paper: 0.996)."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """EMA momentum of the centre."""
    freeze_epochs: int = Field(1, ge=0)
    """First epochs in which the prototypes do not move; the one epoch of the default is the paper's."""

    @model_validator(mode="after")
    def _teacher_and_student_have_views(self) -> Self:
        count = sum(spec.count for spec in self.views)
        if count < 2:
            raise ValueError("views must give at least two views: the student sees another one than the teacher")
        if self.teacher_views > count:
            raise ValueError(f"teacher_views is {self.teacher_views}, but there are {count} views only")
        return self


class DINOHead(nn.Module):
    """Three layers, a unit bottleneck, and prototypes that score it (appendix C)."""

    def __init__(self, dim: int, cfg: DINOConfig) -> None:
        super().__init__()
        widths = (dim, cfg.hidden, cfg.hidden, cfg.bottleneck)
        self.mlp = mlp(*widths, norm=cfg.head_norm, activation="gelu")
        initialise(self.mlp, "trunc-normal")
        self.prototypes = NormedPrototypes(cfg.bottleneck, cfg.prototypes, fixed_length=cfg.fixed_length)

    def forward(self, pooled: Tensor) -> Tensor:
        """``[N,D]`` to fp32 scores ``[N,K]``."""
        embeddings = self.mlp(pooled)
        with no_autocast(embeddings):
            return self.prototypes(F.normalize(embeddings.float(), dim=1))  # type: ignore[no-any-return]


class DINO(Method):
    """Self-distillation without labels."""

    name = "dino"
    accumulates = True
    Config = DINOConfig
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "name": "adamw",
            "lr": 5e-4,
            "weight_decay": 0.04,
            "final_weight_decay": 0.4,
            "warmup_epochs": 1.0,
        },
        "train": {"clip_grad": 3.0, "clip_by": "tensor"},
    }
    cfg: DINOConfig
    center: Tensor

    def __init__(self, cfg: DINOConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.head = DINOHead(self.backbone.dim, cfg)
        self.teacher_backbone, self.teacher_head = EMA.copy_of(self.backbone), EMA.copy_of(self.head)
        self.register_buffer("center", torch.zeros(cfg.prototypes))
        self.steps_per_epoch = build.steps_per_epoch
        self._seen = -1, self.center

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        large = batch.views[: self.cfg.teacher_views]
        taught = _scores(self.teacher_backbone, self.teacher_head, large, len(batch))
        scores = _scores(self.backbone, self.head, batch.views, len(batch))
        targets = self._targets(taught, batch.step)
        self._note(taught, batch.step)
        loss = swapped_prediction(scores, dict(enumerate(targets)), self.cfg.temperature)
        return {"loss": loss, "entropy": torch.special.entr(targets).sum(dim=2).mean()}

    def _targets(self, scores: Tensor, step: int) -> Tensor:
        """The teacher's probabilities ``[T,B,K]``, centred and sharpened (equations 1 and 4)."""
        return ((scores - self.center) / self.teacher_temperature(step)).softmax(dim=2)

    def teacher_temperature(self, step: int) -> float:
        """It rises at the start of each epoch of the warm-up, in the last of which it has arrived."""
        start, end, epochs = (
            self.cfg.teacher_temperature_from,
            self.cfg.teacher_temperature,
            self.cfg.teacher_warmup_epochs,
        )
        epoch = step // self.steps_per_epoch
        return end if epoch >= epochs else start + (end - start) * epoch / max(epochs - 1, 1)

    def _note(self, scores: Tensor, step: int) -> None:
        """Sum what the teacher says in a step, which may come in several parts, and count its rows."""
        rows = scores.new_full((1,), scores.shape[0] * scores.shape[1])
        sums = torch.cat([scores.sum(dim=(0, 1)), rows])
        # A step that was not taken has left its sums behind.
        self._seen = step, self._seen[1] + sums if self._seen[0] == step else sums

    def before_step(self, progress: Progress) -> None:
        """Freeze by dropping gradients: neither weight decay nor momentum moves the prototypes then."""
        if progress.epoch < self.cfg.freeze_epochs:
            for parameter in self.head.prototypes.parameters():
                parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        """The centre follows the mean over all ranks (equation 4), the teacher the student."""
        total = comm.all_sum(self._seen[1])
        self._seen = -1, self.center
        self.center.lerp_(total[:-1] / total[-1], 1 - self.cfg.center_momentum)
        momentum = cosine_momentum(self.cfg.momentum, progress.fraction)
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_head.update(self.head, momentum)

    def export(self) -> Backbone:
        """The teacher's, which is the better one throughout (section 5.2)."""
        return cast(Backbone, self.teacher_backbone.module)


def _scores(backbone: nn.Module, head: nn.Module, views: Sequence[View], images: int) -> Tensor:
    """fp32 ``[V,B,K]``."""
    scores: Tensor = head(encode_views(backbone, views))
    return scores.unflatten(0, (len(views), images))


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [DINO]
