"""Sinkhorn codes against worked values, and the properties they must have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslbench.nn.sinkhorn import SMALLEST_EPSILON, hard_codes, sinkhorn

SCORES = torch.tensor(
    [
        [0.9, 0.1, -0.2, 0.0],
        [0.8, 0.3, 0.1, -0.4],
        [0.85, 0.2, 0.0, 0.1],
        [0.7, 0.75, -0.1, 0.2],
        [0.1, 0.2, 0.3, 0.4],
        [-0.5, 0.6, 0.05, 0.0],
    ]
)
CODES = torch.tensor(
    [
        [0.990472, 0.000007, 0.000544, 0.008976],
        [0.378559, 0.001146, 0.620286, 0.000009],
        [0.791295, 0.000119, 0.064553, 0.144033],
        [0.004773, 0.865223, 0.001058, 0.128945],
        [0.000000, 0.000001, 0.309477, 0.690522],
        [0.000000, 0.645846, 0.318746, 0.035409],
    ]
)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_worked_example() -> None:
    codes = sinkhorn(SCORES, 0.05, 3)
    assert_close(codes, CODES)
    torch.testing.assert_close(codes.sum(0), torch.tensor([2.165, 1.512, 1.315, 1.008]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("epsilon", "iterations", "second"),
    [(0.05, 1, [0.832191, 0.001100, 0.166709, 0.000001]), (0.03, 3, [0.546079, 0.000013, 0.453908, 0.0])],
)
def test_worked_rows(epsilon, iterations, second) -> None:
    assert_close(sinkhorn(SCORES, epsilon, iterations)[1], torch.tensor(second))


@pytest.mark.parametrize("constant", [-3.0, 5.0])
def test_a_constant_changes_nothing(constant) -> None:
    assert_close(sinkhorn(SCORES + constant, 0.05, 3), CODES)


@pytest.mark.parametrize("epsilon", [0.001, 0.005, 0.02, 0.05, 1.0])
def test_every_row_sums_to_one_at_any_sharpness(epsilon) -> None:
    torch.testing.assert_close(sinkhorn(SCORES, epsilon, 3).sum(1), torch.ones(6))


def test_equal_scores_give_equal_codes() -> None:
    torch.testing.assert_close(sinkhorn(torch.full((5, 8), 0.7), 0.05, 3), torch.full((5, 8), 1 / 8))


def test_enough_rounds_balance_the_prototypes() -> None:
    balanced = sinkhorn(SCORES.double(), 0.05, 200)
    assert balanced.dtype == torch.float64
    torch.testing.assert_close(balanced.sum(0), torch.full((4,), 1.5, dtype=torch.float64), rtol=0, atol=1e-3)


def test_tolerance_stops_early_but_not_too_early() -> None:
    early = sinkhorn(SCORES, 0.05, 10_000, tolerance=0.1)
    deviation = (early.sum(0) / 1.5 - 1).abs().sum()
    assert 0.01 < deviation <= 0.1
    assert_close(sinkhorn(SCORES, 0.05, 3, tolerance=0.0), CODES)


def test_no_gradient_and_fp32_inside_autocast() -> None:
    scores = SCORES.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores, 0.05, 3)
    assert not codes.requires_grad
    assert codes.dtype == torch.float32
    assert_close(codes, CODES)
    assert sinkhorn(SCORES.bfloat16(), 0.05, 3).dtype == torch.float32


def test_hard_codes_mark_the_largest() -> None:
    hard = hard_codes(CODES)
    assert hard.dtype == CODES.dtype
    assert torch.equal(hard.argmax(1), CODES.argmax(1))
    assert torch.equal(hard.sum(1), torch.ones(6))


class Copies(TorchDispatchMode):
    """Bytes of the full-size tensors that operations make."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.made = entries, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.entries and not operation._schema.is_mutable:
            self.made += result.numel() * result.element_size()
        return result


@pytest.mark.parametrize(("epsilon", "bytes_per_entry"), [(0.05, 4), (0.01, 8 + 4)])
def test_scores_of_a_whole_data_set_are_copied_once(epsilon, bytes_per_entry) -> None:
    """In float64, and once more as the fp32 result."""
    scores = torch.rand(64, 10)
    with Copies(scores.numel()) as copies:
        sinkhorn(scores, epsilon, 3)
    assert copies.made == bytes_per_entry * scores.numel()


def test_scores_stay_as_they_are() -> None:
    for scores in (SCORES.clone(), SCORES.double()):
        before = scores.clone()
        sinkhorn(scores, 0.05, 3)
        assert torch.equal(scores, before)


def test_no_code_is_lost_at_the_smallest_epsilon() -> None:
    """Not even that of a sample opposite to all prototypes."""
    scores = torch.tensor([[1.0, 0.9], [-1.0, -0.999]])
    codes = sinkhorn(scores, SMALLEST_EPSILON, 3)
    torch.testing.assert_close(codes.sum(1), torch.ones(2))
