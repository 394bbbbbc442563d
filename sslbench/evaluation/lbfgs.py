"""Many independent smooth convex problems minimised side by side by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From points ``[A,P]`` and the numbers ``[A]`` of their problems: values ``[A]`` and gradients ``[A,P]``."""

ARMIJO = 1e-4
HALVINGS = 25
ROUNDING = 1e-6
"""Relative error of a value in fp32: a step that changes it by less counts as no increase (Hager & Zhang, "A new
conjugate gradient method", SIAM J. Optim. 2005, section 4)."""


@dataclass(frozen=True)
class Minima:
    """Where G problems are least."""

    points: Tensor
    """``[G,P]``"""
    converged: Tensor
    """bool ``[G]``"""
    steps: int
    """Of the slowest problem."""


@dataclass
class _State:
    """The problems that are not solved yet."""

    numbers: Tensor
    point: Tensor
    value: Tensor
    gradient: Tensor
    goal: Tensor
    """Norm of the gradient at which a problem is solved."""
    pairs: list[tuple[Tensor, Tensor, Tensor]]
    """The last steps s, changes of the gradient y, both ``[A,P]``, and 1 / s'y, or 0 where a pair is of no use."""

    def keep(self, rows: Tensor) -> None:
        self.numbers, self.point, self.value = self.numbers[rows], self.point[rows], self.value[rows]
        self.gradient, self.goal = self.gradient[rows], self.goal[rows]
        self.pairs = [(s[rows], y[rows], rho[rows]) for s, y, rho in self.pairs]


@torch.no_grad()
def minimize(
    objective: Objective, start: Tensor, *, tolerance: float = 1e-4, max_steps: int = 1000, memory: int = 10
) -> Minima:
    """Minimise G convex functions at once. A problem that is solved costs nothing any more.

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithms 7.4 and 7.5. Steps are halved until they
    decrease the function enough; of a convex function every pair has s'y >= 0: no curvature condition is needed.

    Args:
        start: ``[G,P]``.
        tolerance: a problem is solved when its gradient's norm has fallen to this share of that at the start.
        max_steps: afterwards what has been reached is returned.
        memory: pairs that approximate the curvature.
    """
    numbers = torch.arange(len(start), device=start.device)
    value, gradient = objective(start, numbers)
    goal = tolerance * gradient.norm(dim=1)
    state = _State(numbers, start.clone(), value, gradient, goal, [])
    points, converged = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    steps = 0
    stuck = torch.zeros_like(numbers, dtype=torch.bool)
    while True:
        solved = state.gradient.norm(dim=1) <= state.goal
        finished = solved | stuck
        if bool(finished.any()):
            points[state.numbers[finished]] = state.point[finished]
            converged[state.numbers[solved]] = True
            state.keep(~finished)
        if len(state.numbers) == 0 or steps == max_steps:
            points[state.numbers] = state.point
            return Minima(points, converged, steps)
        stuck = _advance(objective, state, memory)
        steps += 1


def _advance(objective: Objective, state: _State, memory: int) -> Tensor:
    """One step of every problem; bool ``[A]``, where no step is small enough to decrease the function."""
    direction = -_times_inverse_curvature(state.gradient, state.pairs)
    slope = (direction * state.gradient).sum(1)
    uphill = ~(slope < 0)
    direction[uphill] = -state.gradient[uphill]
    slope = torch.where(uphill, -state.gradient.square().sum(1), slope)
    length = torch.ones_like(slope) if state.pairs else 1 / state.gradient.norm(dim=1).clamp_min(1)
    point, value, gradient, stuck = _line_search(objective, state, direction, slope, length)
    s, y = point - state.point, gradient - state.gradient
    product = (s * y).sum(1)
    useful = product > 1e-10 * y.square().sum(1)
    state.pairs = [*state.pairs[1 - memory :], (s, y, torch.where(useful, 1 / product, 0.0))]
    state.point, state.value, state.gradient = point, value, gradient
    return stuck


def _times_inverse_curvature(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The two loops: ``[A,P]`` to ``[A,P]``."""
    q, shares = gradient.clone(), []
    for s, y, rho in reversed(pairs):
        shares.append(rho * (s * q).sum(1))
        q.addcmul_(y, shares[-1][:, None], value=-1)
    if pairs:
        s, y, rho = pairs[-1]
        scale = torch.where(rho > 0, 1 / (rho * y.square().sum(1)), 1.0)
        q *= scale[:, None]
    for (s, y, rho), share in zip(pairs, reversed(shares), strict=True):
        q.addcmul_(s, (share - rho * (y * q).sum(1))[:, None])
    return q


def _line_search(
    objective: Objective, state: _State, direction: Tensor, slope: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, values and gradients after the step; bool ``[A]``: who could not make one and stays."""
    point, value, gradient = state.point.clone(), state.value.clone(), state.gradient.clone()
    trying = torch.arange(len(slope), device=slope.device)
    for _ in range(HALVINGS):
        there = state.point[trying] + length[trying, None] * direction[trying]
        found, gradients = objective(there, state.numbers[trying])
        allowed = state.value[trying] + ARMIJO * length[trying] * slope[trying]
        fine = found <= allowed + ROUNDING * state.value[trying].abs()
        rows = trying[fine]
        point[rows], value[rows], gradient[rows] = there[fine], found[fine], gradients[fine]
        trying = trying[~fine]
        if len(trying) == 0:
            break
        length = length / 2
    stuck = torch.zeros_like(slope, dtype=torch.bool)
    stuck[trying] = True
    return point, value, gradient, stuck
