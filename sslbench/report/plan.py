"""A plan on stdout: a table for people, its assumptions, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sslbench.planning.prediction import Prediction, image_bytes, uncertainty, uses_half
from sslbench.planning.speed import PARTS, view_seconds
from sslbench.planning.subject import UNNAMED, Subject
from sslbench.report.listing import print_json
from sslbench.report.show import out

_MEMORY = {
    "weights": "weights that train",
    "frozen": "frozen weights (target networks)",
    "buffers": "queues, banks, statistics",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "batch": "views, of this step and the next",
    "activations": "activations, temporary results",
}


@dataclass(frozen=True)
class Plan:
    """Predictions of one run for several numbers of devices."""

    subject: Subject
    predictions: Sequence[Prediction]
    cores: int
    measured: str | None = None
    """How the speed was measured; None: it comes from counts."""

    @property
    def factor(self) -> float:
        """By which hours may be off."""
        return uncertainty(measured=self.measured is not None)


def print_plan(plan: Plan, *, explain: bool, as_json: bool) -> None:
    """The plan."""
    if as_json:
        print_json(to_json(plan))
        return
    console = out()
    console.print(_title(plan))
    console.print(_overview(plan))
    for prediction in plan.predictions:
        console.print(f"{prediction.cluster.devices} x {prediction.cluster.device.name}: {_verdict(prediction)}")
    console.print(f"\n{_confidence(plan)}")
    if not explain:
        console.print("Memory, exchange and every assumption: --explain")
        return
    _explain(plan, console)


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan as plain data; sizes in bytes."""
    subject, composed = plan.subject, plan.subject.composed
    return {
        "method": composed.method.label,
        "backbone": composed.backbone.label,
        "dataset": composed.dataset.label,
        "recipe": composed.recipe,
        "images": subject.images,
        "batch": subject.batch,
        "epochs": composed.core.train.epochs,
        "steps": subject.steps,
        "measured": plan.measured,
        "uncertainty_factor": plan.factor,
        "assumptions": _assumptions(plan),
        "plans": [_row(prediction) for prediction in plan.predictions],
    }


def _row(prediction: Prediction) -> dict[str, Any]:
    cluster, step = prediction.cluster, prediction.step
    row: dict[str, Any] = {
        "devices": cluster.devices,
        "nodes": cluster.nodes,
        "device": cluster.device.name,
        "problem": prediction.problem,
        "limit": prediction.limit,
        "advice": prediction.advice,
    }
    if step is None or prediction.pace is None:
        return row
    return row | {
        "images_per_device": step.rows,
        "memory_bytes": prediction.needed,
        "memory": asdict(step.memory),
        "host_bytes_per_node": prediction.host,
        "images_per_second": prediction.images_per_second,
        "hours": prediction.hours,
        "device_hours": prediction.device_hours,
        "seconds_per_step": {"total": prediction.pace.seconds, **prediction.pace.parts},
        "sent_bytes_per_step": step.exchanges.sent,
        "sent_bytes_by_origin": step.exchanges.sent_by_origin(),
        "collectives_per_step": step.exchanges.collectives,
        "flops_per_image": step.flops / step.rows,
        "traffic_bytes_per_image": step.traffic / step.rows,
        "parameters": step.parameters,
        "backbone_parameters": step.backbone_parameters,
    }


def _title(plan: Plan) -> str:
    subject, composed = plan.subject, plan.subject.composed
    train = composed.core.train
    chosen = ", ".join(part.label for part in (composed.method, composed.backbone, composed.dataset))
    what = f"{chosen} ({subject.images:,} images)"
    name = f"{composed.recipe}: " if composed.recipe else ""
    device = plan.predictions[0].cluster.device
    precision = "16-bit" if uses_half(train, device) else "fp32"
    return f"{name}{what}, {train.epochs} epochs = {subject.steps:,} steps of {subject.batch:,}, {precision}"


