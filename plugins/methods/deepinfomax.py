"""Deep InfoMax: an image's vector tells the cells of its own early feature map from those of another image.

Hjelm et al., "Learning deep representations by mutual information estimation and maximization", ICLR 2019:
Jensen-Shannon estimate of mutual information (equation 4), global, local and prior objectives (sections 3.1 to
3.3), weighted as in equation 8. Networks and weights are those of the Deep InfoMax baseline in
"Self-Supervised Relational Reasoning" (Patacchiola & Storkey, NeurIPS 2020): the map is the first convolution's,
and the encoder *minimises* the prior discriminator's loss, where the paper's adversary maximises it.
Deviations: logits in place of sigmoids, so that no logarithm meets zero; by default the local objective looks at a
random sample of cells, an unbiased estimate at a fraction of the cost.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl


class DeepInfoMaxConfig(MethodConfig):
    """Options of Deep InfoMax."""

    views: tuple[ViewSpec, ...] = (ViewSpec(crop="none", flip=0.5),)
    """One view: mirrored at random, not cropped."""
    global_weight: float = Field(0.0, ge=0)
    """Weight (alpha) of the objective between an image's vector and its whole map."""
    local_weight: float = Field(1.0, ge=0)
    """Weight (beta) of the objective between an image's vector and each cell of its map."""
    prior_weight: float = Field(0.1, ge=0)
    """Weight (gamma) of matching the vectors to a uniform prior."""
    cells: int | None = Field(64, ge=1)
    """Cells per image that the local objective looks at, drawn anew in every step; unset: all (as published)."""

    @model_validator(mode="after")
    def _vectors_and_maps_meet(self) -> Self:
        if self.global_weight == 0 and self.local_weight == 0:
            raise ValueError("global_weight and local_weight are both 0: nothing would relate vectors to images")
        if len(self.views) != 1 or self.views[0].count != 1:
            raise ValueError("views must give one view")
        return self


class LocalDiscriminator(nn.Module):
    """Whether a cell of a map belongs to a vector's image; three 1x1 convolutions, as linear layers on cells.

    Args:
        dim: width d of the vectors.
        map_dim: channels c of the map.
    """

    def __init__(self, dim: int, map_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.dims = [dim, map_dim]
        self.first = nn.Linear(dim + map_dim, hidden)
        self.rest = nn.Sequential(nn.ReLU(inplace=True), *mlp(hidden, hidden, 1, norm=False))

    def forward(self, vectors: Tensor, cells: Tensor) -> Tensor:
        """Logits ``[...,B,P]`` of one or more sets of vectors ``[...,B,d]`` with the cells ``[B,P,c]``.

        The first layer sees a vector and a cell side by side. It is linear, so each is multiplied on its own: a
        vector once instead of for every cell, and a cell once for all sets of vectors.
        """
        for_vectors, for_cells = torch.split(self.first.weight, self.dims, dim=1)
        of_vectors = F.linear(vectors, for_vectors, self.first.bias)
        logits: Tensor = self.rest(of_vectors.unsqueeze(-2) + F.linear(cells, for_cells))
        return logits.squeeze(-1)


class GlobalDiscriminator(nn.Module):
    """Whether a map belongs to a vector's image. The map must be 5 cells wide or more."""

    def __init__(self, dim: int, map_dim: int) -> None:
        super().__init__()
        self.summary = nn.Sequential(
            nn.Conv2d(map_dim, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.AdaptiveAvgPool2d(16), nn.Flatten()
        )
        self.judge = mlp(32 * 16 * 16 + dim, 256, 256, 1, norm=False)

    def forward(self, vectors: Tensor, summaries: Tensor) -> Tensor:
        """Logits ``[B,1]`` of the vectors ``[B,d]`` with summaries ``[B,8192]`` of maps, from ``summary``."""
        logits: Tensor = self.judge(torch.cat([vectors, summaries], dim=1))
        return logits


class DeepInfoMax(Method):
    """Maximises a bound on the mutual information between an early feature map and the final vector."""

    name = "deepinfomax"
    Config = DeepInfoMaxConfig
    requires = frozenset({"pooled", "stem"})
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"name": "adam", "lr": 1e-4, "weight_decay": 0.0, "schedule": "constant"}
    }
    cfg: DeepInfoMaxConfig

    def __init__(self, cfg: DeepInfoMaxConfig, build: Build) -> None:
        super().__init__(cfg, build)
        if build.global_batch < 2:
            raise ConfigError(
                "method 'deepinfomax' compares an image with the next one of the batch, and train.batch_size is 1",
                hint="train.batch_size=128",
            )
        self.backbone = build.backbone()
        dim, map_dim = self.backbone.dim, self.backbone.stem_dim
        self.weights = {"local": cfg.local_weight, "global": cfg.global_weight, "prior": cfg.prior_weight}
        # A discriminator without weight would get no gradient.
        self.local = LocalDiscriminator(dim, map_dim) if cfg.local_weight else None
        self.whole = GlobalDiscriminator(dim, map_dim) if cfg.global_weight else None
        self.prior = mlp(dim, 512, 128, 1, norm=False) if cfg.prior_weight else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch.views[0].images)
        assert features.stem is not None
        vectors, terms = features.pooled, {}
        strangers = previous_image(vectors)
        if self.local is not None:
            cells = self._cells(features.stem, batch)
            terms["local"] = _jsd(*self.local(torch.stack([vectors, strangers]), cells))
        if self.whole is not None:
            summaries = self.whole.summary(features.stem)
            terms["global"] = _jsd(self.whole(vectors, summaries), self.whole(strangers, summaries))
        if self.prior is not None:
            uniform = batch.uniform(vectors.shape[1])
            terms["prior"] = _jsd(self.prior(uniform), self.prior(vectors))
        loss = torch.stack([self.weights[key] * term for key, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def _cells(self, stem: Tensor, batch: Batch) -> Tensor:
        """Rows ``[B,P,c]`` of the map: all cells, or a sample without repetition."""
        cells = stem.flatten(2).transpose(1, 2)
        count = cells.shape[1]
        if self.cfg.cells is None or self.cfg.cells >= count:
            return cells
        drawn = batch.uniform(count).topk(self.cfg.cells, dim=1).indices
        return cells.gather(1, drawn[:, :, None].expand(-1, -1, cells.shape[2]))


def previous_image(rows: Tensor) -> Tensor:
    """``[B,...]`` of each image's predecessor in the global batch; the first one follows the last."""
    last = comm.gather(rows[-1:])
    return torch.cat([last[comm.rank() - 1, None], rows[:-1]])


def _jsd(of_pairs: Tensor, of_strangers: Tensor) -> Tensor:
    """Minus the Jensen-Shannon estimate: cross-entropy of telling the two apart; 2 ln 2 if all logits are 0.

    Args:
        of_pairs, of_strangers: logits ``[B,P]``.

    Returns:
        fp32 scalar, averaged over the images of all ranks.
    """
    with no_autocast(of_pairs):
        losses = F.softplus(-of_pairs.float()) + F.softplus(of_strangers.float())
        return comm.global_mean(losses.mean(dim=1))


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [DeepInfoMax]
