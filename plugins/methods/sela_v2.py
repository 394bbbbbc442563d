"""SeLa-v2: predict labels that divide the images equally among learned prototypes.

Asano et al., "Self-labelling via simultaneous clustering and representation learning", ICLR 2020, as revised in
section 4.1 and the appendix of "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
(SwAV), NeurIPS 2020: DeepCluster-v2, but with labels from the Sinkhorn-Knopp algorithm over the whole data set and
with prototypes that learn by gradient descent. No program was published, and the text leaves open how strongly the
labels are regularised, in how many rounds, whether they are hard, whether prototypes are kept at unit length and
whether they are frozen at first. Here labels are hard, as soft ones would take K numbers per image; all else is an
option.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sslbench.nn.clustering import Clustering, ClusteringConfig
from sslbench.nn.prototypes import Prototypes
from sslbench.nn.sinkhorn import SMALLEST_EPSILON, sinkhorn
from sslbench.plugin.api import Method, Progress
from sslbench.plugin.hooks import hookimpl


class SeLaV2Config(ClusteringConfig):
    """Options of SeLa-v2."""

    epsilon: float = Field(0.01, ge=SMALLEST_EPSILON)
    """Entropy of the label assignment, in units of cosines; smaller is sharper. Unpublished: our choice. SwAV's
    0.05 balances soft codes only: on 5000 images of CIFAR-10 it left 5 of 100 prototypes without a hard label and
    gave another 111; at 0.01 each had 27 to 63. The first SeLa raised softmax probabilities to the power of 25:
    temperature / 25."""
    sinkhorn_iterations: int = Field(100, ge=1)
    """At most so many rounds of Sinkhorn-Knopp for each head at the start of an epoch. Unpublished: our choice."""
    sinkhorn_tolerance: float | None = Field(0.1, gt=0)
    """Stop earlier once the prototypes' relative deviations from equal shares sum to this. Unpublished: the first
    SeLa's value. Unset: never."""
    normalize_prototypes: bool = True
    """Scale prototypes to unit length after each step. Unpublished: our choice, as SwAV does."""


class SeLaV2(Clustering):
    """Every epoch each head's prototypes are given equally many images, softly, and each image one of them."""

    name = "sela_v2"
    Config = SeLaV2Config
    cfg: SeLaV2Config

    def cluster(self, prototypes: Prototypes, rows: Tensor) -> Tensor:
        """Holds the codes of a process's share of the images at once: ``[n,K]``, 480 MB of float64 for a
        64th of ImageNet and 3000 prototypes, twice that while they are made."""
        options = self.cfg
        codes = sinkhorn(
            prototypes(rows),
            options.epsilon,
            options.sinkhorn_iterations,
            tolerance=options.sinkhorn_tolerance,
        )
        return codes.argmax(dim=1)

    def after_step(self, progress: Progress) -> None:
        if self.cfg.normalize_prototypes:
            self.normalize_prototypes()


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [SeLaV2]
