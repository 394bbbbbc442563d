"""Barlow Twins: the loss of the cross-correlation matrix, its invariances, and the rate of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from methods_kit import TinyBackbone, batch, make
from sslbench_plugins.methods.barlow import BarlowTwins, BarlowTwinsConfig, cross_correlation
from torch import Tensor

from sslbench.config.schema import OptimOptions
from sslbench.engine.optim import build_optimizer
from sslbench.errors import ConfigError
from sslbench.nn.decorrelation import off_diagonal_energy, standardized
from sslbench.plugin.api import Build

FIRST = [[1.0, 2.0, 0.0], [3.0, 0.0, 1.0], [5.0, 1.0, 1.0], [7.0, 5.0, 0.0]]
SECOND = [[2.0, 1.0, 1.0], [2.0, 0.0, 1.0], [6.0, 2.0, 0.0], [6.0, 3.0, 1.0]]
UNCORRELATED = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])


def loss(first: Tensor, second: Tensor, weight: float = 0.005) -> Tensor:
    correlation = cross_correlation(first, second)
    return (1 - correlation.diagonal()).square().sum() + weight * off_diagonal_energy(correlation)


def expected(first: Any, second: Any, weight: float) -> float:
    """Equations 1 and 2, entry by entry."""
    a, b = (np.asarray(view) - np.mean(view, axis=0) for view in (first, second))
    total = 0.0
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            c = (a[:, i] * b[:, j]).sum() / np.sqrt((a[:, i] ** 2).sum()) / np.sqrt((b[:, j] ** 2).sum())
            total += (1 - c) ** 2 if i == j else weight * c**2
    return float(total)


def test_worked_example() -> None:
    first, second = torch.tensor(FIRST), torch.tensor(SECOND)
    torch.testing.assert_close(cross_correlation(first, second)[0, 0], torch.tensor(2 / 5**0.5), rtol=1e-4, atol=0)
    assert float(loss(first, second)) == pytest.approx(2.532298, rel=1e-4)
    assert expected(FIRST, SECOND, 0.005) == pytest.approx(2.532298, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.0051, 1.0])
def test_equals_the_equations_entry_by_entry(weight: float) -> None:
    torch.manual_seed(0)
    first, second = 3 * torch.randn(16, 5) + 2, torch.randn(16, 5)
    found = float(loss(first, second, weight))
    assert found == pytest.approx(expected(first.numpy(), second.numpy(), weight), rel=1e-4)


def test_identical_uncorrelated_views_cost_nothing() -> None:
    assert float(loss(UNCORRELATED, UNCORRELATED, 1.0)) < 1e-8


def test_views_of_opposite_sign_cost_four_per_feature() -> None:
    assert float(loss(UNCORRELATED, -UNCORRELATED)) == pytest.approx(12, rel=1e-4)


def test_equal_features_cost_the_weight_of_every_pair() -> None:
    column = torch.randn(16, 1).expand(16, 4)
    assert float(loss(column, column, 0.5)) == pytest.approx(0.5 * 12, rel=1e-3)


def test_shift_and_scale_of_a_feature_do_not_matter() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(16, 4), torch.randn(16, 4)
    scale, shift = torch.tensor([0.5, 2.0, 7.0, 100.0]), torch.tensor([0.0, -3.0, 5.0, 1.0])
    torch.testing.assert_close(loss(first * scale + shift, second), loss(first, second), rtol=1e-3, atol=0)


def test_a_constant_feature_has_a_finite_gradient() -> None:
    first = torch.randn(8, 3)
    first[:, 0] = 1
    first.requires_grad_()
    value = loss(first, torch.randn(8, 3))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(first.grad).all()


def test_standardizing_is_batch_normalisation_without_scale_and_shift() -> None:
    rows = torch.randn(8, 5)
    torch.testing.assert_close(standardized(rows), torch.nn.BatchNorm1d(5, affine=False)(rows))


def test_loss_of_the_method_is_that_of_its_terms() -> None:
    found = make(BarlowTwins, redundancy=0.3, scale=0.5)(batch())
    torch.testing.assert_close(found["loss"], 0.5 * (found["invariance"] + 0.3 * found["redundancy"]))


def test_under_lars_the_scale_is_the_rate_of_vectors() -> None:
    """The published program's factor 0.024 with rate 0.2 is the paper's rate of 0.0048 for biases."""
    moved = []
    for scale in (1.0, 0.024):
        method = make(BarlowTwins, scale=scale)
        before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
        optimizer = build_optimizer(OptimOptions(name="lars", lr=0.2, weight_decay=0), None, method, 256)
        method(batch())["loss"].backward()
        optimizer.step()
        moved.append({name: parameter.detach() - before[name] for name, parameter in method.named_parameters()})
    for name, step in moved[0].items():
        factor = 1.0 if step.ndim > 1 else 0.024
        torch.testing.assert_close(moved[1][name], factor * step, rtol=1e-2, atol=1e-5)


def test_projector_of_the_paper() -> None:
    method = make(BarlowTwins, hidden=64, out_dim=32)
    shapes = [tuple(layer.weight.shape) for layer in method.projector if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(64, 16), (64, 64), (32, 64)]
    assert method.projector[-1].bias is None


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="one image"):
        BarlowTwins(BarlowTwinsConfig(), Build(TinyBackbone, 1, 100, 50, 10))
