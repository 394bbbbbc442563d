"""Retrieval by cosine similarity: the whole gallery ranked for every query, exactly and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench import comm
from sslbench.data.loader import rank_share
from sslbench.errors import DivergedError
from sslbench.evaluation.classifiers import QUERIES, Rows
from sslbench.plugin.api import FeatureRows


@dataclass(frozen=True)
class Retrieved:
    """How well queries find images of their class; values of queries without such an image are NaN."""

    hits: Tensor
    """bool ``[N,K]``: whether one of the k nearest images is of the query's class, for each k."""
    precision: Tensor
    """float64 ``[N,K]``: the share of the k nearest that is."""
    average: Tensor
    """float64 ``[N]``: average precision over the whole gallery."""

    def mean(self) -> tuple[list[float], list[float], float]:
        """Recall and precision at each k and mean average precision, in percent, over queries with an answer."""
        answered = ~self.average.isnan()
        parts = (self.hits[answered].double(), self.precision[answered])
        recall, precision = ((100 * part.mean(0)).tolist() for part in parts)
        return recall, precision, float(100 * self.average[answered].mean())


class Gallery:
    """Labelled images among which queries look for their like.

    Images of equal similarity share the last of their ranks, as thresholds of one score do in a precision-recall
    curve. A gallery that is too large to be held passes through the device twice per block of queries: once for
    the similarities of the relevant images, once to count those that reach them. Memory then: ``12 * budget``
    bytes for similarities, those in order and ranks, and a chunk of the gallery, ``8 * 2^24`` bytes.

    Args:
        features: ``[M,D]``.
        labels: int64 ``[M]``.
        budget: how many similarities are held in memory at once.
    """

    def __init__(self, features: Rows, labels: Tensor, budget: int = 1 << 24) -> None:
        self.features = FeatureRows.of(features)
        self.labels = labels
        self.budget = budget
        self.rows = max(1, budget // len(labels)) if self.features.held else self._block()
        self._unit = F.normalize(self.features.whole, dim=1) if self.features.held else None

    def _block(self) -> int:
        """Queries that pass together: their relevant images' similarities must fit too."""
        largest = int(torch.unique(self.labels, return_counts=True)[1].max())
        return max(1, min(QUERIES, self.budget // largest))

    def retrieve(self, queries: Rows, labels: Tensor, ks: tuple[int, ...]) -> Retrieved:
        """Rank the gallery for every query. Ranks share the queries: every rank must call it.

        Args:
            queries: ``[N,D]``.
            labels: int64 ``[N]``.
            ks: numbers of nearest images, none above M.
        """
        rows = FeatureRows.of(queries)
        if not _finite(rows) or not _finite(self.features):
            raise DivergedError("features are not finite: their ranks mean nothing")
        share = rank_share(len(labels), comm.rank(), comm.world())
        own = self._retrieve(rows.part(share), labels[share.start : share.stop], ks)
        return Retrieved(comm.gather(own.hits), comm.gather(own.precision), comm.gather(own.average))

    def _retrieve(self, queries: FeatureRows, labels: Tensor, ks: tuple[int, ...]) -> Retrieved:
        count = len(labels)
        hits = torch.zeros(count, len(ks), dtype=torch.bool, device=labels.device)
        precision = torch.zeros(count, len(ks), dtype=torch.float64, device=labels.device)
        average = torch.full((count,), torch.nan, dtype=torch.float64, device=labels.device)
        for rows, relevant, ranks in self._ranked(queries, labels):
            hits[rows], precision[rows] = _at(ranks, ks)
            average[rows] = (_reaching(relevant, relevant).double() / ranks).mean(1)
        return Retrieved(hits, precision, average)

    def _ranked(self, queries: FeatureRows, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries ``[n]`` of one class that has images, their ascending similarities and their ranks ``[n,R]``."""
        if self._unit is None:
            for block in torch.split(labels.argsort(stable=True), self.rows) if len(labels) else ():
                yield from self._streamed(F.normalize(queries.take(block.cpu()), dim=1), block, labels[block])
            return
        for rows, members in self._chunks(labels):
            similarity = F.normalize(queries.take(rows.cpu()), dim=1) @ self._unit.T
            relevant = _sorted(similarity[:, members])
            yield rows, relevant, _reaching(_sorted(similarity), relevant)

    def _chunks(self, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Queries of one class and the gallery's images of that class, if there are any."""
        for label in torch.unique(labels):
            members = (self.labels == label).nonzero().flatten()
            if len(members):
                for rows in torch.split((labels == label).nonzero().flatten(), self.rows):
                    yield rows, members

    def _streamed(
        self, queries: Tensor, numbers: Tensor, labels: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same for a block of queries in the order of their classes."""
        classes, counts = torch.unique_consecutive(labels, return_counts=True)
        rows = torch.split(torch.arange(len(labels), device=labels.device), counts.tolist())
        parts: list[list[Tensor]] = [[] for _ in rows]
        for similarity, wanted in self._similarities(queries):
            for own, label, found in zip(rows, classes, parts, strict=True):
                found.append(similarity[own][:, wanted == label])
        relevant = [_sorted(torch.cat(found, 1)) for found in parts]
        ranks = [torch.zeros(part.shape, dtype=torch.int64, device=part.device) for part in relevant]
        for similarity, _ in self._similarities(queries):
            ascending = _sorted(similarity)
            for own, part, counted in zip(rows, relevant, ranks, strict=True):
                counted += _reaching(ascending[own].contiguous(), part)
        for own, part, counted in zip(rows, relevant, ranks, strict=True):
            if part.shape[1]:
                yield numbers[own], part, counted

    def _similarities(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of queries to chunks of the gallery, ``[n,m]``, with the chunks' labels: the same bits in every pass."""
        size = max(1, min(self.features.chunk, self.budget // len(queries)))
        for chunk, labels in zip(self.features.chunks(size), torch.split(self.labels, size), strict=True):
            yield queries @ F.normalize(chunk, dim=1).T, labels


def _finite(rows: FeatureRows) -> bool:
    return all(bool(chunk.isfinite().all()) for chunk in rows.chunks())


def _sorted(values: Tensor) -> Tensor:
    """Each row in ascending order. On a CPU numpy's vectorised sort takes a thirteenth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


def _reaching(ascending: Tensor, thresholds: Tensor) -> Tensor:
    """How many values of each row reach each threshold: ``[n,M]`` and ``[n,K]`` to int64 ``[n,K]``."""
    return ascending.shape[1] - torch.searchsorted(ascending, thresholds)


def _at(ranks: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of ranks ``[n,R]`` of relevant images: bool and float64 ``[n,K]``."""
    limits = torch.tensor(ks, device=ranks.device)
    within = (ranks[:, :, None] <= limits).sum(1)
    return within > 0, within.double() / limits
