"""What a check of several ranks found, and the error that it raises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sslbench.errors import ExitCode, SslbenchError


@dataclass(frozen=True)
class Difference:
    """How far a quantity of several ranks is from that of one."""

    quantity: str
    """``start``, ``loss``, ``gradients``, ``parameters``, ``buffers`` or ``optimiser``."""
    relative: float
    """Largest difference of an entry, over the largest entry of its tensor."""
    tensor: str
    """Which tensor it is."""
    case: str
    """In which setting."""


@dataclass
class RankReport:
    """Of a method, the largest differences over all settings."""

    method: str
    world: int
    tolerance: float
    differences: list[Difference] = field(default_factory=list)
    """The largest one of each quantity."""
    identical: bool = True
    """Whether the ranks agree with each other to the bit, in everything."""
    cases: tuple[str, ...] = ()
    error: ConformanceError | None = None
    """What is wrong, if anything is."""

    def largest(self, quantity: str) -> Difference | None:
        """None: the method has nothing of the kind."""
        found = [each for each in self.differences if each.quantity == quantity]
        return max(found, key=lambda each: each.relative, default=None)

    def add(self, differences: Iterable[Difference]) -> None:
        """Keep the largest of each quantity."""
        everything = [*self.differences, *differences]
        quantities = list(dict.fromkeys(each.quantity for each in everything))
        self.differences = everything
        self.differences = [found for quantity in quantities if (found := self.largest(quantity))]

    def __str__(self) -> str:
        head = f"{self.method}: {self.world} ranks against 1, allowed {self.tolerance:g}"
        rows = [f"  {d.quantity:<11} {d.relative:.1e}  {d.tensor} ({d.case})" for d in self.differences]
        agree = "  ranks agree to the bit" if self.identical else "  ranks differ from each other"
        return "\n".join([head, *rows, agree])


class ConformanceError(SslbenchError, AssertionError):
    """A plugin breaks its contract: what is wrong, and in ``hint`` how to mend it."""

    exit_code = ExitCode.PLUGIN
    title = "Conformance error"

    def __init__(self, message: str, *, hint: str | None = None, report: RankReport | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report

    def __str__(self) -> str:
        parts: Sequence[object] = (self.message, self.hint and f"  Mend: {self.hint}", self.report)
        return "\n".join(str(part) for part in parts if part)
