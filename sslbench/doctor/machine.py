"""Versions, devices, processors, disk and the MLflow store."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sslbench import API_VERSION, __version__
from sslbench.cores import allowed_cores, cpu_quota
from sslbench.doctor.finding import Check, judged

PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pydantic", "typer", "rich", "pluggy")
_GIB = 1 << 30


def versions() -> list[Check]:
    python = judged(
        "environment",
        "python",
        sys.version_info >= (3, 11),
        f"{platform.python_version()} at {sys.executable}",
        "install Python 3.11 or newer",
    )
    own = Check("environment", "sslbench", "ok", f"{__version__}, plugin API {API_VERSION}")
    return [own, python, *(_package(name) for name in PACKAGES)]


def _package(name: str) -> Check:
    try:
        return Check("environment", name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check("environment", name, "failure", "not installed", f"pip install {name}")


def devices() -> Iterator[Check]:
    """Processors, and each CUDA device as torch sees it."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a damaged installation fails in many ways
        yield Check("devices", "torch", "failure", str(error), "pip install --force-reinstall torch")
        return
    yield _processors(torch.get_num_threads())
    driver = _driver()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        yield _gpu(torch, number, driver)
    if not count and driver:
        yield Check(
            "devices",
            "CUDA",
            "warning",
            f"driver {driver} is there, but torch {torch.__version__} sees no device",
            "pip install torch built for CUDA; is CUDA_VISIBLE_DEVICES empty?",
        )
    elif not count:
        yield Check("devices", "CUDA", "ok", "no device; runs use the CPU")


def _processors(threads: int) -> Check:
    quota = cpu_quota()
    words = f"{allowed_cores()} cores, {threads} threads in torch"
    words += f", quota of {quota} cores" if quota else ", no quota"
    return Check(
        "devices", "CPU", "ok", words, data={"cores": allowed_cores(), "threads": threads, "quota": quota}
    )


def _gpu(torch: Any, number: int, driver: str | None) -> Check:
    facts = torch.cuda.get_device_properties(number)
    bf16 = facts.major >= 8
    words = [facts.name, f"{facts.total_memory / _GIB:.0f} GiB", f"compute {facts.major}.{facts.minor}"]
    words += ["bf16" if bf16 else "no bf16 (train.precision=fp16 or fp32)", f"driver {driver or 'unknown'}"]
    data = {"name": facts.name, "memory": facts.total_memory, "bf16": bf16, "driver": driver}
    return Check("devices", f"GPU {number}", "ok", ", ".join(words), data=data)


def _driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def disk(runs: Path) -> Check:
    """Room for runs and their checkpoints."""
    folder = next(place for place in (runs.absolute(), *runs.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(folder).free / _GIB
    return judged(
        "disk", "runs", free > 1, f"{free:.1f} GiB free in {folder}", "free some space, or --runs FOLDER"
    )


def store() -> Check:
    """Whether MLflow's store can be used."""
    from sslbench.tracking import check_store, resolve_tracking_uri
    from sslbench.tracking.address import is_server

    uri = resolve_tracking_uri(None)
    problem = check_store(uri)
    server = f", MLflow {_server_version(uri)} there" if problem is None and is_server(uri) else ""
    return judged(
        "store",
        "mlflow store",
        problem is None,
        problem or f"{uri}{server}",
        "start the server or set MLFLOW_TRACKING_URI",
    )


def _server_version(uri: str) -> str:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=10) as answer:  # http(s): is_server
            return str(answer.read(40).decode("ascii", "replace").strip())
    except (OSError, ValueError):
        return "of unknown version"
