"""What DeepCluster-v2 and SeLa-v2 share: labels from a clustering of last epoch's features, learned by all views.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020: both are
revised in its section 4.1 and appendix with SwAV's network and loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.memory_bank import MemoryBank
from sslbench.nn.prototypes import PrototypeConfig, PrototypeMethod, Prototypes
from sslbench.plugin.api import Batch, Build, Jitter, TrainingImages, ViewSpec

UNLABELLED = -100
"""Label of images that the last epoch left out; the loss ignores it."""


class ClusteringConfig(PrototypeConfig):
    """Options of methods that cluster all images before each epoch."""

    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2),)
    """Views of any sizes; those of one size follow each other."""
    prototypes: tuple[Annotated[int, Field(ge=2)], ...] = Field((100, 100, 100), min_length=1)
    """Number of clusters of each head, each clustering the images anew (paper: three of 3000 on ImageNet; about
    ten times the number of classes on small data)."""


class Clustering(PrototypeMethod):
    """Predicts, from every view, the cluster that its image was put into at the start of the epoch.

    A memory bank keeps the embeddings of each image's assigned views. The first epoch starts by filling it, later
    ones find what the epoch before left. Head h clusters the embeddings of assigned view ``h mod A``.

    Memory of a rank for N images, A assigned views, H heads and W ranks: ``4 * A * N * D`` bytes for the bank,
    ``8 * H * N`` for the assignments, and while a head clusters ``4 * N * D / W`` for the rank's share.
    """

    Config = ClusteringConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: ClusteringConfig
    assignments: Tensor
    """int64 ``[heads,N]``: the cluster of each image of the data set."""
    clusters_used: Tensor
    """fp32 ``[heads]``: how many clusters have images."""

    def __init__(self, cfg: ClusteringConfig, build: Build) -> None:
        super().__init__(cfg, build, cfg.prototypes)
        _check_enough_images(cfg.prototypes, build)
        self.steps_per_epoch = build.steps_per_epoch
        self.bank = MemoryBank(len(cfg.assign), build.num_images, cfg.out_dim)
        self.register_buffer("assignments", torch.full((len(cfg.prototypes), build.num_images), UNLABELLED))
        self.register_buffer("clusters_used", torch.zeros(len(cfg.prototypes)))

    @abstractmethod
    def cluster(self, prototypes: Prototypes, rows: Tensor) -> Tensor:
        """int64 ``[n]``: clusters of this rank's share ``[n,D]`` of the embeddings of all images."""

    @torch.no_grad()
    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        if epoch == 0:
            self._fill_bank(images.augmented(epoch))
        seen = self.bank.seen_in(epoch - 1)
        own = seen.tensor_split(comm.world())[comm.rank()]
        self.assignments.fill_(UNLABELLED)
        for head, prototypes in enumerate(self.prototypes):
            assert isinstance(prototypes, Prototypes)
            labels = comm.gather(self.cluster(prototypes, self.bank.features[head % len(self.cfg.assign), own]))
            self.assignments[head, seen] = labels
            self.clusters_used[head] = torch.bincount(labels).count_nonzero()

    def _fill_bank(self, batches: Iterable[Batch]) -> None:
        """In train mode, shuffled and view by view, as the authors do; running statistics move.

        Were the images in the order of their classes, batch normalisation would see a class or two at a time.
        """
        for batch in batches:
            alone = [self.embed(replace(batch, views=(batch.views[number],))) for number in self.cfg.assign]
            self.bank.store(batch.index, torch.cat(alone), epoch=-1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.embed(batch)
        assigned = torch.stack([embeddings[number] for number in self.cfg.assign])
        self.bank.store(batch.index, assigned, batch.step // self.steps_per_epoch)
        labels = self.assignments[:, batch.index].repeat(1, len(embeddings))
        scores = self.score(embeddings.flatten(0, 1))
        losses = [self._cross_entropy(*pair) for pair in zip(scores, labels, strict=True)]
        return {"loss": torch.stack(losses).mean(), "clusters_used": self.clusters_used.mean()}

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labelled ones of all rows ``[V*B,K]`` of all ranks."""
        each = F.cross_entropy(scores / self.cfg.temperature, labels, ignore_index=UNLABELLED, reduction="none")
        return comm.global_mean(each, (labels != UNLABELLED).to(each.dtype))


def _check_enough_images(counts: tuple[int, ...], build: Build) -> None:
    """An epoch drops its last partial batch, and the next one clusters what it saw."""
    seen = build.steps_per_epoch * build.global_batch
    if max(counts) > seen:
        raise ConfigError(
            f"method.prototypes asks for {max(counts)} clusters of the {seen} images that an epoch sees",
            hint=f"method.prototypes=[{max(2, seen // 10)}]",
        )
