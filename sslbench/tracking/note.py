"""The description of a run that MLflow shows, in Markdown."""

from __future__ import annotations

import shlex
from pathlib import Path

from sslbench.tracking.journal import Journal
from sslbench.tracking.record import RunRecord


def note(record: RunRecord, run_dir: Path) -> str:
    """What the run is, how it was started, how to go on from it, and its results."""
    parts = [_introduction(record), _results(run_dir), f"**Started with**\n\n```\n{record.command}\n```"]
    if record.kind != "eval":
        parts.append(_next_steps(record, run_dir))
    parts.append(f"Files: `{run_dir}`")
    return "\n\n".join(part for part in parts if part)


def _introduction(record: RunRecord) -> str:
    tags = {key.removeprefix("sslbench."): value for key, value in record.tags.items()}
    what = {"pretrain": "Pretraining", "eval": "Evaluation", "import": "Imported weights"}[record.kind]
    facts = [f"{key} **{tags[key]}**" for key in ("method", "backbone", "dataset", "seed") if key in tags]
    text = f"{what}: {', '.join(facts)}." if facts else f"{what}."
    if tags.get("limited") == "true":
        text += "\n\n*Limited run: stopped early on purpose, left out of comparisons.*"
    if tags.get("uses_labels") == "true":
        text += "\n\n*This method trains with labels.*"
    return text if not tags.get("note") else f"{text}\n\n{tags['note']}"


def _results(run_dir: Path) -> str:
    values: dict[str, float] = {}
    for entry in Journal(run_dir / "metrics.jsonl").entries():
        if entry.headline:
            values |= entry.metrics
    if not values:
        return ""
    rows = [f"| {key} | {value:.6g} |" for key, value in sorted(values.items())]
    return "\n".join(["| result | value |", "|:--|--:|", *rows])


def _next_steps(record: RunRecord, run_dir: Path) -> str:
    folder = shlex.quote(str(run_dir))
    lines = [f"sslbench eval PROTOCOL {folder}", f"sslbench compare {folder}"]
    if record.kind == "pretrain" and record.status != "FINISHED":
        lines.insert(0, f"sslbench pretrain --resume {folder}")
    return "**Go on with**\n\n```\n" + "\n".join(lines) + "\n```"
