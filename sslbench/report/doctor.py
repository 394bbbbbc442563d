"""``sslbench doctor``: is this installation able to run, and if not, what to type."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sslbench import __version__
from sslbench.errors import SslbenchError
from sslbench.plugin.catalog import KINDS, Catalog, Entry

PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pydantic", "typer", "rich", "pluggy")
_IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    passed: bool
    detail: str
    advice: str = ""


def run_checks(catalog: Catalog) -> list[Check]:
    """All checks. One that fails never stops the others."""
    return [*_versions(), _devices(), _disk(), _store(), *_plugins(catalog), *_extensions(catalog)]


def _versions() -> list[Check]:
    python = Check(
        "python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer"
    )
    return [Check("sslbench", True, __version__), python, *(_package(name) for name in PACKAGES)]


def _package(name: str) -> Check:
    try:
        return Check(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}")


def _devices() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("devices", False, str(error), "pip install --force-reinstall torch")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"CPU with {torch.get_num_threads()} threads"
    return Check("devices", True, ", ".join([cpu, *names]) if names else f"{cpu}, no CUDA device")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check("disk", free > 1, f"{free:.1f} GiB free in {Path.cwd()}", "free some space or use --runs FOLDER")


def _store() -> Check:
    from sslbench.tracking import check_store, resolve_tracking_uri

    uri = resolve_tracking_uri(None)
    problem = check_store(uri)
    return Check("mlflow store", problem is None, problem or uri, "start the server or set MLFLOW_TRACKING_URI")


def _plugins(catalog: Catalog) -> list[Check]:
    entries = [entry for kind in KINDS for entry in catalog.entries(kind)]
    by_distribution: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.version != "local":
            by_distribution.setdefault(entry.distribution, []).append(entry)
    imports = [check for group in by_distribution.values() for check in _imports(group)]
    return imports + [_loads(catalog, entry) for entry in entries]


def _imports(entries: list[Entry]) -> list[Check]:
    """Import a distribution's plugins in one process of their own; one by one only if that fails."""
    modules = sorted({entry.module.split(":")[0] for entry in entries})
    together = _import_in_child(entries[0].distribution, modules)
    if together.passed or len(modules) == 1:
        return [together]
    return [_import_in_child(entries[0].distribution, [module]) for module in modules]


def _import_in_child(distribution: str, modules: list[str]) -> Check:
    """A plugin that crashes or hangs takes nothing down with it."""
    started = time.monotonic()
    name = f"import {modules[0]}" if len(modules) == 1 else f"import {len(modules)} modules of {distribution}"
    advice = f"pip install --upgrade {distribution}, or block it: -p no:{distribution}"
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Check(name, False, f"still importing after {_IMPORT_SECONDS} s", advice)
    if done.returncode:
        return Check(name, False, (done.stderr.strip().splitlines() or ["crashed"])[-1], advice)
    return Check(name, True, f"{time.monotonic() - started:.1f} s")


def _loads(catalog: Catalog, entry: Entry) -> Check:
    name = f"{entry.kind} {entry.name}"
    try:
        catalog.load(entry.kind, entry.address)
    except SslbenchError as error:
        return Check(name, False, error.message, error.hint or "")
    return Check(name, True, f"{entry.distribution} {entry.version}")


def _extensions(catalog: Catalog) -> list[Check]:
    checks = []
    for extension in catalog.extensions():
        if extension.problem:
            checks.append(Check("extension", False, extension.problem))
        for rows in extension.call("sslbench_health_checks"):
            checks += [Check(name, passed, "" if passed else "failed", advice) for name, passed, advice in rows]
    return checks
