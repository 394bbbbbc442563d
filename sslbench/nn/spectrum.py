"""How far a representation has collapsed: spread and effective rank of its features."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_RESOLUTION = torch.finfo(torch.float32).eps


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread of feature directions (Chen & He, "Exploring simple Siamese representation learning", section 4.1).

    The standard deviation of each dimension of the L2-normalised rows, averaged over dimensions, times sqrt(D).

    Args:
        features: ``[N,D]``.

    Returns:
        Scalar in float64: near 1 for directions spread evenly over the sphere, 0 if all are the same.
    """
    directions = F.normalize(features.double(), dim=1)
    return directions.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007) after centring.

    Args:
        features: ``[N,D]``.

    Returns:
        Scalar in float64 from 1 to min(N-1, D); 0 if all rows are equal, NaN if a feature is not finite.
    """
    if not features.isfinite().all():
        return features.new_tensor(float("nan"), dtype=torch.float64)
    values = _singular_values(features)
    total = values.sum()
    entropy = torch.special.entr(values / total.clamp_min(torch.finfo(values.dtype).tiny)).sum()
    rank: Tensor = entropy.exp() * (total > 0)
    return rank


def _singular_values(features: Tensor) -> Tensor:
    """Of the centred features, ``[min(N,D)]``; those below the resolution of float32 features are set to 0.

    They come from the smaller Gram matrix in float64, several times faster than a decomposition of the features;
    what squaring loses lies below that resolution.
    """
    features = features.double()
    centred = features - features.mean(dim=0)
    gram = centred.T @ centred if centred.shape[0] > centred.shape[1] else centred @ centred.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # Rows that differ by rounding only are equal; without this their noise would count as full rank.
    return torch.where(values > _RESOLUTION * features.norm(), values, 0.0)
