"""Finding the run a user means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslbench.engine.records import record_problem
from sslbench.errors import CheckpointError, did_you_mean
from sslbench.untrusted import read_json

RUN_FILE = "run.json"


def find_run(reference: str, root: Path) -> Path:
    """The run directory of ``reference``: a path, a run's name, (the start of) its id, or ``last``.

    Raises:
        CheckpointError: no run or more than one fits.
    """
    direct = Path(reference).expanduser()
    if (direct / RUN_FILE).is_file():
        return direct.resolve()
    named = root / reference
    if (named / RUN_FILE).is_file():
        return named.resolve()
    runs = pretrained_runs(root)
    if reference == "last" and runs:
        return runs[-1][1]
    matching = [path for record, path in runs if _fits(record, reference)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise CheckpointError(f"'{reference}' fits {len(matching)} runs in {root}", hint="give the full name")
    raise _unknown(reference, root, [record for record, _ in runs])


def pretrained_runs(root: Path) -> list[tuple[dict[str, Any], Path]]:
    """Records and directories of all runs under ``root`` that hold a model, oldest first."""
    found: dict[Path, dict[str, Any]] = {}
    for file in [*root.glob(f"*/{RUN_FILE}"), *root.glob(f"*/*/{RUN_FILE}"), *root.glob(f"*/*/*/{RUN_FILE}")]:
        record = read_record(file)
        if record.get("kind") in ("pretrain", "import"):
            found[file.parent.resolve()] = record
    return sorted(((r, p) for p, r in found.items()), key=lambda item: when(item[0]))


def when(record: dict[str, Any]) -> float:
    """What runs are ordered by; records of earlier versions have the time of their start alone."""
    return float(record.get("order") or record.get("started") or 0)


def trained_run(reference: str, root: Path) -> Path:
    """The same for a run whose training can be continued.

    Raises:
        CheckpointError: as above, or it holds imported weights.
    """
    run_dir = find_run(reference, root)
    record = read_record(run_dir / RUN_FILE)
    if record.get("kind") == "import":
        raise CheckpointError(
            f"--resume {reference}: the run {record.get('name')} holds imported weights, no training to continue",
            hint=f"start from its weights: sslbench pretrain --init-from {record.get('name')}",
        )
    return run_dir


def _fits(record: dict[str, Any], reference: str) -> bool:
    return record.get("name") == reference or (
        len(reference) >= 6 and str(record.get("run_id", "")).startswith(reference)
    )


def read_record(file: Path) -> dict[str, Any]:
    """A ``run.json``; empty if it is damaged: one such file must not hide the other runs of a shared folder."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if record_problem(content) is None else {}


def _unknown(reference: str, root: Path, records: list[dict[str, Any]]) -> CheckpointError:
    if not records:
        return CheckpointError(
            f"there is no run in {root}", hint="train one first: sslbench pretrain --method simclr"
        )
    guess = did_you_mean(reference, [str(record.get("name")) for record in records])
    return CheckpointError(
        f"no run in {root} is named '{reference}'{guess}", hint="sslbench list runs   shows all of them"
    )
