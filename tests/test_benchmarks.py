"""The benchmarks run and report what they measured; how fast anything is, is not tested."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import gpu  # noqa: E402
import harness  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
import scaling  # noqa: E402
from images import textures, write_photos  # noqa: E402
from training import configure  # noqa: E402
from window import Window, usage  # noqa: E402

TINY = ("--seconds", "0.05", "--warmup", "0")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, textures(32, 16))
    return path


def report(tmp_path: Path, **options: object) -> harness.Report:
    return harness.Report("some", tmp_path, lambda report: "# Some", **options)  # type: ignore[arg-type]


def fake(printed: object, group: str = "g", name: str = "a", **options: object) -> harness.Case:
    code = f"import json; print('noise'); print(json.dumps({printed!r}))"
    return harness.Case(group, name, (sys.executable, "-c", code), **options)  # type: ignore[arg-type]


def test_window_counts_the_steps_after_the_warm_up() -> None:
    window = Window(0.0, warmup=0.0, warmup_steps=3)
    assert [window.step() for _ in range(4)] == [False, False, False, True]
    result = window.result(batch=10)
    assert result["steps"] == 1
    assert result["images_per_second"] == pytest.approx(10 / window.seconds)


@pytest.mark.skipif(usage() is None, reason="this system does not tell CPU use")
def test_window_tells_own_work_from_that_of_others() -> None:
    window = Window(0.3, warmup=0.0, warmup_steps=1)
    window.step()
    while not window.step():
        sum(range(100_000))
    result = window.result(batch=1)
    assert result["cores"] > 0.05
    assert result["others"] >= 0


def test_rounds_are_interleaved_and_written_at_once(tmp_path: Path) -> None:
    cases = [fake({"images_per_second": 3.0}), fake({"images_per_second": 2.0}, name="b", rounds=1)]
    some = report(tmp_path)
    harness.measure(cases, 2, some)
    assert [(s["case"], s["round"]) for s in some.samples] == [("a", 0), ("b", 0), ("a", 1)]
    assert harness.ratio(some.values("g", "a"), some.values("g", "b")) == "1.50"
    written = json.loads((tmp_path / "some.json").read_text())
    assert len(written["samples"]) == 3
    assert written["facts"]["cores"] >= 1
    assert "# Some" in (tmp_path / "some.md").read_text()


def test_disturbed_runs_are_repeated_but_not_for_ever(tmp_path: Path) -> None:
    some = report(tmp_path)
    harness.measure([fake({"images_per_second": 1.0, "ceiling": {"others": 0.5}})], 1, some)
    assert some.dropped == harness.REPEATS
    assert some.samples[0]["disturbed"]
    calm = report(tmp_path, limit=None)
    harness.measure([fake({"images_per_second": 1.0, "others": 0.5})], 1, calm)
    assert calm.dropped == 0


def test_a_failing_program_is_reported_once(tmp_path: Path) -> None:
    some = report(tmp_path)
    harness.measure([harness.Case("g", "a", (sys.executable, "-c", "raise SystemExit('no luck')"))], 3, some)
    assert some.failures == {"g, a": "no luck"}
    assert "no luck" in (tmp_path / "some.md").read_text()


def test_tuning_of_the_caller_does_not_reach_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import json, os; print(json.dumps({'n': os.environ.get('OMP_NUM_THREADS')}))"
    case = harness.Case("g", "a", (sys.executable, "-c", code))
    assert harness.run(case, {})["n"] is None
    assert harness.run(case, {"OMP_NUM_THREADS": "1"})["n"] == "1"


def test_photos_are_files_of_two_classes(tmp_path: Path) -> None:
    write_photos(tmp_path, 4, 16)
    assert [path.parent.name for path in sorted(tmp_path.rglob("*.jpg"))] == [
        "class0",
        "class0",
        "class1",
        "class1",
    ]


def settings(images: Path) -> Iterator[list[str]]:
    """The options of every training of ours that some benchmark runs."""
    chosen = argparse.Namespace(backbone="conv4", device="cpu", seconds=1.0, quick=False)
    for method in peers.METHODS:
        yield peers.own_options(method, str(images), chosen)
    cases = [peers.relation(4, str(images), argparse.Namespace(**vars(chosen), ways=[]))[0].command]
    cases += [gpu.ours(training, images, chosen) for training in gpu.TRAININGS.values()]
    cases += [case.command for axis in scaling.AXES for case in scaling.points(axis, images, images, chosen)]
    for command in cases:
        yield [word for word in command if "=" in word]


def test_all_settings_are_valid(images: Path) -> None:
    assert len([configure(options) for options in settings(images)]) > 30


def run(script: str, *options: str) -> dict[str, object]:
    case = harness.Case("", "", harness.python(script, *options))
    return harness.run(case, {"OMP_NUM_THREADS": "1"})


def test_our_training_is_measured_with_its_ceiling_and_phases(images: Path) -> None:
    chosen = ("method.name=simclr", "backbone.name=conv4", "dataset.name=array", f"dataset.images={images}")
    more = ("train.batch_size=4", "train.device=cpu", "--ceiling", "0.05", "--phases", "0.05")
    result = run("ours.py", *chosen, *more, *TINY)
    spent = result["phases"]["milliseconds"]  # type: ignore[index]
    known = ("geometry", "crop", "colours", "forward", "backward", "optimiser")
    assert not [phase for phase in known if not spent[phase]]
    assert result["ceiling"]["images_per_second"] > 0  # type: ignore[index]
    assert result["memory_mb"] > 0  # type: ignore[operator]


def test_views_image_by_image_are_measured(images: Path) -> None:
    result = run("pil_loop.py", "--images", str(images), "--views", "2", "--batch", "4", "--workers", "1", *TINY)
    assert result["images_per_second"] > 0  # type: ignore[operator]


@pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")
@pytest.mark.parametrize(
    "method", ["simclr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("byol", "moco", "swav"))]
)
def test_lightly_is_measured(images: Path, method: str) -> None:
    result = run("lightly_loop.py", method, "--images", str(images), "--batch", "4", "--workers", "1", *TINY)
    assert result["images_per_second"] > 0  # type: ignore[operator]


@pytest.mark.skipif(bool(harness.machine()["gpu"]), reason="a CUDA device is there")
def test_the_gpu_benchmark_says_that_there_is_none() -> None:
    command = harness.python("gpu.py")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    tiny = ("--device", "cpu", "--tiny", "--threads", "1", "--no-peer", "--out", str(tmp_path))
    command = harness.python("gpu.py", *tiny, "--only", "simclr ViT-S/16, 2x224")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "simclr ViT-S/16" in (tmp_path / "gpu.md").read_text()
