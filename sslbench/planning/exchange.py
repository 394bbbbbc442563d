"""What a step sends to other ranks: which collectives, how many bytes, how long they take."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslbench.comm import Collective
from sslbench.planning.devices import Device

GRADIENTS = "gradients"
SHARDS = "sharded weights"
STATISTICS = "batch normalisation"
BACKWARD = "gradients of gathers"
COUNTS = "numbers of rows (host)"


class Exchange(NamedTuple):
    """One kind of collective, which a rank takes part in several times a step."""

    origin: str
    """Which part of the program asks for it."""
    kind: Collective
    payload: int
    """Bytes that each rank puts in, each time."""
    ranks: int
    """That take part."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends each time, around a ring; it receives as many."""
        if self.kind == "all_reduce":
            return 2 * (self.ranks - 1) / self.ranks * self.payload
        return float((self.ranks - 1) * self.payload) if self.kind == "all_gather" else float(self.payload)


@dataclass
class Exchanges:
    """All collectives of a step."""

    counts: Counter[Exchange]

    def note(self, kind: Collective, value: Tensor, world: int) -> None:
        """Count one that the program asks for now."""
        self.add(_origin(), kind, value.numel() * value.element_size(), world)

    def add(self, origin: str, kind: Collective, payload: int, ranks: int) -> None:
        if ranks > 1 and payload:
            self.counts[Exchange(origin, kind, payload, ranks)] += 1

    def sent_by_origin(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, largest first."""
        sums: Counter[str] = Counter()
        for exchange, times in self.counts.items():
            sums[exchange.origin] += times * exchange.sent  # type: ignore[assignment]
        return dict(sums.most_common())

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step."""
        return sum(self.sent_by_origin().values())

    @property
    def collectives(self) -> int:
        return sum(self.counts.values())

    def seconds(self, device: Device, nodes: int, *, of_gradients: bool) -> float:
        """How long a step's exchanges take, those of gradients or all others."""
        rate = device.link if nodes == 1 else device.network
        chosen = [(e, n) for e, n in self.counts.items() if (e.origin == GRADIENTS) == of_gradients]
        return sum(times * (device.latency + exchange.sent / rate) for exchange, times in chosen)


def watch_normalisation(method: nn.Module, ranks: int, exchanges: Exchanges) -> None:
    """Count what normalising over several ranks exchanges: mean, variance and count of each channel on the way
    forward, two sums of each channel on the way back."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, _BatchNorm)
        if module.training:
            exchanges.add(STATISTICS, "all_gather", 4 * (2 * module.num_features + 1), ranks)
            if output.requires_grad:
                output.register_hook(lambda grad: back(module.num_features))  # type: ignore[no-untyped-call]

    def back(channels: int) -> None:
        exchanges.add(STATISTICS, "all_reduce", 4 * 2 * channels, ranks)

    for module in method.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(hook)


def recorder(exchanges: Exchanges, world: int) -> Callable[[Collective, Tensor], None]:
    """What :func:`sslbench.comm.rehearsing` tells; tensors with values are sizes that the host asks for."""

    def note(kind: Collective, value: Tensor) -> None:
        exchanges.note(kind, value, world)

    return note


def _origin() -> str:
    """The module that asks for a collective; what autograd asks for has none."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name, function = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if function == "_row_counts":
            return COUNTS
        if name not in ("sslbench.comm", __name__):
            return BACKWARD if name.startswith("torch") else name.rpartition(".")[2].replace("_", " ")
        frame = frame.f_back
    return BACKWARD
