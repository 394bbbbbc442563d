"""What a person sees of a run: messages and one progress line on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from sslbench.screen import Screen

_SHOWN = ("train/loss", "train/top1", "train/lr", "perf/images_per_second", "perf/data_wait_share")


class Console:
    """Messages and progress on stderr; a bar on a terminal, else about one line per tenth of the run."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.rich = Screen(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task: Any = None
        self._lines: tuple[int, int, int] | None = None

    def info(self, message: str) -> None:
        self.rich.print(message, soft_wrap=True)

    def warn(self, message: str) -> None:
        self.rich.print(Text.assemble(("Warning:", "yellow"), f" {message}"), soft_wrap=True)

    def begin(self, title: str, start: int, total: int) -> None:
        """Start showing progress over steps ``start`` to ``total``."""
        self._eta = _Eta(start, total)
        if self.rich.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                console=self.rich,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=start, line="")
        else:
            self._lines = (start, total, start)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        line = f"{_format(metrics)}  eta {self._eta.at(step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        elif self._lines is not None:
            start, total, last = self._lines
            if step >= total or step - last >= max(1, (total - start) // 10):
                self._lines = (start, total, step)
                self.info(f"  step {step}/{total}  {line}")

    def end(self) -> None:
        """Stop showing progress."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._lines = None


class _Eta:
    """Time left at the rate of the last lines: the first steps of a run are no measure of the others."""

    def __init__(self, start: int, total: int) -> None:
        self.total = total
        self.last = (start, time.monotonic())
        self.rate: float | None = None

    def at(self, step: int) -> str:
        before, then = self.last
        now = time.monotonic()
        if step > before:
            rate = (now - then) / (step - before)
            self.rate = rate if self.rate is None else 0.7 * self.rate + 0.3 * rate
            self.last = (step, now)
        minutes, rest = divmod(round((self.rate or 0.0) * (self.total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _format(metrics: Mapping[str, float]) -> str:
    words = {
        "train/loss": lambda v: f"loss {v:.4f}",
        "train/top1": lambda v: f"top1 {v:.1f} %",
        "train/lr": lambda v: f"lr {v:.3g}",
        "perf/images_per_second": lambda v: f"{v:,.0f} images/s",
        "perf/data_wait_share": lambda v: f"data wait {100 * v:.0f} %",
    }
    return "  ".join(words[key](metrics[key]) for key in _SHOWN if key in metrics)
