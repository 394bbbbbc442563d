"""Judging and fitting one linear classifier per class where images have several labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench.errors import DivergedError

POSITIVE_WEIGHT = 2.0
"""How much more an image of the class weighs than one without it (Goyal et al., ICCV 2019, and others)."""


def average_precision(scores: Tensor, positive: Tensor, *, monotone: bool = True) -> float:
    """Area under the precision-recall curve, in [0, 1].

    With precision made monotone from the right it is VOC's measure since 2010, at all recall points (that of 2007
    looks at 11); without it is scikit-learn's ``average_precision_score``. Images of equal score enter the curve
    together. NaN without a positive image.

    Args:
        scores: ``[N]``.
        positive: bool ``[N]``.
    """
    if not bool(scores.isfinite().all()):
        raise DivergedError("scores are not finite: the features or the classifier diverged")
    order = scores.argsort(descending=True)
    _, counts = torch.unique_consecutive(scores[order], return_counts=True)
    ends = counts.cumsum(0) - 1
    hits = positive[order].double().cumsum(0)[ends]
    precision = hits / (ends + 1)
    if monotone:
        precision = precision.flip(0).cummax(0).values.flip(0)
    gained = hits.diff(prepend=hits.new_zeros(1))
    return float((gained * precision).sum() / hits[-1])


def class_precisions(scores: Tensor, targets: Tensor, ignore_difficult: bool = True) -> list[float]:
    """Average precision of each class.

    Args:
        scores: ``[N,C]``.
        targets: ``[N,C]``: 1 present, 0 absent, -1 difficult.
        ignore_difficult: leave difficult images out; else they count as absent.
    """
    counted = targets >= 0 if ignore_difficult else torch.ones_like(targets, dtype=torch.bool)
    columns = zip(scores.T, targets.T == 1, counted.T, strict=True)
    return [average_precision(column[seen], positive[seen]) for column, positive, seen in columns]


def unit_inputs(features: Tensor) -> Tensor:
    """``[N,D]`` to rows of length one with a last column of ones, ``[N,D+1]``."""
    return F.pad(F.normalize(features, dim=1), (0, 1), value=1.0)


def signs_of(targets: Tensor) -> Tensor:
    """``[N,C]`` targets to ``[C,N]`` signs; difficult images are trained on as absent."""
    return torch.where(targets == 1, 1.0, -1.0).T.contiguous()


def shares_of(signs: Tensor) -> Tensor:
    """Weights of the images in the loss, of the same shape."""
    return torch.where(signs > 0, POSITIVE_WEIGHT, 1.0)
