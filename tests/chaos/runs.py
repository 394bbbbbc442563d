"""What can be seen of a run from outside, and whether two runs are the same one."""

from __future__ import annotations

import atexit
import json
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from chaos.children import NOWHERE, promise, typed

METHOD = "--method simclr --backbone conv4 method.hidden=8 method.out_dim=4 evals.linear.epochs=1"
RUN = (
    f"pretrain {METHOD} --dataset digits train.batch_size=128 train.epochs=2 train.log_every=1 data.workers=0 "
    "checkpoint.every_steps=2 checkpoint.keep=2 probe.every=1 probe.images=100 "
    "run.evals=[knn,linear] run.name=killed"
)
STEPS = 22
RESUME = "pretrain --resume last"


class View:
    """A folder in which pretraining runs on the digits are made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run_dir(self) -> Path | None:
        """The newest run directory of a pretraining run."""
        records = self.path.glob("runs/digits/*/artifacts/run.json")
        found = [file.parent for file in records if '"kind": "pretrain"' in file.read_text()]
        return max(found, key=lambda folder: (folder / "config.yaml").stat().st_ctime_ns, default=None)

    def the_run(self) -> Path:
        found = self.run_dir()
        promise(found is not None, f"there is no run in {self.path}")
        assert found is not None
        return found

    def status(self) -> str:
        return str(json.loads((self.the_run() / "run.json").read_text())["status"])

    def status_or(self, otherwise: str) -> str:
        return self.status() if self.run_dir() else otherwise

    def any(self, pattern: str) -> bool:
        folder = self.run_dir()
        return folder is not None and any(folder.glob(pattern))

    def resumable(self) -> bool:
        return self.any("checkpoints/step-????????/meta.json")

    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first."""
        return sorted(file.parent for file in self.the_run().glob("checkpoints/step-????????/meta.json"))

    def journal(self) -> list[str]:
        file = (self.run_dir() or self.path) / "metrics.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def last_step(self) -> int:
        """The last one with a complete line."""
        file = (self.run_dir() or self.path) / "metrics.jsonl"
        whole_lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return max((json.loads(line)["step"] for line in whole_lines if line.endswith("\n")), default=0)

    def size(self, name: str) -> int:
        file = self.path / name
        return file.stat().st_size if file.exists() else 0


def resumed_after(said: str) -> int:
    """The step after which a command says it resumed."""
    found = re.search(r"Resuming after step (\d+)", said)
    return int(found[1]) if found else 0


@cache
def whole(line: str = RUN) -> Path:
    """The run directory of a command that nobody disturbed, without a store. Once per process."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-whole-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    typed(f"{line} run.tracking_uri={NOWHERE}", folder)
    return View(folder).the_run()


def expect_same(found: Path, expected: Path) -> None:
    """Promise that a run ended bit for bit as another one: files, weights, optimiser, curves, results."""
    names = [sorted(path.name for path in run.glob("checkpoints/*")) for run in (expected, found)]
    promise(names[0] == names[1], f"checkpoints {names[1]} instead of {names[0]}")
    told = sorted(Path(path).name for path in json.loads((found / "run.json").read_text())["checkpoints"])
    promise(told == [name for name in names[1] if name != "LATEST"], f"run.json has checkpoints {told}")
    for file in ("state.pt", "backbone.pt"):
        one, two = (flat(newest(run) / file) for run in (expected, found))
        promise(one.keys() == two.keys(), f"{file}: other entries")
        different = [key for key in one if not equal(one[key], two[key])]
        promise(not different, f"{file}: {len(different)} of {len(one)} entries differ, such as {different[:2]}")
    promise(curves(found) == curves(expected), "metrics.jsonl differs in what no clock measured")
    promise(results(found) == results(expected), f"results {results(found)} instead of {results(expected)}")


def expect_close(found: Path, expected: Path) -> None:
    """Promise that a run ended as another one but for rounding: sums of several ranks have another order."""
    promise(newest(found).name == newest(expected).name, f"it ended with {newest(found).name}")
    one, two = (flat(newest(run) / "backbone.pt") for run in (expected, found))
    furthest = max(float((one[key] - two[key]).abs().max() / one[key].abs().max()) for key in one)
    promise(furthest < 1e-4, f"weights differ by {furthest:.1e} of the largest")
    losses = [{line["step"]: line.get("train/loss") for line in curves(run)} for run in (expected, found)]
    promise(losses[0].keys() == losses[1].keys(), "metrics.jsonl has other steps")
    apart = max(abs(losses[0][step] / losses[1][step] - 1) for step in losses[0])  # type: ignore[operator]
    promise(apart < 1e-4, f"losses differ by {apart:.1e}")


def expect_stored(run_dir: Path, database: Path) -> None:
    """Promise that the store has each point of the journal, none twice, and that the run is finished there."""
    points = stored_points(database, run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    written = Counter((key, line["step"]) for line in lines for key in line["metrics"])
    missing = set(written) - set(points)
    promise(not missing, f"the store lacks {len(missing)} of {len(written)} points")
    promise(points <= written, "the store has points more often than the journal")


def newest(run_dir: Path) -> Path:
    return max(file.parent for file in run_dir.glob("checkpoints/step-????????/meta.json"))


def flat(file: Path) -> dict[str, Any]:
    """Every tensor and value of a file by its path."""
    return dict(_leaves(torch.load(file, weights_only=True), ""))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(one == two)


def curves(run_dir: Path) -> list[dict[str, object]]:
    """The journal without what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"], **{k: v for k, v in line["metrics"].items() if not k.startswith("perf/")}}
        for line in lines
    ]


def results(run_dir: Path) -> dict[str, Any]:
    """The metrics of each evaluation."""
    files = sorted((run_dir / "evals").rglob("result.json"))
    return {str(file.relative_to(run_dir)): json.loads(file.read_text())["metrics"] for file in files}


def stored_points(database: Path, run_dir: Path) -> Counter[tuple[str, int]]:
    """How often the store has each point."""
    run_id = json.loads((run_dir / "sync.json").read_text())["store_run_id"]
    with sqlite3.connect(database) as connection:
        promise(connection.execute("pragma integrity_check").fetchone() == ("ok",), f"{database} is damaged")
        rows = connection.execute("select key, step from metrics where run_uuid = ?", (run_id,)).fetchall()
        status = connection.execute("select status from runs where run_uuid = ?", (run_id,)).fetchone()
    promise(status == ("FINISHED",), f"the store says {status}")
    return Counter(rows)
