"""``sslbench sync``: everything that a store has not got of a run, its parent and its evaluations."""

from __future__ import annotations

import time
from pathlib import Path

from sslbench.errors import ConfigError
from sslbench.tracking.address import resolve_tracking_uri
from sslbench.tracking.journal import Journal
from sslbench.tracking.push import JOURNAL, Push, SyncReport
from sslbench.tracking.record import Log, RunRecord
from sslbench.tracking.store import RejectedError, Store, StoreError

#: Seconds before ``sync`` tries again what failed: a line that was cut once, a database in use.
_PAUSES_S = (1.0, 3.0)


def sync(run_dir: Path, log: Log, tracking_uri: str | None = None) -> SyncReport:
    """Send whatever the store has not acknowledged of a run, its parent and its evaluations.

    A run whose process is gone without a final status becomes KILLED.

    Args:
        tracking_uri: the store from now on; unset: the one the run has been recorded in.

    Raises:
        ConfigError: ``run_dir`` is not a run directory.
    """
    run_dir = run_dir.resolve()
    record = RunRecord.load(run_dir)
    uri = resolve_tracking_uri(tracking_uri) if tracking_uri else record.tracking_uri
    if record.moved_from:
        log(f"{record.name} was in {record.moved_from} and is in {record.root} now; it is recorded in {uri}")
    try:
        store = Store(uri)
    except StoreError as error:
        log(f"store {uri} is out of reach: {error}")
        return SyncReport(record.run_id, record.name, error=str(error))
    except RejectedError as error:
        log(f"store {uri} refuses: {error}")
        return SyncReport(record.run_id, record.name, error=str(error))
    report = _sync_one(run_dir, store, log)
    report.children = [_sync_one(child, store, log) for child in child_runs(run_dir)]
    return report


def _sync_one(run_dir: Path, store: Store, log: Log) -> SyncReport:
    record = RunRecord.load(run_dir)
    abandoned = record.is_abandoned()
    if abandoned:
        record.status, record.ended = "KILLED", _last_sign_of_life(run_dir, record)
    if abandoned or record.moved_from or record.tracking_uri != store.uri:
        record.tracking_uri = store.uri
        record.save(run_dir)
    report = SyncReport(record.run_id, record.name)
    for pause_s in (*_PAUSES_S, 0.0):
        report.error = _attempt(Push(run_dir, store, report))
        if report.error is None:
            break
        time.sleep(pause_s)
    log(f"{record.name}: " + (report.error or f"complete, {report.points} values sent"))
    for remark in report.notes:
        log(f"{record.name}: {remark}")
    for refusal in report.refused:
        log(f"{record.name}: the store refused {refusal}")
    return report


def _attempt(push: Push) -> str | None:
    """Why the store has not got everything."""
    push.report.notes.clear()
    push.report.refused.clear()
    try:
        push.everything()
    except (StoreError, RejectedError) as error:
        return str(error)
    return None


def _last_sign_of_life(run_dir: Path, record: RunRecord) -> float:
    return max((entry.time for entry in Journal(run_dir / JOURNAL).entries()), default=record.started)


def child_runs(run_dir: Path) -> list[Path]:
    """Run directories of the evaluations of a pretrained model, oldest first."""
    root = Path(RunRecord.load(run_dir).root)
    found = []
    for path in run_directories(root):
        try:
            record = RunRecord.load(path)
        except ConfigError:  # the damaged record of another run
            continue
        if record.parent is not None and Path(record.parent["run_dir"]).resolve() == run_dir.resolve():
            found.append((record.order or record.started, path))
    return [path for _, path in sorted(found)]


def run_directories(root: Path) -> list[Path]:
    """All run directories below the folder of runs (``<experiment>/<run id>/artifacts``)."""
    found = root.glob(f"*/*/artifacts/{RunRecord.file_name()}")
    return sorted({path.parent.resolve() for path in found})  # the store's folder of a run may be a link to it
