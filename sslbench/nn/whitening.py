"""Whitening of features by their principal components."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_HELD = 1 << 26
"""Values up to which all rows are in memory in float64 at once: 512 MB."""


def whiten(features: Tensor, dims: int) -> Tensor:
    """The ``dims`` leading principal components of the rows ``[N,D]``, each with variance 1.

    Directions without variance, such as dead features, become 0.

    Memory beyond the features: ``4 * N * dims`` bytes for the result, ``24 * D^2`` for the covariance, and
    ``16`` bytes for each of at most 2^26 values in float64. The process that calls it needs all rows: this stays
    O(N) on one host.
    """
    at_once = max(1, _HELD // features.shape[1])
    parts = torch.split(features, at_once)
    mean = _total(part.double().sum(dim=0) for part in parts) / len(features)
    centred = (part.double() - mean for part in parts)
    covariance = _total(part.T @ part for part in centred) / (len(features) - 1)
    variance, directions = torch.linalg.eigh(covariance)
    variance, directions = variance[-dims:], directions[:, -dims:]
    scale = torch.where(variance > 1e-9 * variance[-1], variance, torch.inf).rsqrt()
    return torch.cat([Tensor.float((part.double() - mean) @ (directions * scale)) for part in parts])


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
