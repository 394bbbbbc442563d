"""Pairs of views and the head that relates them.

Patacchiola & Storkey, "Self-Supervised Relational Reasoning for Representation Learning", NeurIPS 2020, section 3.
With K views of M images, the pair of views (i, j), i < j, gives M positives (both views of one image) and M
negatives: the j-th views are rolled along the batch, by 1, 2, ... M-1 and again from 1 over the pairs of views, so
that no image meets itself. In all M*K*(K-1) pairs, half of them positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.heads import mlp

Aggregation = Literal["cat", "sum", "mean", "max"]
Combine = Callable[[Tensor, Tensor], Tensor]
"""From ``[V,1,B,H]`` (left sides) and ``[V,2,B,H]`` (right sides) to ``[V,2,B,*]``."""


def negative_partners(own: Tensor, images: int, pairs: int) -> Tensor:
    """Which image each own image meets in the negatives of each pair of views.

    Args:
        own: int64 ``[B]``, numbers of this rank's images in the global batch.
        images: M, size of the global batch.
        pairs: V, number of pairs of views.

    Returns:
        int64 ``[V,B]``.

    Raises:
        ConfigError: a lone image has no other to meet.
    """
    if images < 2:
        raise ConfigError(
            "pairs of different images need at least 2 images in the global batch, got 1",
            hint="train.batch_size=64",
        )
    shift = 1 + torch.arange(pairs, device=own.device) % (images - 1)
    return (own - shift[:, None]) % images


def pair_up(left: Tensor, right: Tensor, offset: int, combine: Combine) -> Tensor:
    """Combine the two sides of all pairs of this rank's images.

    Args:
        left: ``[K,B,H]``, one row per view and own image.
        right: ``[K,M,H]``, one row per view and image of the global batch.
        offset: number of this rank's first image in the global batch.
        combine: makes one row of the two sides of a pair; may overwrite its second argument.

    Returns:
        ``[V,2,B,*]`` for the V = K(K-1)/2 pairs of views in the order (0,1), (0,2), ..., positives before
        negatives.
    """
    (views, batch, width), images = left.shape, right.shape[1]
    first, second = torch.triu_indices(views, views, 1, device=left.device)
    own = offset + torch.arange(batch, device=left.device)
    others = negative_partners(own, images, len(first))
    rows = second[:, None, None] * images + torch.stack([own.expand_as(others), others], dim=1)
    # As look-ups, because the gradient of an embedding is much faster than that of an index on a CPU.
    lefts = F.embedding(first, left.flatten(1)).view(-1, 1, batch, width)
    return combine(lefts, F.embedding(rows, right.flatten(0, 1)))


class RelationHead(nn.Module):
    """Tells whether two views show the same image: Linear, BatchNorm, LeakyReLU, Linear.

    Batch normalisation sees positives and negatives together, as many of each. All aggregations but the maximum
    are linear, and so is the first layer: it is applied to the views, of which there are few, and its outputs are
    added, so the matrix of all pairs is never built: ``W[a;b] = W_a a + W_b b``.

    Args:
        dim: features D of a view.
        hidden: hidden width.
        aggregation: how two views become one input.
    """

    def __init__(self, dim: int, hidden: int, aggregation: Aggregation) -> None:
        super().__init__()
        self.aggregation = aggregation
        self.layers = mlp(2 * dim if aggregation == "cat" else dim, hidden, 1, activation="leaky-relu")

    def forward(self, features: Tensor) -> Tensor:
        """Logits of "the same image" for all pairs of this rank's images, with those of all ranks.

        Args:
            features: ``[K,B,D]``, K views of B images.

        Returns:
            ``[V,2,B]`` in the order of :func:`pair_up`: ``[:,0]`` are positives, ``[:,1]`` negatives.
        """
        # The weights' precision, also under autocast: the ranks' gradients are summed in it.
        features = features.to(cast(nn.Linear, self.layers[0]).weight.dtype)
        everyone = comm.gather(features.transpose(0, 1)).transpose(0, 1)
        hidden = self._first_layer(features, everyone, comm.row_offset(features[0]))
        return cast(Tensor, self.layers[1:](hidden.flatten(0, 2))).view(hidden.shape[:3])

    def _first_layer(self, own: Tensor, everyone: Tensor, offset: int) -> Tensor:
        """Hidden rows ``[V,2,B,H]``, before normalisation."""
        linear = cast(nn.Linear, self.layers[0])
        if self.aggregation == "max":
            return cast(Tensor, linear(pair_up(own, everyone, offset, torch.maximum)))
        weight_left, weight_right = self._sides(linear.weight)
        left, right = F.linear(own, weight_left, linear.bias), F.linear(everyone, weight_right)
        return pair_up(left, right, offset, lambda a, b: b.add_(a))

    def _sides(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer applies to the left view and to the right one."""
        if self.aggregation == "cat":
            left, right = weight.chunk(2, dim=1)
            return left, right
        share = weight / 2 if self.aggregation == "mean" else weight
        return share, share
