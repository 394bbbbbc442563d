"""Devices to plan for: published peak numbers, the share of them that training reaches, how they are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sslbench.errors import ConfigError

GB = 1e9


@dataclass(frozen=True)
class Device:
    """One kind of device. Rates are per second, sizes in bytes, links in bytes per second and direction."""

    name: str
    memory: float
    peaks: Mapping[str, float]
    """FLOP/s of matrix products (``matmul``) and convolutions in single precision, and of both with 16-bit numbers
    (``half``)."""
    reached: Mapping[str, float]
    """The share of each peak that training reaches."""
    bandwidth: float
    """Of its memory."""
    bandwidth_reached: float
    """May exceed 1: caches and fused kernels spare some of the traffic that is counted."""
    link: float
    """To the other devices of its node."""
    network: float
    """To devices of other nodes, its share of the node's."""
    per_node: int
    launch: float
    """Seconds of the host for each operation, which it asks for while the device computes."""
    latency: float
    """Seconds until a collective of no bytes has gone through."""
    reserved: float
    """Memory that is taken before anything is allocated."""
    slack: float
    """What an allocator holds beyond what is alive at the peak, and workspaces, as a fraction of it."""
    has_bf16: bool
    practice: float = 1.0
    """The share of a vendor's tuned speed that programs of researchers reach."""
    shares_host: bool = False
    """Whether devices of a node are processes that divide its cores and memory."""
    source: str = ""

    @property
    def faster_half(self) -> bool:
        """Whether it multiplies 16-bit numbers faster than others."""
        return self.peaks["half"] > self.peaks["convolution"]


_TENSOR, _VECTOR = 0.6, 1.0
_GPU_BANDWIDTH = 1.1
_PRACTICE = 0.5
"""Published self-supervised runs reached 0.3 to 0.6 of what NVIDIA's tuned ResNet-50 program does."""


def _gpu(
    name: str, memory: float, peaks: tuple[float, float, float], tensor_fp32: bool, bandwidth: float,
    link: float, network: float, source: str,
) -> Device:  # fmt: skip
    """``peaks`` in TFLOP/s: matrix products and convolutions in fp32, 16 bits; rates and sizes in GB."""
    names = ("matmul", "convolution", "half")
    return Device(
        name=name,
        memory=memory * GB,
        peaks={key: value * 1e12 for key, value in zip(names, peaks, strict=True)},
        reached={"matmul": _VECTOR, "convolution": _TENSOR if tensor_fp32 else _VECTOR, "half": _TENSOR},
        bandwidth=bandwidth * GB,
        bandwidth_reached=_GPU_BANDWIDTH,
        link=link * GB,
        network=network * GB,
        per_node=8,
        launch=6e-6,
        latency=3e-5,
        reserved=1.0 * GB,
        slack=0.1,
        has_bf16=tensor_fp32,
        practice=_PRACTICE,
        source=source,
    )


_NVIDIA = "data sheet; shares fitted to ResNet-50 training that NVIDIA published for V100 and A100"
#: torch multiplies fp32 matrices on vector units and fp32 convolutions in TF32 by default.
KINDS: dict[str, Device] = {
    "v100": _gpu("v100", 34.1, (15.7, 15.7, 125), False, 900, 150, 6.25, f"V100 SXM2 32 GB {_NVIDIA}"),
    "a100": _gpu("a100", 85.1, (19.5, 156, 312), True, 2039, 300, 25, f"A100 SXM 80 GB {_NVIDIA}"),
    "h100": _gpu("h100", 85.0, (67, 494, 989), True, 3350, 450, 50, f"H100 SXM 80 GB {_NVIDIA}"),
    "h200": _gpu("h200", 150.0, (67, 494, 989), True, 4800, 450, 50, f"H200 SXM 141 GB {_NVIDIA}"),
}
KIND_NAMES = ("cpu", *KINDS, "custom")

#: Products and sums per second and core, at 3 GHz, two fused operations a cycle.
_CORE_PEAKS = {"AVX512": 192e9, "AVX2": 96e9}
_OTHER_CORE_PEAK = 48e9
_CPU_REACHED = {"matmul": 0.6, "convolution": 0.6, "half": 0.6}
_CPU_BANDWIDTH = 10 * GB


def this_cpu(capability: str, cores: int, memory: float, *, has_bf16: bool) -> Device:
    """The machine at hand, as one device.

    Args:
        capability: its widest vector instructions, as torch names them.
        cores: that may be used.
        memory: free bytes.
        has_bf16: whether it multiplies 16-bit numbers in hardware.
    """
    peak = next((peak for name, peak in _CORE_PEAKS.items() if capability.startswith(name)), _OTHER_CORE_PEAK)
    half = 8 * peak if has_bf16 else peak / 16
    return Device(
        name="cpu",
        memory=memory,
        peaks={"matmul": cores * peak, "convolution": cores * peak, "half": cores * half},
        reached=_CPU_REACHED,
        bandwidth=cores * _CPU_BANDWIDTH,
        bandwidth_reached=1.0,
        link=2 * GB,
        network=1 * GB,
        per_node=1,
        launch=0.0,
        latency=2e-4,
        reserved=0.8 * GB,
        slack=0.1,
        has_bf16=has_bf16,
        shares_host=True,
        source=f"this machine: {cores} cores with {capability}, 3 GHz and 10 GB/s a core assumed",
    )


def custom(
    base: Device | None,
    *,
    memory_gb: float | None = None,
    tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    interconnect_gbs: float | None = None,
) -> Device:
    """A device with numbers of the user's own.

    Args:
        base: what they change; None: a device of which nothing else is known.
        tflops: peak in the run's precision.
        interconnect_gbs: GB/s and direction between devices, within a node and between nodes.

    Raises:
        ConfigError: a number is missing or not above 0.
    """
    given = {"memory-gb": memory_gb, "tflops": tflops, "bandwidth-gbs": bandwidth_gbs}
    if base is None and (missing := [name for name, value in given.items() if value is None]):
        raise ConfigError(
            f"--device-kind custom needs --{', --'.join(missing)}",
            hint="for example --memory-gb 48 --tflops 120 --bandwidth-gbs 900",
        )
    for name, value in (given | {"interconnect-gbs": interconnect_gbs}).items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} must be above 0, got {value:g}")
    device = base or replace(KINDS["a100"], name="custom", source="--device-kind custom")
    changes: dict[str, object] = {}
    if memory_gb:
        changes["memory"] = memory_gb * GB
    if tflops:
        changes["peaks"] = dict.fromkeys(device.peaks, tflops * 1e12)
    if bandwidth_gbs:
        changes["bandwidth"] = bandwidth_gbs * GB
    if interconnect_gbs:
        changes |= {"link": interconnect_gbs * GB, "network": interconnect_gbs * GB}
    return replace(device, **changes)  # type: ignore[arg-type]
