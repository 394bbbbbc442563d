"""A listing with 50 installed packages of plugins: what it opens and imports, counted instead of timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from installed_kit import install

NUMBER = 50
SOURCE = '"""Plugin {number} of many."""\n\nraise RuntimeError("imported")\n'
#: Runs the command and tells, last on stderr, which files below the folder were opened and what was imported.
WATCHED = """
import json, os, sys
folder, opened = sys.argv[1], []
def watch(event, arguments):
    path = os.fspath(arguments[0]) if event == "open" and not isinstance(arguments[0], int) else ""
    if isinstance(path, str) and path.startswith(folder):
        opened.append(os.path.relpath(path, folder))
sys.addaudithook(watch)
from sslbench.cli import run
code = run(sys.argv[2:])
print(json.dumps([code, opened, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for number in range(NUMBER):
        top = f"many_{number}"
        files = {
            f"{top}/{name}.py": SOURCE.format(number=number) for name in ("__init__", "method", "data", "watch")
        }
        files[f"{top}/registry.yaml"] = "recipes: ["
        points = {
            "methods": {f"method-{number}": f"{top}.method"},
            "datasets": {f"data-{number}": f"{top}.data"},
            "extensions": {f"watch-{number}": f"{top}.watch"},
            "registries": {"own": top},
        }
        install(folder, f"many-{number}", files, points)
    return folder


def watched(site: Path, *words: str) -> tuple[str, Counter[str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(site), *words],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    code, opened, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    return done.stdout, Counter(opened), modules


def test_a_listing_opens_each_file_once_and_imports_no_plugin(site: Path, workdir: Path) -> None:
    out, opened, modules = watched(site, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert sum(row["distribution"].startswith("many-") for row in rows.values()) == 2 * NUMBER
    assert rows["data-7"]["summary"] == "Plugin 7 of many."
    assert not [name for name in modules if name.startswith("many_")]
    assert not {"torch", "yaml", "pluggy", "email.parser", "hashlib"} & set(modules)
    names = Counter(
        {kind: sum(n for path, n in opened.items() if path.endswith(kind)) for kind in ("", ".py", "METADATA")}
    )
    assert names["METADATA"] == NUMBER
    assert names[".py"] == 2 * NUMBER
    assert names[""] <= 4 * NUMBER, opened.most_common(5)
    assert max(opened.values()) == 1


def test_a_listing_of_one_kind_opens_no_others(site: Path, workdir: Path) -> None:
    _, opened, _ = watched(site, "list", "methods")
    assert not [path for path in opened if path.endswith(("data.py", "watch.py", "registry.yaml"))]
    assert max(opened.values()) == 1


def test_a_run_without_a_recipe_reads_no_registry_and_no_other_plugin(site: Path, workdir: Path) -> None:
    words = ("config", "--method", "byol", "--dataset", "digits", "--backbone", "conv4", "--json")
    _, opened, modules = watched(site, *words)
    assert not [path for path in opened if path.endswith(("registry.yaml", ".py"))]
    assert not [name for name in modules if name.startswith("many_")]
