"""DeepCluster: cluster the features of all images before each epoch, then classify images into their clusters.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018: k-means on whitened,
normalised features (section 3.3), pseudo-labels and class weights (section 3.2, equation 2). Head, optimiser and
views are those of the DeepCluster baseline in "Self-Supervised Relational Reasoning" (Patacchiola & Storkey,
NeurIPS 2020). That code clusters augmented images (``features: augmented``) and garbles the images it trains on
(``garble``), both by mistake; the defaults here do neither, so they are stronger than its published numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslbench import comm
from sslbench.config.options import Options
from sslbench.errors import ConfigError, DivergedError
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.whitening import whiten
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, TrainingImages, ViewSpec
from sslbench.plugin.hooks import hookimpl

_WIDE = 512
"""Features of this width or more lose half of their dimensions in the whitening."""


class Garble(Options):
    """What the baseline's authors did to images between the first and a second augmentation."""

    mean: tuple[float, float, float]
    """Means of the data set, with which the garbled image is normalised again."""
    std: tuple[float, float, float]
    """Standard deviations of the data set."""
    padding: float = Field(0.125, ge=0, le=1)
    """Zero padding per side of the second random crop, as a fraction of the image."""


class DeepClusterConfig(MethodConfig):
    """Options of DeepCluster."""

    views: tuple[ViewSpec, ...] = (ViewSpec(crop="padded", flip=0.5),)
    """The first view is classified."""
    clusters: int = Field(100, ge=2)
    """Number of clusters; ten per class is customary."""
    hidden: int = Field(256, ge=1)
    """Hidden width of the head."""
    features: Literal["clean", "augmented"] = "clean"
    """Images whose features are clustered: as they are, or in the first view (the baseline's code)."""
    weights: Literal["inverse", "complement", "none"] = "inverse"
    """Weight of a cluster of n among N images in the loss: `inverse`: 1/n (the paper); `complement`: 1 - n/N (the
    baseline's code), nearly the same for all; `none`."""
    restarts: int = Field(5, ge=1)
    """k-means runs per epoch, of which the best counts."""
    iterations: int = Field(30, ge=1)
    """Most iterations of a k-means run."""
    garble: Garble | None = None
    """Train on images garbled as by the baseline's code: normalised values are taken for colours in [0, 1] and
    stored in eight bits, where they wrap around, then cropped, mirrored and normalised again. Unset: do not."""


