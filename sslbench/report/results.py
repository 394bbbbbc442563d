"""Results read back from run directories. They are the truth, so this works without any MLflow store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from sslbench.engine.runs import RUN_FILE, find_run, pretrained_runs, read_record, when
from sslbench.errors import CheckpointError, ConfigError
from sslbench.untrusted import read_json

RESULT = "result.json"
Direction = Literal["max", "min"]


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of one pretrained model."""

    protocol: str
    version: int
    dataset: str
    fingerprint: str
    """Digest of the images and labels it was computed on."""
    options: str
    """Digest of the protocol's options."""
    metrics: Mapping[str, float]
    directions: Mapping[str, Direction]
    primary: str
    checkpoint: str
    """sha256 of the backbone weights."""
    limited: bool
    time: float

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> EvalResult:
        """Read a ``result.json``.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        return cls(
            protocol=str(raw["protocol"]),
            version=int(raw["version"]),
            dataset=str(raw["dataset"]),
            fingerprint=str(raw["dataset_fingerprint"]),
            options=_identity(raw),
            metrics={key: float(value) for key, value in raw["metrics"].items()},
            directions=dict(raw.get("directions", {})),
            primary=str(raw["primary"]),
            checkpoint=str(raw.get("checkpoint_sha256", "")),
            limited=bool(raw.get("limited", False)),
            time=float(raw.get("time", 0.0)),
        )


@dataclass(frozen=True)
class RunResult:
    """One pretrained model and its evaluations."""

    run_dir: Path
    run_id: str
    name: str
    experiment: str
    status: str
    started: float
    method: str
    backbone: str
    dataset: str
    epochs: str
    seed: str
    recipe: str
    group: str
    """Digest of the configuration without the seed: equal for runs that differ only by chance."""
    uses_labels: bool
    limited: bool
    rolled_back: str
    """From where to where training went back after it had diverged; empty if it never did."""
    params: Mapping[str, str]
    evals: tuple[EvalResult, ...]


def load_results(root: Path, selectors: Sequence[str] = ()) -> list[RunResult]:
    """Read runs with their evaluations, oldest first.

    Args:
        root: folder of all runs.
        selectors: names, ids, directories or name patterns such as ``byol-*``; none: every run.

    Raises:
        SslbenchError: a selector fits nothing.
    """
    runs = pretrained_runs(root)
    if selectors:
        wanted = {path for selector in selectors for path in _select(selector, root, runs)}
        known = {path for _, path in runs}
        runs = [run for run in runs if run[1] in wanted]
        runs += [(_record(path), path) for path in sorted(wanted - known)]
    return [_run_result(record, path) for record, path in runs]


def _select(selector: str, root: Path, runs: Sequence[tuple[dict[str, Any], Path]]) -> list[Path]:
    matching = [path for record, path in runs if fnmatchcase(str(record.get("name")), selector)]
    return matching or [find_run(selector, root)]


def _record(run_dir: Path) -> dict[str, Any]:
    record = read_record(run_dir / RUN_FILE)
    if not record:
        raise CheckpointError(f"{run_dir / RUN_FILE} is damaged")
    return record


def run_status(record: Mapping[str, Any], run_dir: Path) -> str:
    """A process that was killed could not note its end."""
    from sslbench.tracking import RunRecord  # listing runs is quicker without

    status = str(record.get("status", ""))
    try:
        return "KILLED" if status == "RUNNING" and RunRecord.load(run_dir).is_abandoned() else status
    except ConfigError:  # a run of somebody else that is refused must not hide the others
        return status


def _run_result(record: Mapping[str, Any], run_dir: Path) -> RunResult:
    tags = {key.removeprefix("sslbench."): str(value) for key, value in record.get("tags", {}).items()}
    return RunResult(
        run_dir=run_dir,
        run_id=str(record["run_id"]),
        name=str(record["name"]),
        experiment=str(record.get("experiment", "")),
        status=run_status(record, run_dir),
        started=when(dict(record)),
        method=tags.get("method", "?"),
        backbone=tags.get("backbone", "?"),
        dataset=tags.get("dataset", "?"),
        epochs=tags.get("epochs", "?"),
        seed=tags.get("seed", "?"),
        recipe=tags.get("recipe", ""),
        group=_group(tags) or str(record["run_id"]),
        uses_labels=tags.get("uses_labels") == "true",
        limited=tags.get("limited") == "true",
        rolled_back=tags.get("rolled_back", ""),
        params=dict(record.get("params", {})),
        evals=tuple(_evals(run_dir)),
    )


def _group(tags: Mapping[str, str]) -> str:
    """A run that was rolled back went on with another learning rate than the others."""
    group, changed = tags.get("group_hash") or tags.get("config_hash", ""), tags.get("rolled_back")
    return f"{group}/{changed}" if changed else group


def _evals(run_dir: Path) -> list[EvalResult]:
    found = []
    for file in sorted((run_dir / "evals").rglob(RESULT)):
        try:
            found.append(EvalResult.from_json(read_json(file)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # an evaluation that died while writing, or another program's file
    return found


def _identity(raw: Mapping[str, Any]) -> str:
    """Digest of the protocol's options, and of those of the protocols whose classifiers it took."""
    options = raw.get("config", {}).get("protocol", {})
    built_on = raw.get("built_on")
    return _digest({"options": options, "built_on": built_on} if built_on else options)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
