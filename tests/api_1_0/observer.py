"""Writes down what it is told, with every hook of API 1.0 for observers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslbench.plugin.hooks import hookimpl

API_VERSION = "1.0"


def _note(run_dir: Path, line: str) -> None:
    with (run_dir / "observed.txt").open("a") as file:
        file.write(f"{line}\n")


@hookimpl
def sslbench_run_started(run_dir: Path, config: Mapping[str, Any]) -> None:
    _note(run_dir, f"started {config['method']['name']}")


@hookimpl
def sslbench_metrics_logged(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    if "train/loss" in metrics:
        _note(run_dir, f"logged {step}")


@hookimpl
def sslbench_checkpoint_saved(run_dir: Path, path: Path, step: int) -> None:
    _note(run_dir, f"saved {path.name} {step}")


@hookimpl
def sslbench_run_finished(run_dir: Path, status: str) -> None:
    _note(run_dir, f"finished {status}")


@hookimpl
def sslbench_health_checks() -> list[tuple[str, bool, str]]:
    return [("observer of API 1.0", True, "")]
