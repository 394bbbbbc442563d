"""Losses against a queue of keys: InfoNCE and its nearest-neighbour extension, row by row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class QueueContrast:
    """Compares queries with a queue. The large matrix of logits is computed once for all losses.

    Inputs are unit rows in fp32; call it outside autocast. Only the queries get a gradient.

    Args:
        queries: ``[M,D]``.
        queue: ``[K,D]``, the same state of the queue for every loss.
        temperature: divisor of the similarities.
    """

    def __init__(self, queries: Tensor, queue: Tensor, temperature: float) -> None:
        self._queries = queries / temperature
        self._queue = queue
        logits = self._queries @ queue.T
        self._log_total = logits.logsumexp(dim=1)
        self._highest = logits.detach().amax(dim=1)

    def info_nce(self, keys: Tensor) -> Tensor:
        """Cross-entropy of finding each query's key among it and the queue (MoCo, equation 1).

        Args:
            keys: ``[M,D]``, row i belongs to query i.

        Returns:
            ``[M]``
        """
        return F.softplus(self._log_total - self._similarity(keys))

    def neighbour_loss(self, slots: Tensor) -> Tensor:
        """Cross-entropy with several rows of the queue as positives of equal weight ("Revisiting Contrastive
        Methods for Unsupervised Learning of Visual Representations", Van Gansbeke et al., NeurIPS 2021).

        The softmax is over the queue alone, without the query's own key.

        Args:
            slots: int64 ``[M,k]``, rows of the queue, from :func:`nearest`.

        Returns:
            ``[M]``
        """
        # The mean of k logits is the logit of the mean row: no gather from, and no scatter into, [M,K].
        return self._log_total - self._similarity(self._queue[slots].mean(dim=1))

    def found(self, keys: Tensor) -> Tensor:
        """bool ``[M]``: whether the query's key is nearer than every row of the queue."""
        return self._similarity(keys).detach() > self._highest

    def _similarity(self, rows: Tensor) -> Tensor:
        return (self._queries * rows).sum(dim=1)


@torch.no_grad()
def nearest(features: Tensor, queue: Tensor, count: int, newest: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Slots of the most similar rows of a queue by cosine.

    Args:
        features: ``[M,D]``, of any length: that does not change the order.
        queue: ``[K,D]`` unit rows.
        count: how many slots per row.
        newest: slots ``[N]`` and rows ``[N,D]`` that replace those of the queue in this comparison.

    Returns:
        int64 ``[M,count]``, most similar first.
    """
    similarity = features @ queue.T
    if newest is not None:
        slots, rows = newest
        similarity[:, slots] = features @ rows.T
    return similarity.topk(count, dim=1).indices
