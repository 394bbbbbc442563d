"""Learning-rate schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from sslbench.config.schema import OptimOptions
from sslbench.engine.schedule import learning_rate, peak_lr


def rates(options: OptimOptions, steps: int, steps_per_epoch: int, peak: float = 1.0) -> list[float]:
    return [
        learning_rate(options, peak=peak, step=s, steps=steps, steps_per_epoch=steps_per_epoch)
        for s in range(steps)
    ]


def test_peak_is_linear_in_the_batch_only_when_asked():
    assert peak_lr(OptimOptions(lr=0.45, lr_per=256), 8192) == pytest.approx(14.4)
    assert peak_lr(OptimOptions(lr=0.2, lr_per=256), 8192) == pytest.approx(6.4)
    assert peak_lr(OptimOptions(lr=0.3), 8192) == 0.3


@pytest.mark.parametrize(
    ("iteration", "expected"), [(1, 0.0091720), (157, 1.44), (1570, 14.4), (15700, 7.794571), (31400, 0.0)]
)
def test_cosine_golden_values(iteration, expected):
    """200 epochs of 157 steps, 10 epochs of warm-up (the SCRL schedule at batch 8192)."""
    options = OptimOptions(warmup_epochs=10)
    value = learning_rate(options, peak=14.4, step=iteration - 1, steps=31400, steps_per_epoch=157)
    assert value == pytest.approx(expected, abs=5e-7)


def test_cosine_falls_to_its_final_fraction_without_a_jump():
    options = OptimOptions(warmup_epochs=2, final_lr=0.1)
    values = rates(options, steps=200, steps_per_epoch=10, peak=3.0)
    peak_at = 19
    assert values[peak_at] == max(values) == 3.0
    assert all(a < b for a, b in pairwise(values[: peak_at + 1]))
    assert all(a > b for a, b in pairwise(values[peak_at:]))
    assert values[-1] == pytest.approx(0.3)
    assert max(abs(a - b) for a, b in pairwise(values)) <= 3.0 / 20 + 1e-12


def test_cosine_without_warmup_starts_just_below_the_peak():
    assert rates(OptimOptions(), 100, 10)[0] == pytest.approx((1 + math.cos(math.pi / 100)) / 2)


def test_constant():
    assert rates(OptimOptions(schedule="constant"), 7, 3) == [1.0] * 7
    assert rates(OptimOptions(schedule="constant", warmup_epochs=1), 6, 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_step_changes_after_each_milestone():
    options = OptimOptions(schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    values = rates(options, 100, 10)
    assert values[:50] == [1.0] * 50
    assert values[50:75] == pytest.approx([0.1] * 25)
    assert values[75:] == pytest.approx([0.01] * 25)


@pytest.mark.parametrize(
    ("epochs", "falls"), [(25, (12, 18)), (50, (25, 37)), (199, (99, 149)), (200, (100, 150)), (300, (150, 225))]
)
def test_steps_by_epochs_fall_at_whole_epochs(epochs, falls):
    """Relational reasoning's supervised bound: x0.1 at int(0.5 T) and int(0.75 T)."""
    options = OptimOptions(schedule="step", milestones=(0.5, 0.75), gamma=0.1, advance="epoch")
    values = rates(options, 3 * epochs, 3)
    expected = [0.1 ** sum(epoch >= fall for fall in falls) for epoch in range(epochs) for _ in range(3)]
    assert values == pytest.approx(expected)


def test_steps_by_epochs_survive_rounding_and_short_runs():
    options = OptimOptions(schedule="step", milestones=(0.29,), gamma=0.1, advance="epoch")
    values = rates(options, 100, 1)  # 0.29 * 100 is a little less than 29
    assert (values[28], values[29]) == pytest.approx((1.0, 0.1))
    assert rates(options, 3, 10) == [1.0] * 3
    assert rates(options, 4, 2) == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_warmup_may_be_fractional():
    values = rates(OptimOptions(schedule="constant", warmup_epochs=0.5), 10, 5)
    assert values[:3] == pytest.approx([0.4, 0.8, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_warmup_longer_than_the_run(schedule):
    values = rates(OptimOptions(schedule=schedule, warmup_epochs=10), 20, 10)
    assert values == pytest.approx([(s + 1) / 100 for s in range(20)])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_one_step(schedule):
    assert math.isfinite(rates(OptimOptions(schedule=schedule), 1, 1)[0])


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 0.3), (1, 0.3014428), (3119, 4.8), (3120, 4.8), (312 * 205, 2.4024), (312 * 400 - 1, 0.0048)],
)
def test_swav_golden_values(iteration, expected):
    """SwAV, 400 epochs of 312 steps: 10 epochs from 0.3 to 4.8, then down to 0.0048."""
    options = OptimOptions(warmup_epochs=10, warmup_from=0.3 / 4.8, final_lr=0.001, advance="elapsed")
    value = learning_rate(options, peak=4.8, step=iteration, steps=400 * 312, steps_per_epoch=312)
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("iteration", "expected"), [(0, 0.6), (100 * 5004, 0.3003), (200 * 5004 - 1, 0.0006)])
def test_swav_golden_values_of_small_batches(iteration, expected):
    options = OptimOptions(final_lr=0.001, advance="elapsed")
    value = learning_rate(options, peak=0.6, step=iteration, steps=200 * 5004, steps_per_epoch=5004)
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0.3), (100, 0.15), (199, 1.85e-5)])
def test_moco_changes_the_rate_between_epochs_only(epoch, expected):
    """MoCo: 200 epochs of 462 steps at 0.3, cosine of whole epochs."""
    options = OptimOptions(advance="epoch")
    for step in (epoch * 462, epoch * 462 + 461):
        value = learning_rate(options, peak=0.3, step=step, steps=200 * 462, steps_per_epoch=462)
        assert value == pytest.approx(expected, rel=1e-3)


def test_warm_up_by_epochs_is_a_staircase():
    options = OptimOptions(schedule="constant", warmup_epochs=2, warmup_from=0.5, advance="epoch")
    assert rates(options, 6, 2) == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
