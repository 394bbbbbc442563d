"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math

from sslbench.config.schema import OptimOptions


def peak_lr(options: OptimOptions, batch_size: int) -> float:
    """Learning rate after warm-up for a global batch of ``batch_size`` images, by ``lr_per`` and ``lr_rule``."""
    if options.lr_per is None:
        return options.lr
    if options.lr_rule == "sqrt":
        return options.lr * math.sqrt(batch_size / options.lr_per)
    return options.lr * batch_size / options.lr_per


def learning_rate(options: OptimOptions, *, peak: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step.

    Args:
        options: the schedule; ``advance`` says how time is counted.
        peak: rate at the end of warm-up, from :func:`peak_lr`.
        step: zero-based step.
        steps: length of the run.
        steps_per_epoch: steps in one epoch; ``warmup_epochs`` is measured in it.
    """
    warmup = options.warmup_epochs * steps_per_epoch
    now = _now(options, step, steps_per_epoch)
    if now <= warmup and step < warmup:
        return peak * _warmup(options, now, warmup)
    if options.schedule == "cosine":
        return peak * _cosine((now - warmup) / (steps - warmup), options.final_lr)
    if options.schedule == "step":
        return peak * options.gamma ** _milestones_passed(options, step, steps, steps_per_epoch)
    return peak


def weight_decay(options: OptimOptions, step: int, steps: int) -> float:
    """Weight decay of one optimiser step.

    Args:
        step: zero-based.
        steps: length of the run.
    """
    start, end = options.weight_decay, options.final_weight_decay
    return start if end is None else end + (start - end) * _cosine(step / steps, 0.0)


def _now(options: OptimOptions, step: int, steps_per_epoch: int) -> int:
    """How far the schedule has advanced, in steps."""
    if options.advance == "begun":
        return step + 1
    if options.advance == "elapsed":
        return step
    return step // steps_per_epoch * steps_per_epoch


def _milestones_passed(options: OptimOptions, step: int, steps: int, steps_per_epoch: int) -> int:
    """How often the rate has fallen; between epochs alone if time is counted in epochs."""
    if options.advance != "epoch":
        return sum(step / steps >= milestone for milestone in options.milestones)
    epochs = steps / steps_per_epoch
    falls = (max(1, math.floor(milestone * epochs + 1e-6)) for milestone in options.milestones)
    return sum(step // steps_per_epoch >= epoch for epoch in falls)


def _warmup(options: OptimOptions, now: int, warmup: float) -> float:
    """From ``warmup_from`` to 1. Counted in elapsed steps, the last one of the warm-up is at 1 already."""
    length = max(warmup - 1, 1) if options.advance == "elapsed" else warmup
    return options.warmup_from + (1 - options.warmup_from) * min(now / length, 1)


def _cosine(fraction: float, final: float) -> float:
    """From 1 at fraction 0 to ``final`` at fraction 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * fraction)) / 2
