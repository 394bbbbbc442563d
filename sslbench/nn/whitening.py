"""Whitening of features by their principal components."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(features: Tensor, dims: int) -> Tensor:
    """The ``dims`` leading principal components of the rows ``[N,D]``, each with variance 1.

    Directions without variance, such as dead features, become 0.
    """
    centred = features.double() - features.double().mean(dim=0)
    variance, directions = torch.linalg.eigh(centred.T @ centred / (len(centred) - 1))
    variance, directions = variance[-dims:], directions[:, -dims:]
    scale = torch.where(variance > 1e-9 * variance[-1], variance, torch.inf).rsqrt()
    return Tensor.float(centred @ (directions * scale))
