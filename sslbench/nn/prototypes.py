"""What SwAV, DeepCluster-v2, SeLa-v2 and DINO share: views scored by unit prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslbench import comm
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.multi_crop import encode_views
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, Progress


class Prototypes(nn.Linear):
    """Cosine scores of unit embeddings ``[N,D]`` and ``K`` prototypes, the rows of ``weight`` ``[K,D]``.

    Rows have unit length after each :meth:`normalize`, not by themselves: the optimiser moves them.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(dim, count, bias=False)
        self.normalize()

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale each prototype to unit length, in place and outside the graph."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """fp32 scores ``[N,K]`` whatever the autocast."""
        with no_autocast(embeddings):
            return super().forward(embeddings.float())


class NormedPrototypes(nn.Module):
    """Scores by prototypes ``scale_k * direction_k`` (weight normalisation: Salimans & Kingma, 2016), which the
    optimiser can move freely: only the direction of a row counts.

    Args:
        fixed_length: keep all lengths at 1; else they are learned.
    """

    def __init__(self, dim: int, count: int, *, fixed_length: bool = True) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.scale = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed_length)

    def forward(self, embeddings: Tensor) -> Tensor:
        """``[N,D]`` to fp32 scores ``[N,K]`` whatever the autocast."""
        with no_autocast(embeddings):
            return F.linear(embeddings.float(), self.scale * F.normalize(self.direction, dim=1))


class PrototypeConfig(MethodConfig):
    """Options of methods that score views by prototypes."""

    assign: tuple[int, ...] = Field((0, 1), min_length=1)
    """Numbers (from 0) of the views whose cluster assignments the other views predict."""
    hidden: int | None = Field(None, ge=0)
    """Hidden width of the projection head; 0: a single linear layer; unset: the backbone's width, at least 256."""
    head_norm: bool = True
    """Batch normalisation in the projection head, over all views of all sizes (the widest published network
    has none)."""
    out_dim: int = Field(128, ge=1)
    """Width of the embeddings and the prototypes."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the predictions' softmax."""
    freeze_steps: int = Field(0, ge=0)
    """For so many steps from the start of the run the optimiser leaves the prototypes alone."""

    @model_validator(mode="after")
    def _assigned_views_exist(self) -> Self:
        count = sum(spec.count for spec in self.views)
        if len(set(self.assign)) < len(self.assign):
            raise ValueError(f"assign names a view twice: {list(self.assign)}")
        if not all(0 <= number < count for number in self.assign):
            raise ValueError(f"assign must name views from 0 to {count - 1}, got {list(self.assign)}")
        return self


class PrototypeMethod(Method):
    """A backbone, a projection head and one or more sets of prototypes.

    Args:
        counts: number of prototypes of each set.
    """

    Config = PrototypeConfig
    cfg: PrototypeConfig

    def __init__(self, cfg: PrototypeConfig, build: Build, counts: Sequence[int]) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.projector = self._head(self.backbone.dim)
        self.prototypes = nn.ModuleList(Prototypes(cfg.out_dim, count) for count in counts)

    def _head(self, dim: int) -> nn.Sequential:
        hidden = max(dim, 256) if self.cfg.hidden is None else self.cfg.hidden
        widths = (dim, hidden, self.cfg.out_dim) if hidden else (dim, self.cfg.out_dim)
        return mlp(*widths, norm=self.cfg.head_norm)

    def embed(self, batch: Batch) -> Tensor:
        """Unit embeddings of all views, fp32 ``[V,B,D]``.

        The backbone sees one resolution at a time, the head all views at once, and so do their normalisations.
        """
        projected = self.projector(encode_views(self.backbone, batch.views))
        with no_autocast(projected):
            return F.normalize(projected.float(), dim=1).reshape(len(batch.views), len(batch), -1)

    def score(self, embeddings: Tensor) -> list[Tensor]:
        """fp32 scores ``[...,K]`` of unit embeddings ``[...,D]``, one tensor for each set of prototypes."""
        return [prototypes(embeddings) for prototypes in self.prototypes]

    def normalize_prototypes(self) -> None:
        """Scale all prototypes to unit length; call it before they score anything in a step."""
        for prototypes in self.prototypes:
            cast(Prototypes, prototypes).normalize()

    def before_step(self, progress: Progress) -> None:
        """Freeze by dropping gradients: neither weight decay nor momentum moves the prototypes then."""
        if progress.step < self.cfg.freeze_steps:
            for parameter in self.prototypes.parameters():
                parameter.grad = None


def swapped_prediction(scores: Tensor, codes: Mapping[int, Tensor], temperature: float) -> Tensor:
    """Cross-entropy between each code and the prediction of every other view of the same image.

    Args:
        scores: ``[V,B,K]`` of all views.
        codes: ``[B,K]`` of some views, by their numbers: probabilities without gradient.
        temperature: of the predictions' softmax.

    Returns:
        fp32 scalar: the mean over codes, other views, and images of all ranks.
    """
    with no_autocast(scores):
        log_p = (scores.float() / temperature).log_softmax(dim=2)
        total = log_p.sum(dim=0)
        losses = [-(code * (total - log_p[view])).sum(dim=1) for view, code in codes.items()]
        return comm.global_mean(torch.stack(losses).mean(dim=0)) / (len(scores) - 1)
