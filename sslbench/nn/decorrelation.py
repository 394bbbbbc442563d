"""What methods share that shape the second moments of embeddings over the global batch (Barlow Twins, VICReg)."""

from __future__ import annotations

import torch
from torch import Tensor

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.plugin.api import Build


def gather_views(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings ``[B,D]`` of two views, each as fp32 ``[N,D]`` of all ranks, differentiably.

    Moments of gathered rows, and their gradients, are those of one process; for embeddings wider than the batch
    (papers: 8192 and 2048) this also exchanges less than their ``[D,D]`` matrix would.
    """
    pairs = comm.gather(torch.stack([first.float(), second.float()], dim=1))
    return pairs[:, 0], pairs[:, 1]


def standardized(rows: Tensor, eps: float = 1e-5) -> Tensor:
    """Columns of ``[N,D]`` with mean 0 and variance 1: batch normalisation without learnt scale and shift."""
    centred = rows - rows.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + eps).rsqrt()


def covariance(rows: Tensor) -> Tensor:
    """``[D,D]``, unbiased, of rows ``[N,D]``."""
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / (len(rows) - 1)


def off_diagonal_energy(matrix: Tensor) -> Tensor:
    """Sum of the squares of all entries of ``[D,D]`` but those of the diagonal."""
    return matrix.square().sum() - matrix.diagonal().square().sum()


def check_batch(build: Build) -> None:
    """
    Raises:
        ConfigError: the global batch is one image, which has no variance.
    """
    if build.global_batch < 2:
        raise ConfigError(
            "variances over a batch of one image do not exist", hint="set train.batch_size=128, or at least 2"
        )
