"""Python files that implement hooks and that nothing leads to."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sslbench.doctor.finding import Check
from sslbench.plugin.catalog import KINDS, Catalog
from sslbench.plugin.entry import EXTENSIONS, Registered
from sslbench.plugin.provenance import sources_of

_HOOK = re.compile(r"^@(?:\w+\.)*hookimpl\b.*\n(?:@.*\n)*def (sslbench_\w+)", re.MULTILINE)
_GROUPS = {f"sslbench_{kind}s": group for kind, group in KINDS.items()}
_MOST_BYTES = 1 << 20


def files_without_entry_points(catalog: Catalog, folder: Path) -> Iterator[Check]:
    """Plugin files here (also below ``plugins/``) or in packages with plugins that no entry point names."""
    known = {entry.path.resolve() for entry in catalog.everything() if entry.path}
    known |= {path.resolve() for path in catalog.local}
    for path in (*sorted(folder.glob("*.py")), *sorted((folder / "plugins").rglob("*.py"))):
        if path.resolve() not in known and (hooks := hooks_of(path)):
            advice = f"sslbench -p {path.relative_to(folder)} ..., or an entry point in {_group(hooks)}"
            yield _check(str(path.relative_to(folder)), hooks, advice)
            known.add(path.resolve())
    for owner, path in _installed(catalog.everything()):
        if path.resolve() not in known and (hooks := hooks_of(path)):
            yield _check(f"{path.name} of {owner}", hooks, _advice(path, hooks))
            known.add(path.resolve())


def hooks_of(path: Path) -> list[str]:
    """Names of the hooks that a file implements, by its text."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return []
        return _HOOK.findall(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def _check(name: str, hooks: Iterable[str], advice: str) -> Check:
    words = f"implements {', '.join(hooks)}, and no entry point names it"
    return Check("files", name, "warning", words, advice)


def _advice(path: Path, hooks: Iterable[str]) -> str:
    """An installation that runs from its sources knows the entry points that there were when it was made."""
    for folder in path.parents[:4]:
        project = folder / "pyproject.toml"
        if project.is_file() and _names(project, path.stem):
            return f"{project} names it, but was installed before it did: pip install -e {folder}"
    return f"name it in the package's entry points, {_group(hooks)}"


def _names(project: Path, module: str) -> bool:
    try:
        groups = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"].values()
        named = {str(value).split(":")[0] for group in groups for value in group.values()}
        return module in {value.split(".")[-1] for value in named}
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _group(hooks: Iterable[str]) -> str:
    groups = sorted({_GROUPS.get(hook, EXTENSIONS) for hook in hooks})
    return ", ".join(f'[project.entry-points."{group}"]' for group in groups)


def _installed(entries: Iterable[Registered]) -> Iterator[tuple[str, Path]]:
    """Python files of packages that have registered something."""
    owners = {entry.distribution: entry for entry in entries if not entry.is_local}
    for entry in owners.values():
        for name, path in sources_of(entry).files:
            folders = path.parents[: name.count("/")]
            # A folder that is no package holds templates, not modules.
            if path.suffix == ".py" and all((folder / "__init__.py").is_file() for folder in folders):
                yield entry.owner, path
