"""How long a step takes: each operation by the slower of arithmetic and memory, then exchanges and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sslbench.planning.counting import Operation
from sslbench.planning.devices import Device
from sslbench.planning.rehearsal import Step
from sslbench.planning.subject import Subject

_HIDDEN = 0.5
"""Share of the backward pass in which gradients of later layers travel while earlier ones are computed."""
_DECODE, _PER_VIEW, _PER_PIXEL = 17e-9, 0.55e-3, 23e-9
"""Core seconds to make views from a JPEG: by its pixels, for each view, by the view's pixels. Fitted to decoding
photographs of 256x256 and 500x375 into 2x224 and 2x224 + 6x96 on a Zen 3 core, within 15 %."""
_VIEW_VALUE = 25e-9
"""Core seconds to crop and colour one value of a view of an image in memory; Zen 3, views of 32 pixels."""
_VIEW_PASSES = 60
"""How often an accelerator reads or writes each fp32 value of a view that it crops and colours."""
DEFAULT_WORKERS = 8


@dataclass(frozen=True)
class Pace:
    """Seconds of a step of one device, by what they are spent on."""

    arithmetic: float
    """In operations that multiply for longer than they move bytes."""
    traffic: float
    """In operations that wait for the device's memory."""
    asking: float
    """Of the host, to ask for all operations; the device computes beside it."""
    network: float
    """Exchanges that nothing hides."""
    making: float
    """Of the views of the next batch."""
    shared: bool
    """Whether they are made by the device's own cores, so after the rest and not beside it."""

    @property
    def launch(self) -> float:
        """What asking for operations takes beyond computing them."""
        return max(0.0, self.asking - self.arithmetic - self.traffic)

    @property
    def data(self) -> float:
        """Waiting for views."""
        beside = self.arithmetic + self.traffic + self.launch + self.network
        return self.making if self.shared else max(0.0, self.making - beside)

    @property
    def parts(self) -> dict[str, float]:
        """What the device does one after the other."""
        return {name: float(getattr(self, name)) for name in PARTS}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        """Of the step, in which a part is busy, also beside others."""
        busy = {"launch": self.asking, "data": self.making}
        return busy.get(part, float(getattr(self, part))) / self.seconds


@dataclass(frozen=True)
class Cores:
    """Of the host, for one device."""

    count: float
    """Busy with data."""
    shared: bool
    """Whether the device is the same cores."""


@dataclass(frozen=True)
class Load:
    """What a step asks of a device and of what is around it."""

    step: Step
    device: Device
    nodes: int
    making: float
    """Seconds to make the views of a batch."""
    shared: bool
    """Whether the device's own cores make them."""

    def pace(self) -> Pace:
        """Seconds of the step."""
        step, device = self.step, self.device
        computing = [_slower(operation, device) for operation in step.operations]
        arithmetic = sum(seconds for seconds, bound in computing if bound)
        traffic = sum(seconds for seconds, bound in computing if not bound)
        asking = sum(1 for operation in step.operations if operation.traffic) * device.launch
        backward = _backward_seconds(step.operations, device) if not device.shares_host else 0.0
        gradients = step.exchanges.seconds(device, self.nodes, of_gradients=True)
        others = step.exchanges.seconds(device, self.nodes, of_gradients=False)
        network = max(0.0, gradients - _HIDDEN * backward) + others
        return Pace(arithmetic, traffic, asking, network, self.making, self.shared)

    def limit(self) -> str:
        """The part of which half the time shortens the step most; none that runs beside something longer."""
        return min(PARTS, key=lambda part: _RELIEVED[part](self).pace().seconds)

    def at_speed(self, factor: float) -> Load:
        """On a device whose own work takes another time than its numbers say."""
        quicker = replace(self.device, practice=self.device.practice * factor, launch=self.device.launch / factor)
        return replace(self, device=quicker, making=self.making / factor if self.shared else self.making)


PARTS = ("arithmetic", "traffic", "launch", "network", "data")


def _with_device(load: Load, **changes: Any) -> Load:
    return replace(load, device=replace(load.device, **changes))


_RELIEVED: dict[str, Callable[[Load], Load]] = {
    "arithmetic": lambda load: _with_device(load, peaks={k: 2 * v for k, v in load.device.peaks.items()}),
    "traffic": lambda load: _with_device(load, bandwidth=2 * load.device.bandwidth),
    "launch": lambda load: _with_device(load, launch=load.device.launch / 2),
    "network": lambda load: _with_device(
        load, link=2 * load.device.link, network=2 * load.device.network, latency=load.device.latency / 2
    ),
    "data": lambda load: replace(load, making=load.making / 2),
}
"""The same step with half the time for one part."""


def load_of(step: Step, subject: Subject, device: Device, nodes: int, cores: Cores) -> Load:
    """One step of ``step.world`` devices on ``nodes`` nodes."""
    making = view_seconds(subject, device, cores) * step.rows
    return Load(step, device, nodes, making, cores.shared)


def view_seconds(subject: Subject, device: Device, cores: Cores) -> float:
    """To make the views of one image, on so many cores or on the device."""
    if not subject.same_size:
        height, width = subject.size
        spent = _DECODE * height * width + sum(_PER_VIEW + _PER_PIXEL * (v.size or 0) ** 2 for v in subject.views)
        return spent / cores.count
    if device.shares_host:
        return _VIEW_VALUE * 3 * subject.pixels / cores.count
    return _VIEW_PASSES * 4 * 3 * subject.pixels / (device.bandwidth * device.bandwidth_reached)


def _slower(operation: Operation, device: Device) -> tuple[float, bool]:
    """Seconds, and whether arithmetic decides about them."""
    moving = operation.traffic / (device.bandwidth * device.bandwidth_reached * device.practice)
    if operation.arithmetic == "none":
        return moving, False
    name = operation.arithmetic
    multiplying = operation.flops / (device.peaks[name] * device.reached[name] * device.practice)
    return max(moving, multiplying), multiplying >= moving


def _backward_seconds(operations: Sequence[Operation], device: Device) -> float:
    return sum(_slower(operation, device)[0] for operation in operations if operation.phase == "backward")
