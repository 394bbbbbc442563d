"""The command that looks ahead: plan."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslbench.commands.options import (
    AsJson,
    BackboneName,
    ConfigFile,
    DatasetName,
    Method,
    Overrides,
    RecipeName,
    Session,
    compose_pretrain,
    named,
)
from sslbench.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from sslbench.config.compose import Composed
    from sslbench.planning.devices import Device
    from sslbench.planning.measuring import Speed
    from sslbench.planning.subject import Subject

_MOST_DEVICES = 65536
_STEPS = 5


def plan(
    context: typer.Context,
    overrides: Overrides = None,
    method: Method = None,
    dataset: DatasetName = None,
    backbone: BackboneName = None,
    recipe: RecipeName = None,
    config: ConfigFile = None,
    devices: Annotated[str, typer.Option(metavar="N[,N...]", help="Devices in all, over all nodes.")] = "1",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes they are on; default: as few as have room for them.")
    ] = None,
    device_kind: Annotated[
        str | None, typer.Option(help="cpu, v100, a100, h100, h200 or custom; default: what is here.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Memory of a device in GB.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Peak of a device in the run's precision.")] = None,
    bandwidth_gbs: Annotated[float | None, typer.Option(help="Its memory's bandwidth in GB/s.")] = None,
    interconnect_gbs: Annotated[
        float | None, typer.Option(help="GB/s and direction between devices, in a node and between nodes.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores of the host for each device.")] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Number of training images.")] = None,
    measure: Annotated[
        int | None,
        typer.Option(min=1, help="Steps to measure on this machine; default: 5 when planning for this machine."),
    ] = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Predict from counts alone.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show memory, exchange and every assumption.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory, speed, hours and traffic of a pretraining run before it is started."""
    session: Session = context.obj
    items = named(method__name=method, dataset__name=dataset, backbone__name=backbone) + list(overrides or [])
    numbers = parse_devices(devices)
    composed = _compose(session, recipe, config, items)
    from sslbench.planning.devices import custom
    from sslbench.planning.machine import find_device, host_cores
    from sslbench.planning.prediction import predict, spread
    from sslbench.planning.subject import describe
    from sslbench.report.plan import Plan, print_plan

    device: Device | None = None if device_kind == "custom" else find_device(_known_kind(device_kind))
    numbers_of_user = (memory_gb, tflops, bandwidth_gbs, interconnect_gbs)
    if device is None or any(number is not None for number in numbers_of_user):
        device = custom(
            device,
            memory_gb=memory_gb,
            tflops=tflops,
            bandwidth_gbs=bandwidth_gbs,
            interconnect_gbs=interconnect_gbs,
        )
    clusters = [spread(device, number, nodes) for number in numbers]
    subject = describe(composed, images)
    available = cores or host_cores(device)
    here = device_kind is None or find_device(None).name == device_kind
    speed = _measure(subject, device, available, _steps_to_measure(measure, no_measure=no_measure, here=here))
    factor = speed.factor if speed else 1.0
    predictions = [predict(subject, cluster, available, factor) for cluster in clusters]
    measured = str(speed.measured) if speed else None
    print_plan(Plan(subject, predictions, available, measured), explain=explain, as_json=as_json)


def _steps_to_measure(asked: int | None, *, no_measure: bool, here: bool) -> int:
    if no_measure and asked:
        raise ConfigError("--measure and --no-measure exclude each other", hint="drop one of them")
    if asked and not here:
        raise ConfigError(
            "--measure: steps of this machine say nothing about another kind of device",
            hint="run sslbench plan --measure on such a device, or drop it to predict from counts",
        )
    return 0 if no_measure or not here else asked or _STEPS


def _measure(subject: "Subject", device: "Device", cores: int, steps: int) -> "Speed | None":
    if not steps:
        return None
    from sslbench.planning.measuring import compare

    return compare(subject, device, cores, steps)


def parse_devices(text: str) -> list[int]:
    """Numbers of devices such as ``8,64``, each once, ascending.

    Raises:
        ConfigError: one is not a number from 1 to 65536.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= _MOST_DEVICES for word in words):
        raise ConfigError(
            f"--devices must be numbers from 1 to {_MOST_DEVICES} with commas between them, got '{text}'",
            hint="--devices 1,8,64",
        )
    return sorted({int(word) for word in words})


def _known_kind(name: str | None) -> str | None:
    from sslbench.planning.devices import KIND_NAMES

    if name is not None and name not in KIND_NAMES:
        raise ConfigError(
            f"--device-kind: there is no '{name}'{did_you_mean(name, KIND_NAMES)}",
            hint=f"one of: {', '.join(KIND_NAMES)}; custom takes --memory-gb, --tflops and --bandwidth-gbs",
        )
    return name


def _compose(session: Session, recipe: str | None, file: Path | None, items: list[str]) -> "Composed":
    """A plan does without the folders of the data set."""
    from sslbench.config.validate import ConfigProblems
    from sslbench.planning.subject import stand_ins

    try:
        return compose_pretrain(session, recipe, file, items, None)[0]
    except ConfigProblems as error:
        folders = stand_ins(error.problems)
        if folders is None:
            raise
        return compose_pretrain(session, recipe, file, [*items, *folders], None)[0]


COMMANDS: dict[str, Callable[..., None]] = {"plan": plan}
