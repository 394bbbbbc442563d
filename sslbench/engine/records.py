"""What a ``run.json`` has to look like before anything relies on it. It may come from somebody else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

Kind = Literal["pretrain", "eval", "import"]
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_TEXTS = ("run_id", "name", "experiment", "root", "tracking_uri", "command", "host", "process", "local_id")
_MAPPINGS = ("params", "tags")


def record_problem(raw: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a ``run.json``; None if the rest of the program can rely on it."""
    for key in _TEXTS:
        if not isinstance(raw.get(key, ""), str):
            return f"{key} is no text"
    for key in _MAPPINGS:
        if not _is_texts(raw.get(key, {})):
            return f"{key} is no mapping of texts"
    if not re.fullmatch(r"[\w.:-]{1,200}", raw.get("run_id", "")):
        return "run_id is none"
    if not re.fullmatch(r"[\w.:-]{0,200}", raw.get("local_id", "")):
        return "local_id is none"
    if raw.get("kind") not in get_args(Kind) or raw.get("status", "RUNNING") not in get_args(Status):
        return f"kind {raw.get('kind')!r} or status {raw.get('status')!r} is unknown"
    return _number_problem(raw) or _part_problem(raw)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _number_problem(raw: Mapping[str, Any]) -> str | None:
    for key in ("started", "order", "pid", "ended"):
        value = raw.get(key, 0)
        if not (isinstance(value, int | float) or (key == "ended" and value is None)) or value != value:
            return f"{key} is no number"
    return None


def _part_problem(raw: Mapping[str, Any]) -> str | None:
    parent, datasets, checkpoints = (raw.get(key) for key in ("parent", "datasets", "checkpoints"))
    if parent is not None and not (_is_texts(parent) and {"run_id", "run_dir"} <= set(parent)):
        return "parent is no run"
    if not isinstance(datasets or [], list) or not all(
        _is_texts(item) and {"name", "digest", "context"} <= set(item) for item in datasets or []
    ):
        return "datasets is no list of data sets"
    plugins = raw.get("plugins") or []
    if not isinstance(plugins, list) or not all(_is_texts(item) and "kind" in item for item in plugins):
        return "plugins is no list of plugins"
    if not isinstance(checkpoints or {}, dict) or not all(
        isinstance(meta, dict) for meta in (checkpoints or {}).values()
    ):
        return "checkpoints is no mapping"
    return None
