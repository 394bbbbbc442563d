"""What a plan concludes: which limit binds, what to change, what it refuses, what it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sslbench.commands.planning import parse_devices
from sslbench.config.compose import Layer, compose
from sslbench.config.registry import Registry
from sslbench.config.tree import parse_overrides
from sslbench.errors import ConfigError, DataError
from sslbench.planning.devices import GB, KINDS, Device, custom, this_cpu
from sslbench.planning.measuring import measure
from sslbench.planning.prediction import LIMITS, Prediction, predict, spread
from sslbench.planning.rehearsal import rehearse
from sslbench.planning.speed import Cores, load_of
from sslbench.planning.subject import Subject, describe
from sslbench.plugin.catalog import Catalog

FAST = replace(
    KINDS["a100"],
    peaks=dict.fromkeys(KINDS["a100"].peaks, 1e18),
    bandwidth=1e18,
    link=1e18,
    network=1e18,
    launch=0.0,
    latency=0.0,
    reserved=0.0,
)
"""Nothing takes any time on it."""


def subject(*items: str) -> Subject:
    base = ["method.name=simclr", "dataset.name=digits", "backbone.name=conv4", "train.batch_size=64"]
    layer = Layer("test", parse_overrides([*base, *items]))
    composed = compose(Catalog(), Registry(version=1), recipe=None, layers=[layer])
    return describe(composed, None)


def of(device: Device, devices: int = 2, *items: str) -> Prediction:
    return predict(subject(*items), spread(device, devices, None), cores=8)


@pytest.mark.parametrize(
    ("slow", "limit", "advice"),
    [
        ({"peaks": dict.fromkeys(FAST.peaks, 1e9)}, "arithmetic", "more devices"),
        ({"bandwidth": 1e6}, "memory bandwidth", "train.compile"),
        ({"launch": 1.0}, "host (asking for operations)", "train.compile"),
        ({"latency": 1.0}, "network", "fewer devices"),
        ({"link": 1e3}, "network", "fewer devices"),
        ({"memory": 1e6}, "memory capacity", "fit"),
    ],
)
def test_the_slowest_part_binds(slow: dict[str, Any], limit: str, advice: str) -> None:
    found = of(replace(FAST, **slow))
    assert found.limit == limit
    assert advice in found.advice


def test_decoding_binds_where_the_device_is_faster_than_its_cores() -> None:
    varying = replace(subject(), same_size=False, size=(375, 500))
    few, many = (predict(varying, spread(FAST, 1, None), cores) for cores in (1, 4))
    assert few.limit == "data (decoding and views)"
    assert "data.workers" in few.advice
    assert many.images_per_second == pytest.approx(4 * few.images_per_second, rel=0.01)


PHOTOS = replace(subject("method.views=[{count: 2, size: 64}]"), same_size=False, size=(375, 500))
A100, CPU = KINDS["a100"], this_cpu("AVX2", 8, 64 * GB, has_bf16=False)
SETTINGS = [
    (PHOTOS, A100, 2, 1, Cores(1, shared=False)),
    (PHOTOS, A100, 2, 1, Cores(4000, shared=False)),
    (PHOTOS, replace(A100, launch=1e-9, latency=1e-9), 2, 1, Cores(4000, shared=False)),
    (PHOTOS, replace(A100, launch=1e-9, latency=1e-9, bandwidth=1e15), 2, 1, Cores(40_000, shared=False)),
    (subject(), replace(A100, launch=2e-5, bandwidth=8e9, latency=1e-9), 2, 1, Cores(8, shared=False)),
    (PHOTOS, replace(A100, network=1e7), 64, 8, Cores(4000, shared=False)),
    (PHOTOS, replace(A100, launch=1e-9, network=1e9), 64, 8, Cores(40_000, shared=False)),
    (PHOTOS, CPU, 1, 1, Cores(8, shared=True)),
    (PHOTOS, CPU, 1, 1, Cores(0.1, shared=True)),
    (subject(), CPU, 1, 1, Cores(8, shared=True)),
    (subject(), A100, 2, 1, Cores(8, shared=False)),
    (subject(), replace(A100, launch=1e-9, bandwidth=1e8), 2, 1, Cores(8, shared=False)),
]


def quicker(part: str, device: Device, cores: Cores) -> tuple[Device, Cores]:
    """With twice as much of what a part of the step needs."""
    if part == "data":
        return device, replace(cores, count=2 * cores.count)
    changes: dict[str, dict[str, Any]] = {
        "arithmetic": {"peaks": {name: 2 * peak for name, peak in device.peaks.items()}},
        "traffic": {"bandwidth": 2 * device.bandwidth},
        "launch": {"launch": device.launch / 2},
        "network": {"link": 2 * device.link, "network": 2 * device.network, "latency": device.latency / 2},
    }
    return replace(device, **changes[part]), cores


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("speed", [1.0, 0.3])
def test_more_of_what_is_named_as_the_limit_makes_a_run_faster_than_more_of_anything_else(
    setting: tuple[Subject, Device, int, int, Cores], speed: float
) -> None:
    planned, device, world, nodes, cores = setting
    step = rehearse(planned, world, half=False)

    def seconds(device: Device, cores: Cores) -> float:
        return load_of(step, planned, device, nodes, cores).at_speed(speed).pace().seconds

    found = load_of(step, planned, device, nodes, cores).at_speed(speed).limit()
    after = {part: seconds(*quicker(part, device, cores)) for part in LIMITS}
    assert after[found] < 0.99 * seconds(device, cores)
    assert after[found] == min(after.values())


def test_data_that_take_longer_than_all_the_rest_bind_however_little_longer() -> None:
    step = rehearse(PHOTOS, 2, half=False)
    one = Cores(1, shared=False)
    rest = replace(load_of(step, PHOTOS, A100, 1, one), making=0.0).pace().seconds
    cores = Cores(load_of(step, PHOTOS, A100, 1, one).making / (1.01 * rest), shared=False)
    load = load_of(step, PHOTOS, A100, 1, cores)
    assert load.pace().data == pytest.approx(0.01 * rest)
    assert load.limit() == "data"
    assert load.pace().share("data") == pytest.approx(1)
    assert load_of(step, PHOTOS, A100, 1, replace(cores, count=1.03 * cores.count)).limit() != "data"


def test_a_slower_device_waits_less_for_its_data() -> None:
    step = rehearse(PHOTOS, 2, half=False)
    load = load_of(step, PHOTOS, A100, 1, Cores(1, shared=False))
    slow = load.at_speed(1e-6)
    assert load.limit() == "data"
    assert slow.pace().data == 0
    assert slow.limit() != "data"


def test_the_share_of_the_step_is_that_of_making_its_views() -> None:
    found = predict(PHOTOS, spread(A100, 2, None), cores=1)
    assert (found.limit, found.share) == (LIMITS["data"], pytest.approx(1))
    shared = predict(PHOTOS, spread(CPU, 1, None), cores=1)
    assert shared.limit == LIMITS["data"]
    assert shared.pace is not None
    assert shared.share == pytest.approx(shared.pace.making / shared.pace.seconds)
    assert 0.5 < shared.share < 1


def test_a_batch_smaller_than_the_ranks_is_a_row_of_its_own() -> None:
    found = of(FAST, 128)
    assert (found.limit, found.step) == ("batch", None)
    assert "train.batch_size=128" in found.advice


def test_what_a_method_refuses_is_told() -> None:
    found = of(FAST, 2, "method.name=moco", "method.queue=128", "method.bn_groups=3")
    assert "method.bn_groups=3" in str(found.problem)


def test_a_number_of_ranks_that_normalise_together_must_divide_the_world() -> None:
    assert "train.sync_bn=3 must divide the number of processes (4)" in str(of(FAST, 4, "train.sync_bn=3").problem)
    assert of(FAST, 4, "train.sync_bn=2").problem is None


def test_hours_are_those_of_all_steps() -> None:
    found = of(KINDS["v100"], 1)
    planned = subject()
    assert planned.steps == planned.composed.core.train.epochs * (planned.images // 64)
    assert found.hours == pytest.approx(planned.steps * 64 / found.images_per_second / 3600)
    assert of(KINDS["v100"], 2).device_hours == 2 * of(KINDS["v100"], 2).hours


def test_processes_of_a_cpu_divide_its_cores() -> None:
    machine = this_cpu("AVX2", 4, 8 * GB, has_bf16=False)
    one, four = (of(machine, devices) for devices in (1, 4))
    assert four.images_per_second < 1.3 * one.images_per_second
    assert four.cluster.shared().memory == 2 * GB


def test_network_between_nodes_is_the_slower_one() -> None:
    inside, across = (predict(subject(), spread(KINDS["v100"], 8, nodes), cores=8) for nodes in (1, 8))
    assert inside.pace is not None
    assert across.pace is not None
    assert across.pace.network > inside.pace.network


def test_a_measured_speed_scales_the_device_and_not_the_network() -> None:
    slow = replace(FAST, bandwidth=1e9, latency=1e-3)
    plain, twice = (predict(subject(), spread(slow, 2, None), 8, factor) for factor in (1.0, 2.0))
    assert plain.pace is not None
    assert twice.pace is not None
    assert twice.pace.traffic == pytest.approx(plain.pace.traffic / 2)
    assert twice.pace.network == plain.pace.network


def test_measured_steps_need_no_files() -> None:
    found = measure(subject("train.batch_size=16"), 16, 2)
    assert found.seconds > 0
    assert "2 measured steps of 16" in str(found)
    photos = replace(subject("method.views=[{count: 2, size: 16}]"), same_size=False, size=(40, 60))
    assert measure(photos, 8, 1).seconds > 0


def test_numbers_of_devices() -> None:
    assert parse_devices("8, 1,8") == [1, 8]
    for wrong in ("", "0", "-1", "a", "1,,2", "1.5", "100000"):
        with pytest.raises(ConfigError, match="--devices"):
            parse_devices(wrong)
    with pytest.raises(ConfigError, match="evenly"):
        spread(FAST, 9, 2)


def test_devices_of_ones_own() -> None:
    own = custom(None, memory_gb=48, tflops=100, bandwidth_gbs=800)
    assert (own.memory, own.bandwidth) == (48e9, 800e9)
    assert custom(KINDS["h100"], memory_gb=40).peaks == KINDS["h100"].peaks
    with pytest.raises(ConfigError, match="--tflops"):
        custom(None, memory_gb=48)
    with pytest.raises(ConfigError, match="above 0"):
        custom(KINDS["h100"], memory_gb=-1)


def test_the_command_plans_without_files(cli: Any) -> None:
    words = ["plan", "--method", "byol", "--dataset", "cifar10", "--device-kind", "a100", "--devices", "2,512"]
    found = json.loads(cli(*words, "--json").stdout)
    assert found["images"] == 50_000
    two, too_many = found["plans"]
    assert two["images_per_device"] == 64
    assert two["memory_bytes"] < 5e9
    assert two["device_hours"] == 2 * two["hours"] > 0
    assert too_many["limit"] == "batch"
    assert any("published" in line for line in found["assumptions"])
    shown = cli(*words, "--explain").stdout
    assert "device hours" in shown
    assert "gradients" in shown


def test_wrong_command_lines(cli: Any) -> None:
    assert "did you mean 'h100'" in cli("plan", "--device-kind", "h10", check=2).stderr
    assert "--measure" in cli("plan", "--measure", "3", "--device-kind", "h100", check=2).stderr
    assert "exclude" in cli("plan", "--measure", "3", "--no-measure", check=2).stderr


def test_unknown_numbers_of_images_are_asked_for(cli: Any) -> None:
    words = ["plan", "--dataset", "folder", "--device-kind", "a100"]
    assert "--images N" in cli(*words, check=4).stderr
    assert "1,000 images" in cli(*words, "--images", "1000").stdout


def test_a_dry_run_names_the_command(cli: Any) -> None:
    assert "sslbench plan" in cli("pretrain", "--method", "simclr", "--dry-run").stdout


def test_sizes_come_from_the_files_where_they_are() -> None:
    assert subject().facts == "the data set's files"
    with pytest.raises(DataError, match="not there"):
        subject("dataset.name=folder", "dataset.root=/nowhere")
