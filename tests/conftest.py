"""Shared by all tests: quiet threads, an isolated MLflow store, an in-process command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Two test processes on two cores: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Their slow tests start launches, jobs or several processes: all together longer than a change should wait.
CLUSTER = {
    "test_cluster_data",
    "test_conformance_ranks",
    "test_equality_runs",
    "test_evaluation_kill",
    "test_evaluation_memory",
    "test_evaluation_streaming",
    "test_evaluation_world",
    "test_launch_devices",
    "test_submit",
    "test_sync_norm",
    "test_training_ranks",
}

Cli = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make cluster`` runs."""
    for item in items:
        if item.path.stem in CLUSTER and item.get_closest_marker("slow"):
            item.add_marker("cluster")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs stays out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory whose MLflow store is its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SSLBENCH_RUNS", "SSLBENCH_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def cli(workdir: Path) -> Cli:
    """Run the command line as a user would, in a process of its own."""

    def run(*arguments: str, check: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "sslbench", *arguments],
            cwd=workdir,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        if check is not None:
            assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
