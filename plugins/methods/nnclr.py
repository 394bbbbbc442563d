"""NNCLR: SimCLR whose positives are nearest neighbours among the embeddings of many earlier images.

Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
Representations", ICCV 2021: neighbours from a support set (equation 2), their contrastive loss (equation 3) with a
prediction head and both views in turn (section 3.2), heads (section 4.1). Negatives are the predictions of the
whole global batch. As in the paper's pseudo-code the softmax is over predictions only (a second one, over
neighbours, did not matter to the authors), and first views enter the support set, after their own step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslbench import comm
from sslbench.nn.contrast import nearest
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.queue import FeatureQueue, default_length
from sslbench.nn.two_views import SIMCLR_VIEWS, TwoViewConfig, stack_views
from sslbench.plugin.api import Batch, Build, Method, Progress, ViewSpec
from sslbench.plugin.hooks import hookimpl


class NNCLRConfig(TwoViewConfig):
    """Options of NNCLR."""

    views: tuple[ViewSpec, ...] = SIMCLR_VIEWS
    """Two views of one size."""
    hidden: int = Field(512, ge=1)
    """Width of the projector's two hidden layers (paper: 2048)."""
    out_dim: int = Field(128, ge=2)
    """Width of the embeddings (paper: 256)."""
    predictor_hidden: int = Field(512, ge=1)
    """Hidden width of the predictor (paper: 4096)."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the softmax."""
    queue: int | None = Field(None, ge=1)
    """Embeddings in the support set, a multiple of the batch size (paper: 98304); unset: a quarter of the images,
    at most 4096."""


class NNCLR(Method):
    """Contrasts each view's nearest neighbour with the predictions of the other views of the global batch."""

    name = "nnclr"
    Config = NNCLRConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: NNCLRConfig

    def __init__(self, cfg: NNCLRConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        dim, hidden = self.backbone.dim, cfg.hidden
        self.projector = mlp(dim, hidden, hidden, cfg.out_dim, final_norm="affine")
        self.predictor = mlp(cfg.out_dim, cfg.predictor_hidden, cfg.out_dim)
        length = cfg.queue or default_length(build.num_images, build.global_batch)
        self.queue = FeatureQueue(length, build.global_batch, embeddings=cfg.out_dim)
        self._newest = torch.empty(0)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.projector(self.backbone(stack_views(batch)).pooled)
        p1, p2 = self.predictor(embeddings).chunk(2)
        with no_autocast(embeddings):
            z1, z2 = F.normalize(embeddings.detach().float(), dim=1).chunk(2)
            self._newest = comm.gather(z1)
            losses = self._contrast(z1, p2) + self._contrast(z2, p1)
            return {"loss": comm.global_mean(losses) / 2}

    def _contrast(self, embeddings: Tensor, predictions: Tensor) -> Tensor:
        """``[B]``: equation 3, from unit rows of one view and the predictions of the other."""
        support = self.queue["embeddings"]
        neighbours = support[nearest(embeddings, support, 1).squeeze(1)]
        return neighbour_contrast(neighbours, predictions, self.cfg.temperature)

    def after_step(self, progress: Progress) -> None:
        self.queue.push(embeddings=self._newest)


def neighbour_contrast(neighbours: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each neighbour's own prediction among those of the global batch (equation 3).

    Args:
        neighbours: ``[B,D]`` unit rows without gradient.
        predictions: ``[B,D]``; row i belongs to neighbour i.
        temperature: divisor of the cosine similarities.

    Returns:
        fp32 ``[B]``
    """
    everyone = comm.gather(F.normalize(predictions.float(), dim=1))
    own = comm.row_offset(predictions) + torch.arange(len(predictions), device=predictions.device)
    return F.cross_entropy(neighbours @ everyone.T / temperature, own, reduction="none")


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [NNCLR]
