"""MoCo v2: recognise an image's other view among the keys of many earlier images.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020: queue and momentum
encoder (section 3.2, equations 1 and 2), shuffling batch normalisation (section 3.3). Chen et al., "Improved
Baselines with Momentum Contrastive Learning", 2020: head and views. Van Gansbeke et al., "Revisiting Contrastive
Methods for Unsupervised Learning of Visual Representations", NeurIPS 2021, add small crops as further queries,
which must overlap the key's crop (``near``), AutoAugment, and neighbours as positives (``knn_weight``).
Deviations: queue and key encoder move after the optimiser's step, which gives the same sequence; one process can
normalise as several GPUs would (``bn_groups``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.contrast import QueueContrast, nearest
from sslbench.nn.ema import EMA
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.queue import FeatureQueue, default_length
from sslbench.nn.shuffle import encode_shuffled
from sslbench.nn.split_norm import check_statistics, local_groups, share_running_statistics, split_batch_norm
from sslbench.plugin import api
from sslbench.plugin.api import Batch, Blur, Build, Jitter, Method, MethodConfig, View, ViewSpec
from sslbench.plugin.hooks import hookimpl


class MoCoConfig(MethodConfig):
    """Options of MoCo."""

    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2, blur=Blur()),)
    """View 0 is the query and view 1 the key. Further views are more queries for the same key; those of another
    size go through the encoder separately."""
    hidden: int | None = Field(None, ge=1)
    """Hidden width of the projection head; unset: the backbone's width (as the paper), at least 256."""
    out_dim: int = Field(128, ge=1)
    """Width of queries and keys."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the softmax (paper: 0.2 for ImageNet)."""
    momentum: float = Field(0.99, ge=0, le=1)
    """EMA momentum of the key encoder, constant (paper: 0.999 for long runs)."""
    queue: int | None = Field(None, ge=1)
    """Keys in the queue, a multiple of the batch size (paper: 65536); unset: a quarter of the images, at most
    4096. In a longer one, more images would meet their own old keys as negatives."""
    bn_groups: int = Field(4, ge=1)
    """Groups of the global batch that are normalised separately, as on so many GPUs; a multiple of the number of
    processes. 1: the whole batch is normalised together, which on several of them needs train.sync_bn."""
    shuffle_bn: bool = True
    """Shuffle the keys over the groups, so that statistics do not give away which key belongs to which query."""
    knn_weight: float = Field(0.0, ge=0)
    """Weight of the loss with nearest neighbours from the queue as positives; 0: none, and no second queue."""
    knn_topk: int = Field(20, ge=1)
    """How many neighbours, by the cosine of backbone features."""
    knn_warmup_epochs: int = Field(0, ge=0)
    """First epochs in which the neighbour loss has no weight."""
    enqueue: Literal["after", "before-neighbours"] = "after"
    """`before-neighbours` reproduces the published program without warm-up: neighbours are searched among queue
    features that hold this step's keys already, so some of them point at keys that are about to be replaced."""

    @model_validator(mode="after")
    def _query_and_key(self) -> Self:
        count = sum(spec.count for spec in self.views)
        if count < 2:
            raise ValueError(f"views must give a query and a key, and perhaps more queries; got {count} view")
        return self


class _Encoded(NamedTuple):
    """Unit rows in fp32; the fields name the sets of the queue."""

    projected: Tensor
    """``[N, out_dim]``"""
    pooled: Tensor
    """``[N,D]``"""


