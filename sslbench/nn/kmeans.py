"""Spherical k-means over the rows of all ranks (Dhillon & Modha, "Concept decompositions", 2001).

As DeepCluster-v2 runs it (Caron et al., NeurIPS 2020, section 4.1 and appendix): a fixed number of rounds, no
restarts, and empty clusters stay where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslbench import comm
from sslbench.nn.losses import no_autocast

_DOUBLED_AT_ONCE = 1 << 20
"""Values of rows that are in memory in float64 (8 MiB)."""
_SCORES_AT_ONCE = 1 << 22
"""Entries of the score matrix in memory (16 MiB): all of ImageNet against 3000 centroids would take 15 GB."""


class Clusters(NamedTuple):
    """A clustering of the rows of all ranks."""

    centroids: Tensor
    """fp32 ``[K,D]``, unit rows, equal on all ranks."""
    labels: Tensor
    """int64 ``[n]``: the nearest centroid of each of this rank's rows."""


@torch.no_grad()
def spherical_kmeans(rows: Tensor, clusters: int, iterations: int = 10) -> Clusters:
    """Cluster unit vectors by their cosines.

    The centroids start at random rows, drawn from torch's global CPU generator of rank 0. Sums are taken in
    float64, so that the result does not depend on how the rows are spread over ranks.

    Memory of a rank beyond its rows: ``20 * K * D`` bytes for centroids and sums, ``8 * n`` for labels, and at
    most 24 MiB for scores and rows in float64. Ranks exchange ``8 * K * (D + 1)`` bytes per round.

    Args:
        rows: ``[n,D]``, this rank's unit rows; ``n`` may differ between ranks.
        clusters: ``K``, at most the number of rows of all ranks.
        iterations: rounds of assigning the rows and moving the centroids; the labels come from one more
            assignment.
    """
    with no_autocast(rows):
        rows = rows.float()
        centroids = random_rows(rows, clusters)
        for _ in range(iterations):
            centroids = _moved(centroids, rows, nearest(rows, centroids))
        return Clusters(centroids, nearest(rows, centroids))


def random_rows(rows: Tensor, count: int) -> Tensor:
    """``[count,D]``: different ones of all ranks' rows ``[n,D]``, whatever the number of ranks."""
    total = int(comm.all_sum(torch.tensor(len(rows), device=rows.device)))
    chosen = comm.broadcast(torch.randperm(total)[:count]).to(rows.device) - comm.row_offset(rows)
    own = (chosen >= 0) & (chosen < len(rows))
    drawn = rows.new_zeros(count, rows.shape[1])
    drawn[own] = rows[chosen[own]]
    return comm.all_sum(drawn)


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """int64 ``[n]``: the centroid of ``[K,D]`` with the largest dot product, for each row of ``[n,D]``."""
    at_once = max(1, _SCORES_AT_ONCE // len(centroids))
    return torch.cat([(part @ centroids.T).argmax(dim=1) for part in torch.split(rows, at_once)])


def _moved(centroids: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """The unit means of the clusters; the old centroids of empty ones."""
    sums = centroids.new_zeros(centroids.shape, dtype=torch.float64)
    at_once = max(1, _DOUBLED_AT_ONCE // rows.shape[1])
    counts = comm.all_sum(torch.bincount(labels, minlength=len(centroids)))
    for part, own in zip(*(torch.split(table, at_once) for table in (rows, labels)), strict=True):
        sums.index_add_(0, own, part.double())
    sums = comm.all_sum(sums)
    means = torch.where(counts[:, None] > 0, sums, centroids.double())
    return F.normalize(means, dim=1).float()