class DeepCluster(Method):
    """Learns to tell the clusters apart that its own features formed at the start of the epoch."""

    name = "deepcluster"
    Config = DeepClusterConfig
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"}
    }
    cfg: DeepClusterConfig
    labels: Tensor
    class_weights: Tensor

    def __init__(self, cfg: DeepClusterConfig, build: Build) -> None:
        super().__init__(cfg, build)
        if cfg.clusters > build.num_images:
            raise ConfigError(
                f"method.clusters={cfg.clusters} exceeds the {build.num_images} training images",
                hint=f"method.clusters={max(2, build.num_images // 50)}",
            )
        self.backbone = build.backbone()
        self.head = mlp(self.backbone.dim, cfg.hidden, cfg.clusters, activation="leaky-relu")
        # Buffers: a run that resumes within an epoch goes on with the clusters of its start.
        self.register_buffer("labels", torch.zeros(build.num_images, dtype=torch.int64))
        self.register_buffer("class_weights", torch.ones(cfg.clusters))

    @torch.no_grad()
    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        """Cluster all images; the last layer starts anew, since cluster numbers mean nothing across epochs.

        The optimiser keeps its moments of that layer, as in the baseline's code.
        """
        self._forget_clusters()
        seed = int(torch.randint(2**31 - 1, ()))
        features, index = self._features(epoch, images)
        if not features.isfinite().all():
            raise DivergedError("the features to cluster are not finite", hint="start again with a lower optim.lr")
        found = torch.zeros_like(index)
        if comm.rank() == 0:
            found.copy_(self._cluster(features, seed))
        self.labels[index] = comm.broadcast(found)
        self.class_weights.copy_(class_weights(found, self.cfg.clusters, self.cfg.weights))

    def _forget_clusters(self) -> None:
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)

    def _features(self, epoch: int, images: TrainingImages) -> tuple[Tensor, Tensor]:
        """Features ``[N,D]`` of all images in the order of their numbers ``[N]``, on every rank."""
        for statistic in self.backbone.buffers():  # ranks that normalise their own rows only have different ones
            comm.broadcast(statistic)
        training = self.backbone.training
        self.backbone.eval()
        pairs = [(self.backbone(shown).pooled.float(), index) for shown, index in self._shown(epoch, images)]
        self.backbone.train(training)
        features, index = (comm.gather(torch.cat(column)) for column in zip(*pairs, strict=True))
        order = index.argsort()
        return features[order], index[order]

    def _shown(self, epoch: int, images: TrainingImages) -> Iterator[tuple[Tensor, Tensor]]:
        if self.cfg.features == "clean":
            return images.clean()
        return ((batch.views[0].images, batch.index) for batch in images.augmented(epoch))

    def _cluster(self, features: Tensor, seed: int) -> Tensor:
        """Labels ``[N]`` by k-means in whitened space."""
        # Imported here: listing or checking this plugin must not pay for scikit-learn.
        from sklearn.cluster import KMeans

        kept = features.shape[1] // 2 if features.shape[1] >= _WIDE else features.shape[1]
        rows = F.normalize(whiten(features, kept), dim=1).cpu().numpy()
        cfg = self.cfg
        kmeans = KMeans(cfg.clusters, n_init=cfg.restarts, max_iter=cfg.iterations, random_state=seed)
        return torch.from_numpy(kmeans.fit_predict(rows)).long()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views[0].images
        if self.cfg.garble is not None:
            images = garble(images, self.cfg.garble, batch)
        logits = self.head(self.backbone(images).pooled)
        labels = self.labels[batch.index]
        with no_autocast(logits):
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            loss = comm.global_mean(losses, self.class_weights[labels])
        return {"loss": loss, "cluster_top1": 100 * (logits.detach().argmax(dim=1) == labels).float().mean()}


def class_weights(labels: Tensor, clusters: int, kind: str) -> Tensor:
    """Weights ``[clusters]`` of the classes in the loss, which divides by the sum of its rows' weights."""
    sizes = labels.bincount(minlength=clusters).float()
    if kind == "inverse":
        return len(labels) / clusters * sizes.clamp_min(1).reciprocal()
    if kind == "complement":
        return 1 - sizes / len(labels)
    return torch.ones_like(sizes)


def garble(images: Tensor, options: Garble, batch: Batch) -> Tensor:
    """Normalised images ``[B,3,S,S]``, stored in 8 bits modulo 256, then cropped, mirrored and normalised again.

    -1.0 becomes the colour 1 of 255 and 1.5 becomes 126; fractions of a colour are cut off.
    """
    wrapped = (images.float() * 255).int().remainder(256).float() / 255
    channels = _crop_and_flip(wrapped, options.padding, batch.uniform(3)).unbind(1)
    statistics = zip(channels, options.mean, options.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in statistics], dim=1)


def _crop_and_flip(images: Tensor, padding: float, draws: Tensor) -> Tensor:
    """A crop of each zero-padded image, at a random place, mirrored half of the time; ``draws`` is ``[B,3]``."""
    side, margin = images.shape[-1], round(padding * images.shape[-1])
    y, x = (draws[:, :2] * (2 * margin + 1)).long().unbind(1)
    cells = torch.arange(side, device=images.device)
    columns = torch.where(draws[:, 2:] < 0.5, cells.flip(0), cells) + x[:, None]
    padded = F.pad(images, [margin] * 4)
    image, rows = torch.arange(len(images), device=images.device)[:, None, None], cells + y[:, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [DeepCluster]
