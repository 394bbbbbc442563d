"""Time spent in the phases of a training step, by wrapping what a real run calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from sslbench.engine.loop import Meter
from sslbench.engine.setup import Parts
from sslbench.engine.update import Update

PHASES = ("geometry", "crop", "colours", "forward", "backward", "optimiser", "after step", "meter", "rest")
Span = tuple[Any, Any]


class Stopwatch:
    """Sums the time of each phase over steps: wall time of this process, on a GPU also the device's, by events.

    Batches are made beside the step before (on a GPU in a stream, on several CPU cores in a thread), so phases
    overlap and may add up to more than a step. A GPU's host runs ahead of it until it waits for it in the meter.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, list[Span]] = defaultdict(list)
        self._device: dict[str, list[Span]] = defaultdict(list)

    @contextmanager
    def watching(self, parts: Parts, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Time what the loop calls, for the length of the block."""
        assert parts.loader is not None
        views, method = parts.loader.views, parts.method
        calls: list[tuple[str, Any, str]] = [
            ("geometry", views, "geometry"),
            ("crop", views, "crop"),
            ("colours", views, "finish"),
            ("forward", method, "forward"),
            ("backward", Update, "backward"),
            ("optimiser", optimizer, "step"),
            ("optimiser", optimizer, "zero_grad"),
            ("after step", method, "after_step"),
            ("meter", Meter, "add"),
            ("meter", Meter, "flush"),
        ]
        with ExitStack() as stack:
            for phase, owner, name in calls:
                stack.enter_context(patch.object(owner, name, self._timed(phase, getattr(owner, name))))
            yield

    def restart(self) -> None:
        self._host.clear()
        self._device.clear()

    def phases(self, steps: int, seconds: float) -> dict[str, dict[str, float]]:
        """Milliseconds per step of a window; "rest" is what no phase covers. The device has been waited for."""
        step = 1000 * seconds / steps
        host = {phase: sum(1000 * (end - start) for start, end in spans) for phase, spans in self._host.items()}
        if self.device.type != "cuda":
            return {"milliseconds": _per_step(host, steps, step)}
        device = {phase: sum(a.elapsed_time(b) for a, b in spans) for phase, spans in self._device.items()}
        return {"milliseconds": _per_step(device, steps, step), "host": _per_step(host, steps, step)}

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start, first = time.perf_counter(), self._event()
            try:
                return function(*args, **kwargs)
            finally:
                self._device[phase].append((first, self._event()))
                self._host[phase].append((start, time.perf_counter()))

        return call

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _per_step(spent: dict[str, float], steps: int, step: float) -> dict[str, float]:
    shares = {phase: spent.get(phase, 0.0) / steps for phase in PHASES}
    return shares | {"rest": max(0.0, step - sum(shares.values()))}
