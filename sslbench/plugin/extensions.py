"""Extensions: packages that watch runs. Whatever they do, they cannot end one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslbench.errors import PluginError
from sslbench.plugin.entry import Registered
from sslbench.plugin.loading import FAILURES, cause, import_file, import_registered, manager_of

if TYPE_CHECKING:
    import pluggy

_OBSERVING = frozenset(
    {
        "sslbench_run_started",
        "sslbench_metrics_logged",
        "sslbench_checkpoint_saved",
        "sslbench_run_finished",
        "sslbench_health_checks",
    }
)


@dataclass
class Extension:
    """One observer, with a manager of its own: its failure is nobody else's."""

    entry: Registered
    manager: pluggy.PluginManager | None
    problem: str = ""
    """Why it is ignored, if it is, or what was the first thing that failed."""

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call one of its hooks; it may raise anything."""
        if self.manager is None:
            return []
        results: list[Any] = getattr(self.manager.hook, hook)(**arguments)
        return results

    def tell(self, hook: str, **arguments: Any) -> str | None:
        """Call one of its hooks, whatever it does; returns its first failure, in words, once."""
        try:
            self.call(hook, **arguments)
        except FAILURES as error:
            if not self.problem:
                self.problem = f"failed in {hook}: {cause(error)}"
                return f"extension '{self.entry.name}' of {self.entry.owner} {self.problem}"
        return None

    def identity(self) -> dict[str, str]:
        """As a run records it."""
        problem = {"problem": self.problem} if self.problem else {}
        return {"kind": "extension", **self.entry.identity(), **problem}


def open_extension(entry: Registered) -> Extension:
    """Import an extension; one that cannot be used says why."""
    what = f"extension '{entry.name}'"
    try:
        module = import_registered(entry, what)
        return Extension(entry, manager_of(module, entry.address, f"{what} of {entry.owner}"))
    except PluginError as error:
        return Extension(entry, None, error.message)


def local_extension(path: Path) -> Extension | None:
    """A file named with ``-p`` that watches runs; None if it has no such hook."""
    entry = Registered(path.stem, str(path), path.stem, "local", path)
    manager = manager_of(import_file(path), str(path), f"plugin file {path}")
    hooks = {caller.name for plugin in manager.get_plugins() for caller in manager.get_hookcallers(plugin) or ()}
    return Extension(entry, manager) if hooks & _OBSERVING else None