def _overview(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headers = (
        "devices", "nodes", "images/device", "GB/device", "of", "host GB/node", "images/s", "hours",
        "device hours", "MB sent/step", "limit",
    )  # fmt: skip
    for header in headers:
        table.add_column(header, justify="left" if header == "limit" else "right")
    for prediction in plan.predictions:
        table.add_row(*_cells(prediction))
    return table


def _cells(prediction: Prediction) -> list[str]:
    cluster, step = prediction.cluster, prediction.step
    head = [str(cluster.devices), str(cluster.nodes)]
    if step is None:
        return [*head, *["-"] * 8, prediction.limit]
    return [
        *head,
        f"{step.rows:,}",
        _gb(prediction.needed),
        _gb(cluster.shared().memory),
        _gb(prediction.host),
        _figures(prediction.images_per_second),
        _figures(prediction.hours),
        _figures(prediction.device_hours),
        f"{step.exchanges.sent / 1e6:,.1f}",
        prediction.limit,
    ]


def _verdict(prediction: Prediction) -> str:
    if prediction.problem:
        return f"{prediction.problem}. Next: {prediction.advice}"
    share = "" if prediction.share is None else f", {prediction.share:.0%} of the step"
    return f"bound by {prediction.limit}{share}. To change: {prediction.advice}"


def _confidence(plan: Plan) -> str:
    source = plan.measured or "counts and published peak numbers"
    return (
        f"Speed from {source}: hours may be off by a factor of {plan.factor:g} either way. "
        "Memory within about 20 %. Evaluations, probes, checkpoints, waiting for the file system and work between "
        "epochs are not in it."
    )


def _explain(plan: Plan, console: Console) -> None:
    counted = [prediction for prediction in plan.predictions if prediction.step is not None]
    if counted:
        console.print(_memory_table(counted))
        console.print(_time_table(counted))
        console.print(_exchange_table(counted))
    console.print("assumptions", style="bold")
    for line in _assumptions(plan):
        console.print(f"- {line}")


def _memory_table(predictions: Sequence[Prediction]) -> Table:
    rows: dict[str, list[str]] = {label: [] for label in _MEMORY.values()}
    for prediction in predictions:
        assert prediction.step is not None
        for name, label in _MEMORY.items():
            rows[label].append(_gb(getattr(prediction.step.memory, name)))
    return _by_devices("GB on a device", predictions, rows)


def _time_table(predictions: Sequence[Prediction]) -> Table:
    names = (*PARTS, "seconds")
    rows = {name: [f"{1e3 * getattr(p.pace, name):,.1f}" for p in predictions] for name in names}
    return _by_devices("ms of a step", predictions, rows)


def _exchange_table(predictions: Sequence[Prediction]) -> Table:
    sent = [p.step.exchanges.sent_by_origin() if p.step else {} for p in predictions]
    origins = list(dict.fromkeys(origin for row in sent for origin in row))
    rows = {origin: [f"{row.get(origin, 0) / 1e6:,.3f}" for row in sent] for origin in origins}
    return _by_devices("MB that a device sends in a step", predictions, rows)


def _by_devices(title: str, predictions: Sequence[Prediction], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("devices")
    for prediction in predictions:
        table.add_column(str(prediction.cluster.devices), justify="right")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _assumptions(plan: Plan) -> list[str]:
    subject, device = plan.subject, plan.predictions[0].cluster.device
    peaks = ", ".join(
        f"{name} {peak / 1e12:.3g} TFLOP/s at {device.reached[name]:.0%}" for name, peak in device.peaks.items()
    )
    kept = image_bytes(subject)
    height, width = subject.size
    lines = [
        f"images: {subject.images:,} of {height}x{width} ({subject.facts})",
        f"device: {device.source}",
        f"arithmetic: {peaks}",
        f"of such speeds, which a vendor's tuned program reaches, {device.practice:.0%} are taken for a run",
        f"its memory: {device.memory / 1e9:.3g} GB, {device.bandwidth / 1e9:.4g} GB/s at "
        f"{device.bandwidth_reached:.0%}; {device.reserved / 1e9:.2g} GB taken before training, "
        f"{device.slack:.0%} more than what is alive",
        f"links: {device.link / 1e9:.3g} GB/s in a node, {device.network / 1e9:.3g} GB/s between nodes for each "
        f"device and direction, {1e6 * device.latency:.0f} us a collective, all-reduce around a ring",
        f"the host asks for an operation in {1e6 * device.launch:.0f} us; half of the backward pass hides the "
        "exchange of gradients",
        f"views: {1e3 * view_seconds(subject, device, _one_core()):.3g} ms an image "
        + ("on one core" if not subject.same_size or device.shares_host else "on the device")
        + f"; {plan.cores} cores for each device"
        + ("" if not device.shares_host else ", all of the machine"),
        f"decoded images take {kept / 1e9:.3g} GB" if kept else "images differ in size and are decoded every time",
        "operations are those of the method's own code in one of the last steps, counted without values",
    ]
    if str(UNNAMED) in str(subject.composed.tree["dataset"].get("root", "")):
        lines.append("dataset.root was not given; a run needs it")
    return lines


def _one_core() -> Any:
    from sslbench.planning.speed import Cores

    return Cores(1, shared=False)


def _gb(value: float) -> str:
    return f"{value / 1e9:,.2f}" if value < 1e10 else f"{value / 1e9:,.0f}"


def _figures(value: float) -> str:
    """Two or three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