class MoCo(Method):
    """Contrasts queries with a key from a slowly moving encoder and with a queue of earlier keys."""

    name = "moco"
    Config = MoCoConfig
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4},
        "train": {"sync_bn": False},
    }
    cfg: MoCoConfig

    def __init__(self, cfg: MoCoConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        split_batch_norm(self.backbone, local_groups(cfg.bn_groups, build.global_batch))
        dim = self.backbone.dim
        self.projector = mlp(dim, cfg.hidden or max(dim, 256), cfg.out_dim, norm=False)
        self.key_backbone, self.key_projector = EMA.copy_of(self.backbone), EMA.copy_of(self.projector)
        length = cfg.queue or default_length(build.num_images, build.global_batch)
        sets: dict[str, Any] = {"projected": cfg.out_dim} | ({"pooled": dim} if cfg.knn_weight else {})
        self.queue = FeatureQueue(length, build.global_batch, **sets)
        if cfg.knn_weight and cfg.knn_topk > length:
            raise ConfigError(
                f"method.knn_topk={cfg.knn_topk} is more than the queue of {length} holds",
                hint=f"set method.knn_topk={length} or less, or a larger method.queue",
            )
        self.steps_per_epoch = build.steps_per_epoch
        self._newest: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        query, key, *further = batch.views
        queries = self._encode_queries([query, *further])
        self._newest = self._encode_keys(key.images, batch.uniform())
        per_image = len(queries.projected) // len(batch)
        start = comm.row_offset(key.images)
        own = self._newest["projected"][start : start + len(batch)].repeat_interleave(per_image, dim=0)
        with no_autocast(queries.projected):
            return self._losses(queries, own, batch.step)

    def _losses(self, queries: _Encoded, own: Tensor, step: int) -> dict[str, Tensor]:
        """Of all queries ``[M]`` and the keys of their images ``[M,D]``, averaged over all ranks."""
        neighbours = self._neighbours(queries.pooled) if self.cfg.knn_weight else None
        contrast = QueueContrast(queries.projected, self.queue["projected"], self.cfg.temperature)
        loss = contrast.info_nce(own)
        logged = {"info_nce": loss.detach().mean(), "top1": 100 * contrast.found(own).float().mean()}
        if neighbours is not None:
            among = contrast.neighbour_loss(neighbours)
            logged["neighbours"] = among.detach().mean()
            loss = loss + self._knn_weight(step) * among
        return {"loss": comm.global_mean(loss), **logged}

    def _neighbours(self, pooled: Tensor) -> Tensor:
        """int64 ``[M,k]``: slots of each query's nearest neighbours."""
        newest = None
        if self.cfg.enqueue == "before-neighbours":
            newest = self.queue.slots(len(self._newest["pooled"])), self._newest["pooled"]
        return nearest(pooled, self.queue["pooled"], self.cfg.knn_topk, newest)

    def _knn_weight(self, step: int) -> float:
        return self.cfg.knn_weight if step // self.steps_per_epoch >= self.cfg.knn_warmup_epochs else 0.0

    def _encode_queries(self, views: Sequence[View]) -> _Encoded:
        """Rows of all queries, image-major: row ``b*V + v`` is query v of image b.

        Within a pass the order matters too: groups that are normalised separately hold whole images.
        """
        by_size = groupby((view.images for view in views), key=lambda images: images.shape[-1])
        pooled = [self._pooled(torch.stack(list(images), dim=1)) for _, images in by_size]
        together = torch.cat(pooled, dim=1).flatten(0, 1)
        return _normalised(self.projector(together), together.detach())

    def _pooled(self, images: Tensor) -> Tensor:
        """``[B,V,3,S,S]`` to ``[B,V,D]``."""
        pooled: Tensor = self.backbone(images.flatten(0, 1)).pooled
        return pooled.view(*images.shape[:2], -1)

    @torch.no_grad()
    def _encode_keys(self, images: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Rows of all ranks' images for the sets of the queue, in rank order."""

        def encode(images: Tensor) -> Tensor:
            pooled = self.key_backbone(images).pooled
            keys = _normalised(self.key_projector(pooled), pooled)
            return torch.cat([getattr(keys, name) for name in self.queue.names], dim=1)

        shuffled = self.cfg.shuffle_bn and self.cfg.bn_groups > 1
        rows = encode_shuffled(encode, images, numbers) if shuffled else comm.gather(encode(images))
        widths = [self.queue[name].shape[1] for name in self.queue.names]
        return dict(zip(self.queue.names, torch.split(rows, widths, dim=1), strict=True))

    def start_epoch(self, epoch: int, images: api.TrainingImages) -> None:
        check_statistics(self, self.cfg.bn_groups)

    def after_step(self, progress: api.Progress) -> None:
        """The queue moves once nothing needs its rows any more; the key encoder follows by equation 2."""
        self.queue.push(**self._newest)
        self.key_backbone.update(self.backbone, self.cfg.momentum)
        self.key_projector.update(self.projector, self.cfg.momentum)
        if self.cfg.bn_groups > 1:
            share_running_statistics(self)


def _normalised(projected: Tensor, pooled: Tensor) -> _Encoded:
    return _Encoded(F.normalize(projected.float(), dim=1), F.normalize(pooled.float(), dim=1))


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [MoCo]
