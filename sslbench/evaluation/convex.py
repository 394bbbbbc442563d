"""Linear classifiers that minimise a convex loss: multinomial logistic regression and squared-hinge SVMs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench.evaluation.lbfgs import Objective, minimize

logger = logging.getLogger(__name__)

BUDGET = 1 << 20
"""Scores that are held at once: 4 MB, which stays in the cache of a core while it is worked on."""


def fit_logistic(
    inputs: Tensor, labels: Tensor, classes: int, strengths: Tensor, *, tolerance: float, max_steps: int
) -> Tensor:
    """Multinomial logistic regression for several strengths of L2 regularisation at once.

    Minimises mean cross-entropy + strength / 2 * |weights|^2; biases are not regularised. scikit-learn's
    ``LogisticRegression`` has the same minimum for C = 1 / (N * strength).

    Args:
        inputs: ``[N,D+1]``, the last column of ones.
        labels: int64 ``[N]``.
        strengths: ``[G]``.
        tolerance, max_steps: of :func:`sslbench.evaluation.lbfgs.minimize`.

    Returns:
        ``[G,C,D+1]``; the last column is the bias.
    """
    width = inputs.shape[1]

    def objective(flat: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        weight = flat.view(len(flat), classes, width)
        value, gradient = _cross_entropy(weight, inputs, labels)
        strength = strengths[numbers]
        ridge = weight.clone()
        ridge[..., -1] = 0
        value += strength / 2 * ridge.square().sum((1, 2))
        gradient.addcmul_(ridge, strength[:, None, None])
        return value, gradient.flatten(1)

    start = inputs.new_zeros(len(strengths), classes * width)
    return _solve(objective, start, tolerance, max_steps).view(-1, classes, width)


def _cross_entropy(weight: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``[G]`` of heads ``[G,C,D+1]`` and its gradient."""
    heads, classes = weight.shape[:2]
    value, gradient = inputs.new_zeros(heads), torch.zeros_like(weight)
    for rows, wanted in _chunks(inputs, labels, heads * classes):
        logits = (weight.flatten(0, 1) @ rows.T).view(heads, classes, -1)
        place = wanted.expand(heads, 1, -1)
        value += (logits.logsumexp(1) - logits.gather(1, place).squeeze(1)).sum(1)
        slope = logits.softmax(1)
        slope.scatter_add_(1, place, slope.new_full((1, 1, 1), -1.0).expand_as(place))
        gradient += (slope.flatten(0, 1) @ rows).view_as(weight)
    return value / len(inputs), gradient / len(inputs)


def fit_svms(
    inputs: Tensor, signs: Tensor, shares: Tensor, costs: Tensor, *, tolerance: float, max_steps: int
) -> Tensor:
    """Linear support vector machines with squared hinge loss, several at once.

    Minimises |w|^2 / 2 + cost * sum over images of share * max(0, 1 - sign * score)^2, where w includes the bias:
    what scikit-learn's ``LinearSVC`` minimises with its defaults.

    Args:
        inputs: ``[N,D+1]``, the last column of ones.
        signs: ``[G,N]``: 1 or -1.
        shares: ``[G,N]``: weight of each image, 0 for images that a machine does not see.
        costs: ``[G]``.

    Returns:
        ``[G,D+1]``; the last column is the bias.
    """

    def objective(weight: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = weight.square().sum(1) / 2, weight.clone()
        step = max(1, BUDGET // len(weight))
        for begin in range(0, len(inputs), step):
            rows = slice(begin, begin + step)
            sign, share = signs[numbers, rows], shares[numbers, rows] * costs[numbers, None]
            lacking = F.relu(1 - sign * (weight @ inputs[rows].T))
            pull = share * lacking
            value += (pull * lacking).sum(1)
            gradient -= 2 * (pull * sign) @ inputs[rows]
        return value, gradient

    return _solve(objective, inputs.new_zeros(len(costs), inputs.shape[1]), tolerance, max_steps)


def _solve(objective: Objective, start: Tensor, tolerance: float, max_steps: int) -> Tensor:
    minima = minimize(objective, start, tolerance=tolerance, max_steps=max_steps)
    late = int((~minima.converged).sum())
    if late:
        logger.info("%d of %d classifiers had not settled after %d steps", late, len(start), minima.steps)
    return minima.points


def _chunks(inputs: Tensor, labels: Tensor, outputs: int) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, BUDGET // outputs)
    return list(zip(torch.split(inputs, rows), torch.split(labels, rows), strict=True))
