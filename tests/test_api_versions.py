"""Plugins written against an earlier version of the API go on working: the folders ``api_*_*`` beside here."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sslbench import API_VERSION, testing
from sslbench.cli import run
from sslbench.errors import PluginError
from sslbench.plugin import loading
from sslbench.plugin.catalog import KINDS, Catalog

FOLDERS = sorted(Path(__file__).parent.glob("api_*_*"))
MAJOR = API_VERSION.split(".")[0]
RUNNABLE = [folder for folder in FOLDERS if folder.name.split("_")[1] == MAJOR]
PUBLIC = re.compile(r"sslbench(\.comm|\.errors|\.nn\.\w+|\.plugin\.(api|hooks)|\.config\.options|\.testing)?")
#: What a test cannot wait for: other processes and the compiler.
QUICK: dict[str, dict[str, Any]] = {
    "method": {"processes": False, "compiled": False},
    "backbone": {"compiled": False},
    "dataset": {"processes": False},
    "eval": {"processes": False},
}


def files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.py"))]


def name_of(folder: Path, kind: str) -> str:
    local = [e.name for e in Catalog.from_options(files(folder)).entries(kind) if e.is_local]  # type: ignore[arg-type]
    return local[0]


def test_this_version_has_its_plugins() -> None:
    assert f"api_{MAJOR}_0" in [folder.name for folder in RUNNABLE]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_they_import_public_names_alone_and_state_their_version(folder: Path) -> None:
    stated = folder.name.removeprefix("api_").replace("_", ".")
    for file in files(folder):
        source = Path(file).read_text(encoding="utf-8")
        assert f'API_VERSION = "{stated}"' in source, file
        modules = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        assert [m for m in modules if m.startswith("sslbench") and not PUBLIC.fullmatch(m)] == [], file


@pytest.mark.parametrize("folder", RUNNABLE, ids=lambda folder: folder.name)
def test_they_pretrain_evaluate_and_observe(
    folder: Path, workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {kind: name_of(folder, kind) for kind in KINDS}
    plugins = [word for file in files(folder) for word in ("-p", file)]
    chosen = [word for kind in ("method", "dataset", "backbone") for word in (f"--{kind}", names[kind])]
    options = [
        "train.epochs=2",
        "train.batch_size=32",
        "run.name=old",
        f"run.evals=[{names['eval']}]",
        "probe.every=0",
    ]
    assert run([*plugins, "pretrain", *chosen, *options]) == 0, capfd.readouterr().err
    assert run([*plugins, "eval", names["eval"], "old", "sharpness=2", "--json"]) == 0
    printed = capfd.readouterr().out
    assert json.loads(printed[printed.index("\n{") :])["metrics"]["top1"] > 50
    observed = (next((workdir / "runs").glob("*/observed.txt"))).read_text(encoding="utf-8").splitlines()
    assert (observed[0], observed[-1]) == (f"started {names['method']}", "finished FINISHED")
    assert {line.split()[0] for line in observed} == {"started", "logged", "saved", "finished"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", RUNNABLE, ids=lambda folder: folder.name)
@pytest.mark.parametrize("kind", KINDS)
def test_they_pass_the_kit(folder: Path, kind: str) -> None:
    check = getattr(testing, f"check_{kind}")
    file = next(
        file for file in files(folder) if f"def sslbench_{kind}s" in Path(file).read_text(encoding="utf-8")
    )
    check(Path(file), **QUICK[kind]).raise_if_broken()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_another_major_version_refuses_them_in_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "API_VERSION", "99.0")
    catalog = Catalog.from_options(files(folder))
    for kind in KINDS:
        with pytest.raises(PluginError, match=r"was written for plugin API \d\.\d; this sslbench has 99\.0"):
            catalog.load(kind, name_of(folder, kind))
