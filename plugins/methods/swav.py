"""SwAV: predict the balanced cluster assignment of one view from the other views of the image.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020: swapped
prediction (equations 1 and 2), online codes by Sinkhorn-Knopp with a queue for small batches (section 3.1),
multi-crop (section 3.2). As in the authors' program the loss is divided by the number of assigned views and of
their predictors, where equation 6 sums. The queue is one for all ranks, where theirs has a part on each.

A loss that stays at the logarithm of ``prototypes`` means collapse. Remedies, in the authors' order: lower
``epsilon``, raise ``freeze_steps``, tune rate, batch and views, ``hard: true``, ``head_norm: false``, fewer views
or weaker augmentation, a shorter or later queue, fewer ``prototypes``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.prototypes import PrototypeConfig, PrototypeMethod, swapped_prediction
from sslbench.nn.queue import FeatureQueue
from sslbench.nn.sinkhorn import SMALLEST_EPSILON, hard_codes, sinkhorn
from sslbench.plugin.api import Batch, Build, Jitter, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class SwAVConfig(PrototypeConfig):
    """Options of SwAV."""

    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2),)
    """Any number of views of any sizes, those of one size in a row. Small images collapse under the paper's
    colour strength and blur (jitter 0.8, hue 0.2, blur 0.5)."""
    prototypes: int = Field(100, ge=2)
    """Number of prototypes; about ten times the expected classes (paper: 3000 for ImageNet)."""
    epsilon: float = Field(0.03, ge=SMALLEST_EPSILON)
    """Weight of the codes' entropy; smaller is sharper and safer from collapse (paper: 0.05)."""
    sinkhorn_iterations: int = Field(3, ge=1)
    """Rounds of Sinkhorn-Knopp."""
    hard: bool = False
    """Round the codes to their largest entry."""
    queue: int = Field(0, ge=0)
    """Embeddings of earlier batches that take part in the Sinkhorn problem, for each assigned view, cut to whole
    batches; 0: none. For batches of fewer images than prototypes."""
    queue_from_epoch: int = Field(15, ge=0)
    """First epoch (from 0) whose batches enter the queue. It is used once it is full."""

    @model_validator(mode="after")
    def _another_view_predicts(self) -> Self:
        if sum(spec.count for spec in self.views) < 2:
            raise ValueError("views must give at least two views: one predicts the code of the other")
        return self


class SwAV(PrototypeMethod):
    """Swapped prediction between views, with online codes."""

    name = "swav"
    Config = SwAVConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: SwAVConfig

    def __init__(self, cfg: SwAVConfig, build: Build) -> None:
        super().__init__(cfg, build, [cfg.prototypes])
        self.queue = _make_queue(cfg, build.global_batch)
        self.first_push = cfg.queue_from_epoch * build.steps_per_epoch
        self.first_use = self.first_push + cfg.queue // build.global_batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.normalize_prototypes()
        embeddings = self.embed(batch)
        (scores,) = self.score(embeddings)
        assigned = torch.stack([embeddings[view] for view in self.cfg.assign], dim=1).detach()
        stored = self._stored(batch.step, assigned)
        codes = {view: self._codes(scores[view], stored[:, i]) for i, view in enumerate(self.cfg.assign)}
        if self.queue and batch.step >= self.first_push:
            self.queue.push(embeddings=comm.gather(assigned.flatten(1)))
        return {"loss": swapped_prediction(scores, codes, self.cfg.temperature)}

    def _stored(self, step: int, assigned: Tensor) -> Tensor:
        """This rank's share ``[L/W,A,D]`` of the queued embeddings; no row before the queue is full.

        Args:
            step: of the run.
            assigned: ``[B,A,D]`` embeddings of the assigned views.
        """
        if self.queue is None or step < self.first_use:
            return assigned[:0]
        share = self.queue["embeddings"].tensor_split(comm.world())[comm.rank()]
        return share.reshape(len(share), *assigned.shape[1:])

    @torch.no_grad()
    def _codes(self, scores: Tensor, stored: Tensor) -> Tensor:
        """``[B,K]`` of this rank's batch, balanced together with the queue as today's prototypes score it."""
        everything = torch.cat([*self.score(stored), scores])
        codes = sinkhorn(everything, self.cfg.epsilon, self.cfg.sinkhorn_iterations)[len(stored) :]
        return hard_codes(codes) if self.cfg.hard else codes


def _make_queue(cfg: SwAVConfig, global_batch: int) -> FeatureQueue | None:
    """Rows hold an image's embeddings in all assigned views, side by side."""
    if not cfg.queue:
        return None
    if cfg.queue < global_batch:
        raise ConfigError(
            f"method.queue={cfg.queue} does not hold one batch of train.batch_size={global_batch}",
            hint=f"set method.queue={global_batch} or more, or method.queue=0 for none",
        )
    length = cfg.queue // global_batch * global_batch
    return FeatureQueue(length, global_batch, init="zeros", embeddings=len(cfg.assign) * cfg.out_dim)


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [SwAV]
