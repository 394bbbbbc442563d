"""Collapse diagnostics with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sslbench.nn.spectrum import effective_rank, feature_std


def with_spectrum(values: list[float], rows: int, dim: int) -> Tensor:
    """Centred float64 features with these singular values."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(random - random.mean(0)).Q
    right = torch.linalg.qr(torch.randn(dim, len(values), generator=generator, dtype=torch.float64)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def entropy_rank(values: list[float]) -> float:
    shares = [v / sum(values) for v in values]
    return math.exp(-sum(p * math.log(p) for p in shares))


def test_std_of_isotropic_features_is_one():
    features = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(features).item() == pytest.approx(1, abs=5e-3)


def test_std_ignores_the_length_of_rows():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 8, generator=generator)
    lengths = torch.rand(500, 1, generator=generator) * 100 + 0.1
    torch.testing.assert_close(feature_std(features * lengths), feature_std(features), rtol=1e-6, atol=0)


def test_std_of_opposite_one_hot_rows():
    """Rows +-e1 of two dimensions: standard deviations 1 and 0, mean 1/2, times sqrt(2)."""
    features = torch.tensor([[3.0, 0.0], [-5.0, 0.0]])
    assert feature_std(features).item() == pytest.approx(math.sqrt(2) / 2)


@pytest.mark.parametrize("rows", [1, 7])
def test_equal_rows_have_no_spread_and_no_rank(rows):
    features = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).expand(rows, 12)
    assert feature_std(features).item() == pytest.approx(0, abs=1e-12)
    assert effective_rank(features).item() == 0


def test_rows_that_differ_by_rounding_count_as_equal():
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 64, generator=generator)
    noisy = row * (1 + 1e-8 * torch.randn(200, 64, generator=generator, dtype=torch.float64))
    assert effective_rank(noisy.float()).item() == 0


@pytest.mark.parametrize("shape", [(100, 20), (20, 100)])
@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [8.0, 4.0, 2.0, 1.0, 1e-3]])
def test_rank_of_a_known_spectrum(values, shape):
    features = with_spectrum(values, *shape)
    assert effective_rank(features).item() == pytest.approx(entropy_rank(values), rel=1e-9)
    assert effective_rank(features.float()).item() == pytest.approx(entropy_rank(values), rel=1e-4)


def test_rank_ignores_scale_and_offset():
    features = with_spectrum([3.0, 2.0, 1.0], 50, 10)
    expected = entropy_rank([3.0, 2.0, 1.0])
    assert effective_rank(1e-6 * features).item() == pytest.approx(expected)
    assert effective_rank(1e6 * features + 100.0).item() == pytest.approx(expected)
    assert effective_rank((features + 10.0).float()).item() == pytest.approx(expected, rel=1e-4)


def test_rank_agrees_with_a_singular_value_decomposition():
    features = torch.randn(300, 90, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, -4, 90)
    )
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    assert effective_rank(features).item() == pytest.approx(entropy_rank(values.tolist()), rel=1e-6)


def test_rank_of_white_features_is_almost_full():
    features = torch.randn(5_000, 64, generator=torch.Generator().manual_seed(0))
    assert 63.5 < effective_rank(features).item() <= 64


def test_features_that_are_not_finite_have_no_rank():
    features = torch.tensor([[1.0, 2.0], [float("inf"), 0.0], [3.0, 1.0]])
    assert math.isnan(effective_rank(features))


@pytest.mark.slow
def test_rank_at_the_largest_size():
    features = torch.randn(5_000, 2_048, generator=torch.Generator().manual_seed(0))
    features[:, 1_024:] = features[:, :1_024]
    assert 0.9 * 1_024 < effective_rank(features).item() <= 1_024 + 1e-3
