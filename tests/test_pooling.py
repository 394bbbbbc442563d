"""Halving maps equals torch's average pooling to the bit, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslbench.nn.pooling import halve


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("side", [8, 9])
def test_halving_equals_average_pooling(channels: int, side: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    maps = torch.randn(4, channels, side, side).to(memory_format=layout).requires_grad_()
    found, expected = halve(maps), F.avg_pool2d(maps, 2)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    direction = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(found, maps, direction)
    (expected_gradient,) = torch.autograd.grad(expected, maps, direction)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.stride() == expected_gradient.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_as_they_are(dtype: torch.dtype) -> None:
    halved = halve(torch.ones(2, 8, 4, 4, dtype=dtype))
    assert halved.dtype == dtype
    assert torch.equal(halved, torch.ones(2, 8, 2, 2, dtype=dtype))


def test_autocast_does_not_round_what_torch_would_not() -> None:
    maps = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(halve(maps), F.avg_pool2d(maps, 2))
