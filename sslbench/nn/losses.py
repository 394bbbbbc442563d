"""Losses of two-view methods, in fp32 whatever the autocast, and exact over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslbench import comm


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which operations on ``tensor``'s device keep the precision of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def byol_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the normalised rows, ``2 - 2 cos`` (BYOL, equation 2).

    Args:
        prediction: ``[N,D]``, with gradient.
        target: ``[N,D]``; its gradient is cut.

    Returns:
        fp32 ``[N]`` in [0, 4].
    """
    with no_autocast(prediction):
        return 2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, equation 1), averaged over both views of the global batch.

    The positive stays in the denominator, a row's similarity to itself does not; negatives come from all ranks.

    Args:
        first, second: ``[B,D]`` projections of the two views; row i of both shows the same image.
        temperature: divisor of the cosine similarities.

    Returns:
        fp32 scalar.
    """
    return comm.global_mean(-_log_probability_of_positive(first, second, temperature))


def nt_xent_log_of_mean(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent with the logarithm outside the mean: ``-log(mean_i p_i)``, p_i the positive's softmax probability.

    The variant of the SimCLR baseline in "Self-Supervised Relational Reasoning" (Patacchiola & Storkey, 2020).
    Arguments as :func:`nt_xent`.
    """
    probability = _log_probability_of_positive(first, second, temperature).exp()
    return -comm.global_mean(probability).log()


def _log_probability_of_positive(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """fp32 ``[2B]``: log softmax of each local row's positive among the other rows of the global batch."""
    with no_autocast(first):
        first, second = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
        pairs = comm.gather(torch.stack([first, second], dim=1))
        rows = torch.cat([first, second])
        logits = rows @ pairs.flatten(0, 1).T / temperature
        own = 2 * (comm.row_offset(first) + torch.arange(len(first), device=rows.device))
        itself = torch.cat([own, own + 1])[:, None]
        positive = torch.cat([own + 1, own])[:, None]
        others = logits.scatter(1, itself, -torch.inf)
        return (logits.gather(1, positive)).squeeze(1) - others.logsumexp(dim=1)
