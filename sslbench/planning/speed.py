"""How long a step takes: each operation by the slower of arithmetic and memory, then exchanges and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    launch: float
    """What asking for operations takes beyond computing them."""
    network: float
    """Exchanges that nothing hides."""
    data: float
    """Waiting for views."""

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.traffic + self.launch + self.network + self.data

    @property
    def limit(self) -> str:
        """What takes longest: the field's name."""
        return max(vars(self), key=lambda name: float(getattr(self, name)))

    def scaled(self, factor: float, *, shared: bool) -> Pace:
        """With other seconds on the device itself; ``shared``: views are made by the same cores."""
        device = (self.arithmetic * factor, self.traffic * factor, self.launch * factor)
        return Pace(*device, self.network, self.data * factor if shared else self.data)


@dataclass(frozen=True)
class Cores:
    """Of the host, for one device."""

    count: float
    """Busy with data."""
    shared: bool
    """Whether the device is the same cores."""


def pace(step: Step, subject: Subject, device: Device, nodes: int, cores: Cores) -> Pace:
    """Seconds of one step of ``step.world`` devices on ``nodes`` nodes."""
    computing = [_slower(operation, device) for operation in step.operations]
    arithmetic = sum(seconds for seconds, bound in computing if bound)
    traffic = sum(seconds for seconds, bound in computing if not bound)
    asked = sum(1 for operation in step.operations if operation.traffic) * device.launch
    launch = max(0.0, asked - arithmetic - traffic)
    backward = _backward_seconds(step.operations, device) if not device.shares_host else 0.0
    gradients = step.exchanges.seconds(device, nodes, of_gradients=True)
    others = step.exchanges.seconds(device, nodes, of_gradients=False)
    network = max(0.0, gradients - _HIDDEN * backward) + others
    making = view_seconds(subject, device, cores) * step.rows
    beside = 0.0 if cores.shared else arithmetic + traffic + launch + network
    return Pace(arithmetic, traffic, launch, network, max(0.0, making - beside))


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
