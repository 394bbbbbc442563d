"""Does a faster way of training give the same accuracy? Pretraining and linear evaluation, several seeds per way.

    python benchmarks/parity.py --data CIFAR10 --out benchmarks/results/parity [--compare executor]

``CIFAR10`` holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``. Each comparison has a baseline and a candidate:

executor    views of each image by Pillow and torchvision  against  views of whole batches
precision   train.precision=fp32                           against  bf16
colors      data.colors=exact                              against  fused
world       one process                                    against  two that share each batch
control     views with their colour operations             against  crops and flips only; must show a difference

Both ways of a comparison see the same images in the same order through the same loop and evaluations; seeds
decide initial weights, order and views. Results are written to OUT.json after each run, and what is there is not
run again: give the same command after an interruption, and other comparisons with the same OUT, which share runs.
OUT.md gets the tables. One thread per process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

from scipy.stats import t as student

from sslbench.config.schema import DataOptions

REFERENCE_VIEWS = Path(__file__).with_name("reference_views.py")
METHODS = ("simclr", "byol")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Way:
    """One way to train."""

    title: str
    options: tuple[str, ...] = ()
    reference: bool = False
    """Whether views are made by the reference executor."""
    devices: int = 1
    """Processes that share the batch."""


HAS_COLORS = "colors" in DataOptions.model_fields
FP32 = ("train.precision=fp32",)
EXACT = ("data.colors=exact",) if HAS_COLORS else ()
WAYS = {
    "reference": Way("views by Pillow and torchvision, fp32", FP32, reference=True),
    "fast": Way("views in batches, fp32", (*FP32, *EXACT)),
    "bf16": Way("views in batches, bf16", ("train.precision=bf16", *EXACT)),
    "fused": Way("views in batches with fused colours, fp32", (*FP32, "data.colors=fused")),
    "two": Way("views in batches by two processes, fp32", (*FP32, *EXACT), devices=2),
    "crops": Way("views in batches without colour operations, fp32", (*FP32, *EXACT, "method.views=[{count: 2}]")),
}
COMPARISONS = {
    "executor": ("reference", "fast"),
    "precision": ("fast", "bf16"),
    "colors": ("fast", "fused"),
    "world": ("fast", "two"),
    "control": ("fast", "crops"),
}


@dataclass(frozen=True)
class Run:
    """One pretraining."""

    way: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}/{self.way}/{self.seed}"


def main() -> None:
    arguments = parse()
    results = Results(arguments.out, settings(arguments))
    images = prepare_images(arguments)
    runs = [
        Run(way, method, seed)
        for seed, method, way in product(arguments.seeds, arguments.methods, COMPARISONS[arguments.compare])
    ]
    missing = [run for run in runs if run.key not in results.runs]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda run: results.add(run, pretrain(run, images, arguments)), missing))
    print(results.page())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without .json or .md")
    parser.add_argument("--compare", choices=COMPARISONS, default="executor")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--images", type=int, default=10_000, help="training images, as many of each class")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that make the reference's views")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more options of all runs")
    arguments = parser.parse_args()
    if arguments.compare == "colors" and not HAS_COLORS:
        parser.error("this version of sslbench has no option data.colors")
    return arguments


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What runs must share to be compared."""
    shared = {name: getattr(arguments, name) for name in ("backbone", "images", "epochs")}
    return {**shared, "options": arguments.set}


def prepare_images(arguments: argparse.Namespace) -> Path:
    """A folder with links to the first images of each class and to the test images."""
    source = arguments.data.resolve()
    classes = sorted(folder for folder in (source / "train").iterdir() if folder.is_dir())
    share = arguments.images // len(classes)
    root = Path(tempfile.gettempdir()) / f"parity-{os.getuid()}" / f"{source.name}-{share}"
    for folder in classes:
        target = root / "train" / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for image in sorted(folder.iterdir())[:share]:
            link(target / image.name, image)
    link(root / "test", source / "test")
    return root


def link(place: Path, target: Path) -> None:
    if not place.is_symlink():
        place.symlink_to(target)


