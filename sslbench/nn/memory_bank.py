"""A memory of every image's features, by its number in the data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslbench import comm

_NEVER = -2


class MemoryBank(nn.Module):
    """The last features of all images, equal on all ranks.

    It takes ``4 * banks * images * dim`` bytes on each rank and in each checkpoint: 1.3 GB for two banks of 128
    features of ImageNet's images, 51 MB for CIFAR-10. It is what stays O(N) on every device: a rank reads any
    image of its batches, and stores those of all ranks, so that any number of ranks can go on from a checkpoint.

    Args:
        banks: features per image, such as one for each of several views.
        images: N, in the data set.
        dim: D, of a feature.
    """

    features: Tensor
    """fp32 ``[banks,N,D]``."""
    epochs: Tensor
    """int64 ``[N]``: the epoch in which each image was last stored."""

    def __init__(self, banks: int, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(banks, images, dim))
        self.register_buffer("epochs", torch.full((images,), _NEVER))

    @torch.no_grad()
    def store(self, index: Tensor, features: Tensor, epoch: int) -> None:
        """Remember this rank's share of a batch, on all ranks.

        Args:
            index: int64 ``[B]``, numbers of the images in the data set.
            features: ``[banks,B,D]``.
            epoch: in which they were seen; -1 for before the first one.
        """
        index = comm.gather(index)
        rows = comm.gather(features.detach().float().transpose(0, 1))
        self.features[:, index] = rows.transpose(0, 1)
        self.epochs[index] = epoch

    def seen_in(self, epoch: int) -> Tensor:
        """int64 ``[M]``: the images that were last stored in ``epoch``, in order."""
        return (self.epochs == epoch).nonzero().flatten()
