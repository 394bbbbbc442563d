"""Losses of a yes-or-no question, one per logit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslbench.nn.losses import no_autocast


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each logit.

    Args:
        logits: any shape.
        targets: of a shape that broadcasts to theirs; 1 for yes, 0 for no.

    Returns:
        fp32, of the shape of ``logits``.
    """
    with no_autocast(logits):
        return F.softplus(_against(logits, targets))


def binary_focal_loss(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float = 0.5) -> Tensor:
    """Binary cross-entropy that neglects what is right already: ``w * (1 - p_t)^gamma * BCE``.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5; p_t is the probability that the
    logit gives to its target.

    Args:
        logits, targets: as :func:`binary_cross_entropy`.
        gamma: strength of the neglect.
        alpha: the weight w of the target 1; that of the target 0 is ``1 - alpha``.

    Returns:
        fp32, of the shape of ``logits``.
    """
    with no_autocast(logits):
        against = _against(logits, targets)
        weight = torch.where(targets > 0, alpha, 1 - alpha)
        return weight * against.sigmoid().pow(gamma) * F.softplus(against)


def _against(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32: the log-odds of the wrong answer."""
    return logits.float() * (1 - 2 * targets.float())
