"""VICReg: its three terms against the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from methods_kit import TinyBackbone, batch, make
from sslbench_plugins.methods.vicreg import VICReg, VICRegConfig, vicreg_terms

from sslbench.errors import ConfigError
from sslbench.plugin.api import Build

FIRST = [[0.0, 0.0], [1.0, 0.5], [0.0, 0.5], [1.0, 1.0]]
SECOND = [[0.0, 1.0], [2.0, 0.5], [0.0, 0.0], [2.0, 1.0]]


def expected(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Equations 1 to 5, feature by feature; distance averaged over features, variance over views."""
    count, dim = first.shape
    variance = covariance = 0.0
    for view in (first, second):
        centred = view - view.mean(axis=0)
        for i in range(dim):
            spread = np.sqrt((centred[:, i] ** 2).sum() / (count - 1) + 1e-4)
            variance += max(0.0, 1 - spread) / dim / 2
            for j in range(dim):
                if i != j:
                    covariance += ((centred[:, i] * centred[:, j]).sum() / (count - 1)) ** 2 / dim
    distance = sum(((a - b) ** 2).sum() for a, b in zip(first, second, strict=True)) / count / dim
    return float(distance), float(variance), float(covariance)


def test_worked_example() -> None:
    terms = vicreg_terms(torch.tensor(FIRST), torch.tensor(SECOND))
    # Squared distances 1, 1, 0.25, 1 over 4 images and 2 features; variances 1/3, 1/6 and 4/3, 11/48;
    # covariances 1/6 and 1/6.
    assert [float(term) for term in terms] == pytest.approx([0.40625, 0.383844, 1 / 18], rel=1e-5)
    assert expected(np.array(FIRST), np.array(SECOND)) == pytest.approx((0.40625, 0.383844, 1 / 18), rel=1e-5)


def test_equals_the_equations_feature_by_feature() -> None:
    torch.manual_seed(0)
    first, second = 0.5 * torch.randn(12, 6) + 4, torch.randn(12, 6)
    found = [float(term) for term in vicreg_terms(first, second)]
    assert found == pytest.approx(expected(first.double().numpy(), second.double().numpy()), rel=1e-4)


def test_collapse_costs_the_whole_hinge_and_nothing_else() -> None:
    rows = torch.ones(8, 4, requires_grad=True)
    terms = vicreg_terms(rows, rows)
    assert [float(term.detach()) for term in terms] == pytest.approx([0, 0.99, 0])  # 1 - sqrt(1e-4)
    terms.variance.backward()
    assert torch.isfinite(rows.grad).all()


def test_spread_uncorrelated_identical_views_cost_nothing() -> None:
    rows = 2 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert [float(term) for term in vicreg_terms(rows, rows)] == pytest.approx([0, 0, 0])


def test_adding_a_constant_to_both_views_changes_nothing() -> None:
    first, second = torch.randn(8, 3), torch.randn(8, 3)
    for term, shifted in zip(vicreg_terms(first, second), vicreg_terms(first + 5, second + 5), strict=True):
        torch.testing.assert_close(term, shifted, rtol=1e-4, atol=1e-5)


def test_swapping_the_views_changes_nothing() -> None:
    first, second = torch.randn(8, 3), torch.randn(8, 3)
    for term, swapped in zip(vicreg_terms(first, second), vicreg_terms(second, first), strict=True):
        torch.testing.assert_close(term, swapped)


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    found = make(VICReg, invariance=3, variance=5, covariance=7)(batch())
    total = 3 * found["invariance"] + 5 * found["variance"] + 7 * found["covariance"]
    torch.testing.assert_close(found["loss"], total)
    options = VICRegConfig()
    assert (options.invariance, options.variance, options.covariance) == (25, 25, 1)


def test_expander_has_three_layers() -> None:
    method = make(VICReg, hidden=64, out_dim=32)
    shapes = [tuple(layer.weight.shape) for layer in method.expander if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(64, 16), (64, 64), (32, 64)]


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="one image"):
        VICReg(VICRegConfig(), Build(TinyBackbone, 1, 100, 50, 10))