def pretrain(run: Run, images: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and evaluate in a process and a folder of its own, and return what the tables need."""
    way = WAYS[run.way]
    program = [str(REFERENCE_VIEWS)] if way.reference else ["-m", "sslbench"]
    command = [
        *(sys.executable, *program, "pretrain", "--json", *(("--devices", str(way.devices)) * (way.devices > 1))),
        *("--method", run.method, "--backbone", arguments.backbone),
        *("--dataset", "folder", f"dataset.root={images}", f"data.workers={arguments.workers}"),
        *(f"train.epochs={arguments.epochs}", f"run.seed={run.seed}", "run.evals=[linear,test]"),
        *("probe.every=0", "checkpoint.every=0", *arguments.set, *way.options),
    ]
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "sqlite:///runs.db"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
        )
        if done.returncode:
            sys.exit(f"{run.key} failed:\n{shown(command)}\n{done.stderr}")
        check_executor(way, done.stderr)
        return collect(json.loads(done.stdout))


def shown(command: list[str]) -> str:
    return " ".join(repr(word) if "[" in word else word for word in command)


def check_executor(way: Way, log: str) -> None:
    """The log says which executor made the views; a run that used the wrong one proves nothing."""
    if ("by Pillow and torchvision" in log) != way.reference:
        sys.exit(f"the views of '{way.title}' were not made in that way:\n{log}")


def collect(outcome: dict[str, Any]) -> dict[str, Any]:
    metrics = {entry["protocol"]: entry["metrics"] for entry in outcome["evals"]}
    journal = Path(outcome["run_dir"], "metrics.jsonl").read_text()
    lines = [json.loads(line)["metrics"] for line in journal.splitlines()]
    train = [line for line in lines if "train/loss" in line]
    speeds = sorted(line["perf/images_per_second"] for line in train)
    return {
        "test_top1": metrics["test"]["top1"],
        "test_knn": metrics["test"]["knn_top1"],
        "val_top1": metrics["linear"]["val_top1"],
        "loss": statistics.fmean(line["train/loss"] for line in train[-3:]),
        "images_per_second": speeds[len(speeds) // 2],
        "seconds": outcome["seconds"],
        "steps": outcome["steps"],
        "machine": describe_machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Results:
    """The finished runs of one pair of files.

    Args:
        stem: path of the files without their ``.json`` and ``.md``.
        settings: of all runs.
    """

    def __init__(self, stem: Path, settings: dict[str, Any]) -> None:
        self.stem = stem
        self.settings = settings
        self.runs: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        stem.parent.mkdir(parents=True, exist_ok=True)
        if self._file(".json").exists():
            self._read()

    def _file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def _read(self) -> None:
        found = json.loads(self._file(".json").read_text())
        if found["settings"] != self.settings:
            sys.exit(f"{self._file('.json')} holds runs of {found['settings']}, not of {self.settings}")
        self.runs = found["runs"]

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Keep a finished run at once."""
        with self._lock:
            self.runs[run.key] = asdict(run) | result
            self._write(".json", json.dumps({"settings": self.settings, "runs": self.runs}, indent=1) + "\n")
            self._write(".md", self.page())
        print(f"{run.key}: {result['test_top1']:.2f}  ({result['seconds']:.0f} s)", file=sys.stderr)

    def _write(self, suffix: str, text: str) -> None:
        partial = self._file(suffix + ".partial")
        partial.write_text(text)
        partial.replace(self._file(suffix))

    def page(self) -> str:
        """The tables of all comparisons that have runs."""
        machines = sorted({run["machine"] for run in self.runs.values()})
        chapters = [self._chapter(name) for name in COMPARISONS]
        return "\n".join([f"# Parity\n\n{self._introduction()}\n", *filter(None, chapters), *machines]) + "\n"

    def _introduction(self) -> str:
        s = self.settings
        options = f", options {' '.join(s['options'])}" if s["options"] else ""
        return (
            "Top-1 on the test images of CIFAR-10 (JPEG files) after linear evaluation, in percent. "
            f"{s['backbone']}, {s['images']:,} training images, {s['epochs']} epochs{options}."
        )

    def _chapter(self, comparison: str) -> str:
        baseline, candidate = COMPARISONS[comparison]
        methods = list(dict.fromkeys(run["method"] for run in self.runs.values()))
        pairs = {m: (self._accuracies(m, baseline), self._accuracies(m, candidate)) for m in methods}
        pairs = {method: pair for method, pair in pairs.items() if all(pair)}
        if not pairs:
            return ""
        rows = [self._row(method, way) for method in pairs for way in (baseline, candidate)]
        verdicts = [f"- {method}: {verdict(*pair)}" for method, pair in pairs.items()]
        title = f"## {WAYS[candidate].title} against {WAYS[baseline].title}\n"
        return "\n".join([title, table(ROW, rows), "", *verdicts, ""])

    def _of(self, method: str, way: str) -> list[dict[str, Any]]:
        found = [run for run in self.runs.values() if (run["method"], run["way"]) == (method, way)]
        return sorted(found, key=lambda run: run["seed"])

    def _accuracies(self, method: str, way: str) -> list[float]:
        return [run["test_top1"] for run in self._of(method, way)]

    def _row(self, method: str, way: str) -> list[str]:
        runs = self._of(method, way)
        per_seed = " ".join(f"{run['test_top1']:.2f}" for run in runs)
        cells = [mean_and_spread([run[key] for run in runs]) for key in ("test_top1", "test_knn", "loss")]
        speed = statistics.median(run["images_per_second"] for run in runs)
        return [method, way, per_seed, *cells, f"{speed:,.0f}"]


ROW = ("method", "way", "top1 per seed", "top1", "kNN", "last loss", "images/s")


def table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|:--|:--" + "|--:" * (len(header) - 2) + "|", *lines[1:]])


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def verdict(baseline: list[float], candidate: list[float]) -> str:
    """The difference of means with its interval, and whether the candidate lies within the baseline's."""
    difference = statistics.fmean(candidate) - statistics.fmean(baseline)
    if min(len(baseline), len(candidate)) < 2:
        return f"difference {difference:+.2f}; one seed has no interval"
    half = welch_half_width(baseline, candidate)
    low, high = interval_of_mean(baseline)
    found = "no difference found" if abs(difference) <= half else "they differ"
    inside = "within" if low <= statistics.fmean(candidate) <= high else "outside"
    return (
        f"difference {difference:+.2f}, {CONFIDENCE:.0%} interval {difference - half:+.2f} to "
        f"{difference + half:+.2f}: **{found}**; the candidate's mean lies {inside} the baseline's "
        f"{CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}"
    )


def welch_half_width(first: list[float], second: list[float]) -> float:
    """Half the interval of a difference of means without assuming equal variances (Welch, 1947)."""
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if not sum(parts):
        return 0.0
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    return float(student.ppf((1 + CONFIDENCE) / 2, degrees)) * math.sqrt(sum(parts))


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def describe_machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "pillow", "sslbench"))
    return f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}."


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.open() if "model name" in line] if info.exists() else []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
