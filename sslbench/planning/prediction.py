"""What a run needs and takes on so many devices, which limit binds, and what to change."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sslbench.config.schema import TrainOptions
from sslbench.errors import ConfigError
from sslbench.planning.devices import GB, Device
from sslbench.planning.rehearsal import Memory, Step, rehearse
from sslbench.planning.speed import DEFAULT_WORKERS, Cores, Pace, load_of
from sslbench.planning.subject import Subject

_PROCESS = {"device": 3.0 * GB, "cpu": 0.8 * GB}
"""Host memory of a training process: torch with CUDA's libraries, torch alone."""
_WORKER = 0.15 * GB
_PER_IMAGE = 90
"""Host bytes for each image in each process: path 40, height and width 16, order of two epochs 16, label and
number 16, folder 4."""
_DEVICE_SHARE = 0.25
"""Up to this share of an accelerator's memory images are kept there."""

LIMITS = {
    "arithmetic": "arithmetic",
    "traffic": "memory bandwidth",
    "launch": "host (asking for operations)",
    "network": "network",
    "data": "data (decoding and views)",
}
_ADVICE = {
    "arithmetic": "more devices, or a smaller backbone or views",
    "traffic": "train.compile fuses operations; more devices",
    "launch": "more images per device, or train.compile: the device waits for the host",
    "network": "fewer devices or a larger train.batch_size; devices of one node; train.sync_bn=false if it fits",
    "data": "more data.workers with as many cores, or smaller copies of the images: data.packed_size=256",
}
_MADE_QUICKLY = "more devices, or fewer or smaller views"
_HALF = "16-bit numbers (train.precision), which the device computes faster; "


@dataclass(frozen=True)
class Cluster:
    """What a run is spread over."""

    device: Device
    devices: int
    nodes: int

    @property
    def per_node(self) -> int:
        return self.devices // self.nodes

    def shared(self) -> Device:
        """One device, if devices are processes that divide their node."""
        if not self.device.shares_host:
            return self.device
        share, device = self.per_node, self.device
        peaks = {name: peak / share for name, peak in device.peaks.items()}
        return replace(device, peaks=peaks, bandwidth=device.bandwidth / share, memory=device.memory / share)


@dataclass(frozen=True)
class Prediction:
    """For one number of devices. With a ``problem`` the run cannot be made like this."""

    cluster: Cluster
    problem: str | None = None
    advice: str = ""
    step: Step | None = None
    pace: Pace | None = None
    needed: float = 0.0
    """Bytes on each device."""
    host: float = 0.0
    """Bytes on each node."""
    images_per_second: float = 0.0
    hours: float = 0.0
    limit: str = ""
    share: float | None = None
    """Of a step, in which what limits it is busy; None: it is not time that limits."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.pace.seconds if self.pace else 0.0

    @property
    def device_hours(self) -> float:
        return self.hours * self.cluster.devices


def spread(device: Device, devices: int, nodes: int | None) -> Cluster:
    """Devices on nodes, by default as many on each as such nodes have.

    Raises:
        ConfigError: they do not fall on the nodes evenly.
    """
    per_node = devices if device.shares_host else device.per_node
    count = nodes or -(-devices // per_node)
    if devices % count:
        raise ConfigError(
            f"{devices} devices do not fall evenly on {count} nodes",
            hint=f"--devices {max(1, devices // count) * count}, or another --nodes",
        )
    return Cluster(device, devices, count)


def uses_half(options: TrainOptions, device: Device) -> bool:
    """Whether the run would multiply 16-bit numbers."""
    return device.has_bf16 if options.precision == "auto" else options.precision != "fp32"


def predict(subject: Subject, cluster: Cluster, cores: int, speedup: float = 1.0) -> Prediction:
    """Predict one run.

    Args:
        cores: of the host for each device, or of the machine if it is the device.
        speedup: measured speed of the device's own work as a factor on what counts say.
    """
    half = uses_half(subject.composed.core.train, cluster.device)
    try:
        step = rehearse(subject, cluster.devices, half=half)
    except ConfigError as error:
        return Prediction(cluster, problem=error.message, advice=error.hint or "", limit="batch")
    device = cluster.shared()
    load = load_of(step, subject, device, cluster.nodes, _cores(subject, cluster, cores)).at_speed(speedup)
    spent, part = load.pace(), load.limit()
    rate = subject.batch / spent.seconds
    hours = subject.steps * spent.seconds / 3600
    images = image_bytes(subject)
    on_device = images if _fits_device(images, device) else 0.0
    needed = device_bytes(step.memory, device) + on_device
    host = _host_bytes(subject, cluster, images - on_device)
    prediction = Prediction(
        cluster, None, "", step, spent, needed, host, rate, hours, LIMITS[part], spent.share(part)
    )
    if needed > device.memory:
        advice = _memory_advice(subject, step, device, needed)
        return replace(prediction, limit="memory capacity", share=None, advice=advice)
    faster = not half and cluster.device.faster_half and part in ("arithmetic", "traffic")
    advice = _MADE_QUICKLY if part == "data" and subject.same_size else _ADVICE[part]
    return replace(prediction, advice=(_HALF if faster else "") + advice)


def device_bytes(memory: Memory, device: Device) -> float:
    """What a device has to offer for a step, with what the allocator holds and libraries take."""
    return memory.total * (1 + device.slack) + device.reserved


def image_bytes(subject: Subject) -> float:
    """All images decoded, if they can be kept: those of one size."""
    height, width = subject.size
    return float(subject.images * 3 * height * width) if subject.same_size else 0.0


def _fits_device(images: float, device: Device) -> bool:
    return not device.shares_host and images <= _DEVICE_SHARE * device.memory


def _cores(subject: Subject, cluster: Cluster, cores: int) -> Cores:
    if cluster.device.shares_host:
        return Cores(cores / cluster.per_node, shared=True)
    return Cores(max(1, min(cores, _workers(subject))), shared=False)


def _workers(subject: Subject) -> int:
    """That decode images for one device."""
    wanted = subject.composed.core.data.workers
    return DEFAULT_WORKERS if wanted is None else wanted


def _host_bytes(subject: Subject, cluster: Cluster, images: float) -> float:
    """Of a node: processes with their tables, decoding workers, decoded images once."""
    kind = "cpu" if cluster.device.shares_host else "device"
    workers = 0 if subject.same_size else _workers(subject)
    process = _PROCESS[kind] + workers * _WORKER + subject.images * _PER_IMAGE
    return cluster.per_node * process + images


def _memory_advice(subject: Subject, step: Step, device: Device, needed: float) -> str:
    """Activations and batch shrink with the images of a device, the rest does not."""
    memory = step.memory
    growing = (memory.activations + memory.batch) * (1 + device.slack)
    fixed = needed - growing
    if fixed >= device.memory:
        return "weights and their states alone do not fit: train.parallel=fsdp, or a smaller backbone"
    rows = int(step.rows * (device.memory - fixed) / growing)
    enough = -(-subject.batch // max(1, rows))
    return (
        f"{rows} images fit on a device instead of {step.rows}: train.checkpoint_activations=true, "
        f"{enough} devices, or train.batch_size={max(2, rows * step.world)}"
    )


def uncertainty(*, measured: bool) -> float:
    """By which factor hours may be off, from the deviations in ``benchmarks/results/plan.md``."""
    return 1.4 if measured else 2.0
