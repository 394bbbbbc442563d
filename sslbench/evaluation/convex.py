"""Linear classifiers that minimise a convex loss: multinomial logistic regression and squared-hinge SVMs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench import comm
from sslbench.data.loader import rank_share
from sslbench.evaluation.classifiers import FeatureScaling, Labelled
from sslbench.evaluation.lbfgs import Objective, minimize
from sslbench.evaluation.multilabel import unit_inputs
from sslbench.plugin.api import FeatureRows

logger = logging.getLogger(__name__)

BUDGET = 1 << 20
"""Scores that are held at once: 4 MB, which stays in the cache of a core while it is worked on."""


class Inputs:
    """Scaled features with a last column of ones, ``[N,D+1]``, of which each rank works on its share.

    Scaled once if the table is held, else chunk by chunk in every pass.
    """

    def __init__(self, table: Labelled, scaling: FeatureScaling) -> None:
        features = FeatureRows.of(table.features)
        share = rank_share(len(features), comm.rank(), comm.world())
        self.total = len(features)
        self.width = features.dim + 1
        self.labels = table.labels[share.start : share.stop]
        self._features, self._scaling = features.part(share), scaling
        held = features.held and len(share)
        self._held = self._inputs(features.whole[share.start : share.stop]) if held else None

    @property
    def device(self) -> torch.device:
        """Where inputs come to."""
        return self.labels.device

    def _inputs(self, features: Tensor) -> Tensor:
        return F.pad(self._scaling(features), (0, 1), value=1.0)

    def chunks(self, outputs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's inputs ``[n,D+1]`` and labels ``[n]``, so many that ``outputs`` scores for each can be
        held."""
        if self._held is not None:
            yield from _chunks(self._held, self.labels, outputs)
            return
        for features, labels in zip(self._features.chunks(), self._split_labels(), strict=True):
            yield from _chunks(self._inputs(features), labels, outputs)

    def _split_labels(self) -> tuple[Tensor, ...]:
        return torch.split(self.labels, self._features.chunk) if len(self.labels) else ()

    def sum(self, value: Tensor) -> Tensor:
        """Over all rows, from the sum over this rank's."""
        return comm.all_sum(value)


class LocalInputs(Inputs):
    """Inputs ``[N,D+1]`` that this rank alone works on."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.total, self.width = inputs.shape
        self.labels = labels
        self._held = inputs

    def sum(self, value: Tensor) -> Tensor:
        return value


def fit_logistic(
    inputs: Tensor, labels: Tensor, classes: int, strengths: Tensor, *, tolerance: float, max_steps: int
) -> Tensor:
    """:func:`solve_logistic` for inputs ``[N,D+1]`` and labels ``[N]`` that this rank alone works on."""
    own = LocalInputs(inputs, labels)
    return solve_logistic(own, classes, strengths, tolerance=tolerance, max_steps=max_steps)


def solve_logistic(inputs: Inputs, classes: int, strengths: Tensor, *, tolerance: float, max_steps: int) -> Tensor:
    """Multinomial logistic regression for several strengths of L2 regularisation at once.

    Minimises mean cross-entropy + strength / 2 * |weights|^2; biases are not regularised. scikit-learn's
    ``LogisticRegression`` has the same minimum for C = 1 / (N * strength). Of :class:`Inputs` each rank sums
    over its share of the rows: every rank must call it, and gets the same.

    Args:
        strengths: ``[G]``.
        tolerance, max_steps: of :func:`sslbench.evaluation.lbfgs.minimize`.

    Returns:
        ``[G,C,D+1]``; the last column is the bias.
    """
    width = inputs.width

    def objective(flat: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        weight = flat.view(len(flat), classes, width)
        value, gradient = _cross_entropy(weight, inputs)
        strength = strengths[numbers]
        ridge = weight.clone()
        ridge[..., -1] = 0
        value += strength / 2 * ridge.square().sum((1, 2))
        gradient.addcmul_(ridge, strength[:, None, None])
        return value, gradient.flatten(1)

    start = torch.zeros(len(strengths), classes * width, device=inputs.device)
    return _solve(objective, start, tolerance, max_steps).view(-1, classes, width)


def _cross_entropy(weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``[G]`` of heads ``[G,C,D+1]`` and its gradient."""
    heads, classes = weight.shape[:2]
    value, gradient = weight.new_zeros(heads), torch.zeros_like(weight)
    for rows, wanted in inputs.chunks(heads * classes):
        logits = (weight.flatten(0, 1) @ rows.T).view(heads, classes, -1)
        place = wanted.expand(heads, 1, -1)
        value += (logits.logsumexp(1) - logits.gather(1, place).squeeze(1)).sum(1)
        slope = logits.softmax(1)
        slope.scatter_add_(1, place, slope.new_full((1, 1, 1), -1.0).expand_as(place))
        gradient += (slope.flatten(0, 1) @ rows).view_as(weight)
    return inputs.sum(value) / inputs.total, inputs.sum(gradient) / inputs.total


def fit_svms(
    inputs: Tensor | FeatureRows, signs: Tensor, shares: Tensor, costs: Tensor, *, tolerance: float, max_steps: int
) -> Tensor:
    """Linear support vector machines with squared hinge loss, several at once.

    Minimises |w|^2 / 2 + cost * sum over images of share * max(0, 1 - sign * score)^2, where w includes the bias:
    what scikit-learn's ``LinearSVC`` minimises with its defaults.

    Args:
        inputs: ``[N,D+1]``, the last column of ones; or features ``[N,D]`` that are streamed, see
            :func:`unit_chunks`.
        signs: ``[G,N]``: 1 or -1.
        shares: ``[G,N]``: weight of each image, 0 for images that a machine does not see.
        costs: ``[G]``; G may be 0.

    Returns:
        ``[G,D+1]``; the last column is the bias.
    """

    def objective(weight: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = weight.square().sum(1) / 2, weight.clone()
        begin = 0
        for part in unit_chunks(inputs, max(1, BUDGET // len(weight))):
            rows = slice(begin, begin := begin + len(part))
            sign, share = signs[numbers, rows], shares[numbers, rows] * costs[numbers, None]
            lacking = F.relu(1 - sign * (weight @ part.T))
            pull = share * lacking
            value += (pull * lacking).sum(1)
            gradient -= 2 * (pull * sign) @ part
        return value, gradient

    width = inputs.dim + 1 if isinstance(inputs, FeatureRows) else inputs.shape[1]
    start = torch.zeros(len(costs), width, device=costs.device)
    return _solve(objective, start, tolerance, max_steps) if len(costs) else start


def unit_chunks(inputs: Tensor | FeatureRows, size: int) -> Iterator[Tensor]:
    """Inputs ``[n,D+1]``; features that are streamed get length one and a column of ones on the way."""
    if isinstance(inputs, Tensor):
        yield from torch.split(inputs, size)
        return
    for features in inputs.chunks():
        yield from torch.split(unit_inputs(features), size)


def _solve(objective: Objective, start: Tensor, tolerance: float, max_steps: int) -> Tensor:
    minima = minimize(objective, start, tolerance=tolerance, max_steps=max_steps)
    late = int((~minima.converged).sum())
    if late:
        logger.info("%d of %d classifiers had not settled after %d steps", late, len(start), minima.steps)
    return minima.points


def _chunks(inputs: Tensor, labels: Tensor, outputs: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, BUDGET // outputs)
    return zip(torch.split(inputs, rows), torch.split(labels, rows), strict=True)
