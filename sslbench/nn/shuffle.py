"""Shuffling batch normalisation (MoCo: He et al., CVPR 2020, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sslbench import comm


@torch.no_grad()
def encode_shuffled(encode: Callable[[Tensor], Tensor], images: Tensor, numbers: Tensor) -> Tensor:
    """Encode the images of all ranks, each in the company of random others.

    Batch statistics of a query and of its key then come from different images, and cannot give away which key
    belongs to which query. Ranks exchange images; within a rank the new order matters to networks that normalise
    in groups (:func:`sslbench.nn.split_norm.split_batch_norm`).

    Args:
        encode: from images ``[B,3,H,W]`` to rows ``[B,D]``.
        images: ``[B,3,H,W]``, this rank's share.
        numbers: ``[B]``, random numbers that all ranks together order into one permutation.

    Returns:
        ``[N,D]``: rows of the images of all ranks, in rank order.
    """
    order = comm.gather(numbers).argsort(stable=True)
    start = comm.row_offset(images)
    share = order[start : start + len(images)]
    return comm.gather(encode(comm.gather(images)[share]))[order.argsort()]
