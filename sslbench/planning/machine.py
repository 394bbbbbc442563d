"""The machine at hand as a device to plan for."""

from __future__ import annotations

import torch

from sslbench.cores import usable_cores
from sslbench.data.memory import free_host_memory
from sslbench.engine.layout import has_fast_bf16
from sslbench.planning.devices import KINDS, Device, this_cpu
from sslbench.planning.speed import DEFAULT_WORKERS


def find_device(kind: str | None) -> Device:
    """A kind by its name; None: what this machine has. An unknown accelerator is taken for an A100."""
    if kind in KINDS:
        return KINDS[kind]
    if kind is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        return next((device for key, device in KINDS.items() if key in name), KINDS["a100"])
    bf16 = has_fast_bf16(torch.device("cpu"))
    return this_cpu(torch.backends.cpu.get_cpu_capability(), usable_cores(), free_host_memory(), has_bf16=bf16)


def host_cores(device: Device) -> int:
    """Of the host for each device; of machines elsewhere as many as decoding workers use."""
    return usable_cores() if device.shares_host else DEFAULT_WORKERS
