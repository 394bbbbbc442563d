"""The files of a run directory that say how the run was started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sslbench.tracking.environment import command_line, environment
from sslbench.tracking.plugins import Identities


def command_text() -> str:
    """Folder and command, to be typed again."""
    return f"cd {shlex.quote(str(Path.cwd()))}\n{command_line()}\n"


def write_facts(run_dir: Path, params: Mapping[str, Any], plugins: Identities) -> None:
    """``config.yaml``, ``environment.yaml`` and ``command.txt``."""
    facts = environment() | {"plugins": [dict(plugin) for plugin in plugins]}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(_plain_tree(params), sort_keys=False))
    (run_dir / "environment.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))
    (run_dir / "command.txt").write_text(command_text())


def _plain_tree(value: Any) -> Any:
    """Mappings, lists and plain values only, as YAML without tags needs."""
    if isinstance(value, Mapping):
        return {str(key): _plain_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_tree(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
