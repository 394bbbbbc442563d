"""Time spent in the phases of a training step, by wrapping what a real run calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sslbench.engine.loop import Meter
from sslbench.engine.setup import Parts

PHASES = ("geometry", "crop", "colours", "forward", "backward", "optimiser", "after step", "meter", "rest")
Span = tuple[Any, Any]


class Stopwatch:
    """Sums the time of each phase over steps; on a GPU by events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[Span]] = defaultdict(list)

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
            ("backward", Tensor, "backward"),
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
        self._spans.clear()

    def milliseconds(self, steps: int, seconds: float) -> dict[str, float]:
        """Per step of a window; "rest" is what no phase covers, a GPU's idle time included."""
        spent = {phase: sum(map(self._length, spans)) / steps for phase, spans in self._spans.items()}
        spent["rest"] = max(0.0, 1000 * seconds / steps - sum(spent.values()))
        return {phase: spent.get(phase, 0.0) for phase in PHASES}

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            try:
                return function(*args, **kwargs)
            finally:
                self._spans[phase].append((start, self._mark()))

        return call

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _length(self, span: Span) -> float:
        """Milliseconds; the device has been waited for."""
        start, end = span
        return float(start.elapsed_time(end)) if self.device.type == "cuda" else 1000 * (end - start)
