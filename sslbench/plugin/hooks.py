"""The hooks of sslbench. Importing this module imports neither torch nor mlflow.

A plugin module implements one of the first four hooks and is named by an entry point::

    from sslbench.plugin.hooks import hookimpl

    @hookimpl
    def sslbench_methods():
        return [MyMethod]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from sslbench.plugin.api import Backbone, Dataset, EvalProtocol, Method

PROJECT = "sslbench"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sslbench_methods() -> list[type[Method]]:
    """Return the method classes this plugin offers (``--method NAME``)."""
    raise NotImplementedError


@hookspec
def sslbench_datasets() -> list[type[Dataset]]:
    """Return the data set classes this plugin offers (``--dataset NAME``)."""
    raise NotImplementedError


@hookspec
def sslbench_backbones() -> list[type[Backbone]]:
    """Return the backbone classes this plugin offers (``--backbone NAME``)."""
    raise NotImplementedError


@hookspec
def sslbench_evals() -> list[type[EvalProtocol]]:
    """Return the evaluation protocols this plugin offers (``sslbench eval NAME``)."""
    raise NotImplementedError


@hookspec
def sslbench_run_started(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Called on rank 0 after the run directory exists and before the first step."""


@hookspec
def sslbench_metrics_logged(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Called on rank 0 each time scalars reach the journal."""


@hookspec
def sslbench_checkpoint_saved(run_dir: Path, path: Path, step: int) -> None:
    """Called on rank 0 after a checkpoint is complete on disk; on resuming, where a kill came in between."""


@hookspec
def sslbench_run_finished(run_dir: Path, status: str) -> None:
    """Called on rank 0 with the final status: FINISHED, FAILED or KILLED."""


@hookspec
def sslbench_health_checks() -> list[tuple[str, bool, str]]:
    """Return (name, passed, advice) rows for ``sslbench doctor``."""
    raise NotImplementedError
