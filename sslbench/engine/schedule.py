"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from sslbench.config.schema import OptimOptions


def peak_lr(options: OptimOptions, batch_size: int) -> float:
    """Learning rate after warm-up for a global batch of ``batch_size`` images (linear scaling by ``lr_per``)."""
    if options.lr_per is None:
        return options.lr
    return options.lr * batch_size / options.lr_per


def learning_rate(options: OptimOptions, *, peak: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step.

    Time is counted in steps begun, so the first step has the rate of 1/steps_per_epoch of an epoch (not zero) and
    the last one that of the end of the run.

    Args:
        options: the schedule.
        peak: rate at the end of warm-up, from :func:`peak_lr`.
        step: zero-based step.
        steps: length of the run.
        steps_per_epoch: steps in one epoch; ``warmup_epochs`` is measured in it.
    """
    begun = step + 1
    warmup = options.warmup_epochs * steps_per_epoch
    if begun <= warmup:
        return peak * begun / warmup
    if options.schedule == "cosine":
        return peak * _cosine((begun - warmup) / (steps - warmup), options.final_lr)
    if options.schedule == "step":
        passed = sum(step / steps >= milestone for milestone in options.milestones)
        return peak * options.gamma**passed
    return peak


def _cosine(fraction: float, final: float) -> float:
    """From 1 at fraction 0 to ``final`` at fraction 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * fraction)) / 2
