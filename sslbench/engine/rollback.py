"""Going back to the last good checkpoint, and on with a lower learning rate, when training has diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TAG = "sslbench.rolled_back"


@dataclass(frozen=True)
class Rollback:
    """One of them; all that a run has had are part of its state."""

    diverged_at: int
    to: int
    """Steps done in the checkpoint that was gone back to."""
    factor: float


class Rollbacks:
    """Those of a run, oldest first."""

    def __init__(self) -> None:
        self._all: list[Rollback] = []
        self._divergence: tuple[int, float] | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def factor(self) -> float:
        """What they multiply the learning rate by."""
        return math.prod(event.factor for event in self._all)

    def state(self) -> list[dict[str, Any]]:
        """Plain values."""
        return [asdict(event) for event in self._all]

    @property
    def before(self) -> int | None:
        """Checkpoints of fewer steps are good; None: all are, because training has not diverged."""
        return self._divergence[0] - 1 if self._divergence else None

    def diverged(self, step: int, factor: float) -> None:
        """Take note of one that the next :meth:`begin` completes."""
        self._divergence = (step, factor)

    def begin(self, known: Iterable[Mapping[str, Any]], done: int) -> None:
        """Training goes on from a checkpoint after ``done`` steps that knows of these roll-backs.

        A process that rolls back has had all of them itself, perhaps several to that checkpoint; a new process
        begins with those of the checkpoint, and meets the others again.
        """
        if self._divergence is None:
            self._all = [Rollback(int(k["diverged_at"]), int(k["to"]), float(k["factor"])) for k in known]
        else:
            step, factor = self._divergence
            self._all.append(Rollback(step, done, factor))
            self._divergence = None

    def described(self) -> str:
        """In words, for people who compare runs."""
        return "; ".join(f"step {e.diverged_at} to {e.to}, lr x {e.factor:g}" for e in self._all)
