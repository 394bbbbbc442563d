"""DeepCluster-v2: predict the k-means clusters of last epoch's features, with the centroids as classifier.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018, as revised in section 4.1
and the appendix of "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV), NeurIPS
2020. Details follow the authors' program but for two: the memory bank goes by image and not by process, so initial
centroids may be any images (theirs: of one process), and the loss is the mean over the labelled rows of all
processes (theirs: of the processes' means).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sslbench.nn.clustering import Clustering, ClusteringConfig
from sslbench.nn.kmeans import spherical_kmeans
from sslbench.nn.prototypes import Prototypes
from sslbench.plugin.api import Build, Method
from sslbench.plugin.hooks import hookimpl


class DeepClusterV2Config(ClusteringConfig):
    """Options of DeepCluster-v2."""

    kmeans_iterations: int = Field(10, ge=1)
    """Rounds of k-means at the start of each epoch."""
    freeze_steps: int = Field(10**10, ge=0)
    """For so many steps of the run the centroids are the classifier as they are, then the optimiser moves them
    between two clusterings. By default they never move, as in all published runs."""


class DeepClusterV2(Clustering):
    """Every epoch the centroids of each head's k-means become its prototypes."""

    name = "deepcluster_v2"
    Config = DeepClusterV2Config
    cfg: DeepClusterV2Config

    def __init__(self, cfg: DeepClusterV2Config, build: Build) -> None:
        super().__init__(cfg, build)
        self.prototypes.requires_grad_(cfg.freeze_steps < build.steps)

    def cluster(self, prototypes: Prototypes, rows: Tensor) -> Tensor:
        found = spherical_kmeans(rows, prototypes.out_features, self.cfg.kmeans_iterations)
        prototypes.weight.copy_(found.centroids)
        return found.labels


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [DeepClusterV2]
