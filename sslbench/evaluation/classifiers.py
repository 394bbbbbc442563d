"""Classifiers on frozen features, and how their answers are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench import comm
from sslbench.data.loader import rank_share
from sslbench.plugin.api import FeatureRows, FeatureTable, LabelledRows

Normalize = Literal["none", "standardize", "l2"]
Rows = Tensor | FeatureRows
Labelled = FeatureTable | LabelledRows
QUERIES = 1024
"""Queries that go through a bank together when it is streamed."""


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes are placed before the right one: 0 is a top-1 hit, below 5 a top-5 hit.

    Equal scores are placed by class number, as ``argmax`` does. A right class whose score is not finite is
    never a hit: it comes last.

    Args:
        scores: ``[N,...,C]``.
        labels: int64 ``[N]``.

    Returns:
        int64 ``[N,...]``.
    """
    classes = scores.shape[-1]
    wanted = labels.view(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    own = scores.gather(-1, wanted)
    earlier = torch.arange(classes, device=scores.device) < wanted
    ranks = ((scores > own) | ((scores == own) & earlier)).sum(-1)
    return ranks.masked_fill(~own.squeeze(-1).isfinite(), classes)


def percent(hits: Tensor) -> Tensor:
    """Share of true values over the first axis, in percent: bool ``[N,...]`` to float64 ``[...]``."""
    return hits.sum(0).double() * (100.0 / len(hits))


@dataclass(frozen=True)
class FeatureScaling:
    """What happens to features before a linear classifier sees them."""

    kind: Normalize
    mean: Tensor
    """``[D]``; zero unless ``kind`` is ``standardize``."""
    std: Tensor
    """``[D]``; one unless ``kind`` is ``standardize``."""

    @classmethod
    def fit(cls, kind: Normalize, features: Rows) -> FeatureScaling:
        """Measure it on the training features ``[N,D]``. A constant feature keeps its scale.

        Of a table that is streamed each rank looks at its share: every rank must call it.
        """
        rows = FeatureRows.of(features)
        if kind == "standardize":
            mean, std = (rows.whole.mean(0), rows.whole.std(0, correction=0)) if rows.held else _moments(rows)
            return cls(kind, mean, torch.where(std > 1e-6, std, torch.ones_like(std)))
        zero = torch.zeros(rows.dim, device=rows.device)
        return cls(kind, zero, zero + 1)

    def __call__(self, features: Tensor) -> Tensor:
        """``[N,D]`` to ``[N,D]``."""
        if self.kind == "none":
            return features
        return F.normalize(features, dim=1) if self.kind == "l2" else (features - self.mean) / self.std


def _moments(rows: FeatureRows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[D]`` in one pass over the ranks' shares.

    Sums of differences from the first row in float64: they add up over chunks and ranks, and lose no digits where
    the mean is far from zero.
    """
    first = rows.take(torch.zeros(1, dtype=torch.int64)).double()
    sums = torch.zeros(2, rows.dim, dtype=torch.float64, device=rows.device)
    for chunk in rows.part(rank_share(len(rows), comm.rank(), comm.world())).chunks():
        difference = chunk.double() - first
        sums += torch.stack([difference.sum(0), difference.square().sum(0)])
    mean, square = comm.all_sum(sums) / len(rows)
    return (first[0] + mean).float(), (square - mean.square()).clamp_min(0).sqrt().float()


@dataclass(frozen=True)
class LinearHead:
    """A trained linear classifier with everything needed to apply it to raw features."""

    weight: Tensor
    """``[C,D]``"""
    bias: Tensor
    """``[C]``"""
    scaling: FeatureScaling

    def __call__(self, features: Tensor) -> Tensor:
        """``[N,D]`` features as the backbone gives them to logits ``[N,C]``."""
        return F.linear(self.scaling(features), self.weight, self.bias)

    def scores(self, table: Labelled) -> Tensor:
        """``[N,C]``, in chunks of images unless the table is held."""
        rows = FeatureRows.of(table.features)
        return self(rows.whole) if rows.held else torch.cat([self(chunk) for chunk in rows.chunks()])

    def top1(self, table: Labelled, chunk: int = 8192) -> float:
        """Accuracy in percent, computed in chunks of images."""
        rows = FeatureRows.of(table.features)
        size = chunk if rows.held else min(chunk, rows.chunk)
        pairs = zip(rows.chunks(size), torch.split(table.labels, size), strict=True)
        hits = torch.cat([label_ranks(self(features), labels) < 1 for features, labels in pairs])
        return float(percent(hits))

    def state(self) -> dict[str, Any]:
        """Plain tensors and values; :meth:`from_state` reads them."""
        scaling = {"normalize": self.scaling.kind, "mean": self.scaling.mean, "std": self.scaling.std}
        return {"weight": self.weight, "bias": self.bias, **scaling}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> LinearHead:
        """The head that :meth:`state` described."""
        mean, std = state["mean"].to(device), state["std"].to(device)
        scaling = FeatureScaling(state["normalize"], mean, std)
        return cls(state["weight"].to(device), state["bias"].to(device), scaling)


class Neighbours:
    """Exact nearest neighbours by cosine similarity in a bank of labelled features.

    Memory beyond the bank: a normalised copy of one that is held, else ``4 * (2 * 2^24 + budget)`` bytes.

    Args:
        features: ``[M,D]``, the bank.
        labels: int64 ``[M]``.
        classes: number of classes C.
        budget: how many similarities are held in memory at once.
    """

    def __init__(self, features: Rows, labels: Tensor, classes: int, budget: int = 1 << 25) -> None:
        self.bank = FeatureRows.of(features)
        self.labels = labels
        self.classes = classes
        self.rows = max(1, budget // len(self.bank)) if self.bank.held else QUERIES
        self._unit = F.normalize(self.bank.whole, dim=1) if self.bank.held else None
        self._at_once = min(self.bank.chunk, max(1, budget // self.rows))

    def search(self, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The k most similar rows, best first, in chunks of queries: similarities and labels ``[n,k]``."""
        for chunk in torch.split(queries, self.rows):
            similarity, rows = self._nearest(F.normalize(chunk, dim=1), min(k, len(self.bank)))
            yield similarity, self.labels[rows]

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarities and rows ``[n,k]``; of equal ones in different chunks the first."""
        if self._unit is not None:
            best = (queries @ self._unit.T).topk(k, dim=1)
            return best.values, best.indices
        start, found = 0, (queries.new_empty(len(queries), 0), self.labels.new_empty(len(queries), 0))
        for part in self.bank.chunks(self._at_once):
            similarity, rows = (queries @ F.normalize(part, dim=1).T).topk(min(k, len(part)), dim=1)
            similarity, rows = torch.cat([found[0], similarity], 1), torch.cat([found[1], rows + start], 1)
            order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
            found, start = (similarity.gather(1, order), rows.gather(1, order)), start + len(part)
        return found

    def votes(self, similarity: Tensor, labels: Tensor, temperature: float | None) -> Tensor:
        """Class scores ``[n,C]`` of neighbours ``[n,k]``; minus infinity for classes nobody votes for.

        A neighbour with similarity s weighs exp(s / temperature) (Wu et al., "Unsupervised Feature Learning via
        Non-Parametric Instance Discrimination", CVPR 2018, section 3.4), or 1 without a temperature.
        """
        # s - 1 instead of s: the same order of classes, and no overflow at low temperatures.
        weight = ((similarity - 1) / temperature).exp() if temperature else torch.ones_like(similarity)
        scores = similarity.new_zeros(len(similarity), self.classes).scatter_add_(1, labels, weight)
        return scores.masked_fill(scores == 0, -torch.inf)

    def ranks(self, queries: Rows, labels: Tensor, ks: tuple[int, ...], temperature: float | None) -> Tensor:
        """:func:`label_ranks` of the queries for each k: int64 ``[N,len(ks)]``.

        Ranks share the queries: every rank must call it, and gets all answers.
        """
        share = rank_share(len(labels), comm.rank(), comm.world())
        wanted = torch.split(labels[share.start : share.stop], self.rows) if len(share) else ()
        chunks = FeatureRows.of(queries).part(share).chunks(self.rows)
        parts = [self._ranks(*pair, ks, temperature) for pair in zip(chunks, wanted, strict=True)]
        return comm.gather(torch.cat(parts) if parts else labels.new_empty(0, len(ks)))

    def _ranks(self, queries: Tensor, labels: Tensor, ks: tuple[int, ...], temperature: float | None) -> Tensor:
        ((similarity, neighbours),) = self.search(queries, max(ks))
        scores = [self.votes(similarity[:, :k], neighbours[:, :k], temperature) for k in ks]
        return label_ranks(torch.stack(scores, dim=1), labels)


def ridge_head(features: Tensor, labels: Tensor, classes: int, strength: float = 1e-2) -> LinearHead:
    """The linear classifier of least squared error on one-hot targets, in closed form.

    Features are standardised, so ``strength`` (the ridge, per training row) means the same for every backbone.

    Args:
        features: ``[N,D]``.
        labels: int64 ``[N]``.
    """
    scaling = FeatureScaling.fit("standardize", features)
    inputs = scaling(features).double()
    targets = F.one_hot(labels, classes).double()
    bias = targets.mean(0)
    gram = inputs.T @ inputs
    gram.diagonal().add_(strength * len(inputs))
    weight = torch.linalg.solve(gram, inputs.T @ (targets - bias))
    return LinearHead(weight.T.float(), bias.float(), scaling)
