"""Short runs of every method on real images: does the loss fall, do the features beat random weights?

    python benchmarks/short_runs.py --images CIFAR10 --out FOLDER [--epochs 4] [--jobs 2] [METHOD ...]

``CIFAR10`` holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``. Each method runs with its own defaults, one
thread per run. A method whose run is finished in ``FOLDER`` is not run again. Prints a Markdown table; the last
line says on what machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

METHODS = (
    *("random", "simclr", "byol", "scrl", "moco", "swav", "deepcluster_v2", "sela_v2"),
    *("relationnet", "rotationnet", "deepinfomax", "deepcluster", "supervised"),
    *("barlow", "vicreg", "simsiam", "nnclr", "dino"),
)
COLUMNS = ("method", "images", "loss first", "loss last", "images/s", "linear test", "linear val", "knn val")


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda method: pretrain(method, arguments), arguments.methods))
    print_table([row(method, arguments.out) for method in arguments.methods])
    print(f"\n{describe_machine()}, {arguments.jobs} runs at a time with one thread each.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="where runs go")
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more options of all runs")
    return parser.parse_args()


def pretrain(method: str, arguments: argparse.Namespace) -> None:
    """Run one method with its evaluations, unless it is there already."""
    if finished(arguments.out / "runs" / method):
        return
    command = [
        *(sys.executable, "-m", "sslbench", "pretrain", "--method", method, "--backbone", arguments.backbone),
        *("--dataset", "folder", f"dataset.root={arguments.images.resolve()}", f"run.name={method}"),
        *(f"train.epochs={arguments.epochs}", f"run.seed={arguments.seed}", "probe.every=0", *arguments.set),
    ]
    # A store of its own, because runs at the same time would share one experiment's description.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{method}.db"}
    with (arguments.out / f"{method}.log").open("w") as log:
        subprocess.run(command, cwd=arguments.out, env=environment, stdout=log, stderr=log, check=False)


def finished(run: Path) -> bool:
    record = run / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] == "FINISHED"


def row(method: str, out: Path) -> list[str]:
    """One line of the table, from the run's own files."""
    run = out / "runs" / method
    if not finished(run):
        return [method, f"failed, see {out / method}.log", *[""] * (len(COLUMNS) - 2)]
    points = [
        json.loads(line)["metrics"] | {"step": json.loads(line)["step"]} for line in (run / "metrics.jsonl").open()
    ]
    train = [point for point in points if "train/loss" in point]
    results = {key: value for point in points for key, value in point.items() if key.startswith("eval/")}
    return [method, *training_cells(train, run), *(result(results, *name) for name in RESULTS)]


RESULTS = (("test.", "/top1"), ("linear.", "/val_top1"), ("knn.", "/top1"))


def training_cells(train: list[dict[str, Any]], run: Path) -> list[str]:
    if not train:
        return ["0", "", "", ""]
    batch = batch_size(run)
    first, last = (sum(p["train/loss"] for p in part) / len(part) for part in (train[:3], train[-3:]))
    speeds = sorted(point["perf/images_per_second"] for point in train)
    return [f"{train[-1]['step'] * batch:,}", f"{first:.3f}", f"{last:.3f}", f"{speeds[len(speeds) // 2]:,.0f}"]


def batch_size(run: Path) -> int:
    import yaml

    return int(yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"])


def result(results: dict[str, float], protocol: str, metric: str) -> str:
    found = [v for key, v in results.items() if key.startswith(f"eval/{protocol}") and key.endswith(metric)]
    return f"{found[-1]:.2f}" if found else ""


def print_table(rows: list[list[str]]) -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|:--" + "|--:" * (len(COLUMNS) - 1) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def describe_machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "sslbench"))
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    main()
