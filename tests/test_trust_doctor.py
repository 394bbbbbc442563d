"""What doctor finds: machine, variables, stray files, data, what fits together; plugins that crash or hang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installed_kit import install

from sslbench.config.registry import Registry, find_registry, load_registry
from sslbench.doctor import checks, child, machine, plugins, recipes
from sslbench.doctor.finding import Check
from sslbench.doctor.plugins import Loaded, compatibility, data_roots, health, imports, load_all
from sslbench.doctor.strays import files_without_entry_points
from sslbench.doctor.variables import variables
from sslbench.plugin.catalog import Catalog

EXTENSION = '''"""Says how it is."""
from sslbench.plugin.hooks import hookimpl

@hookimpl
def sslbench_health_checks():
    return [("quota", True, ""), ("token", False, "export TOKEN=...")]
'''
OPTIONAL = '''"""Needs what is not there."""
from sslbench.errors import MissingExtraError

raise MissingExtraError("method 'optional'", "nothing_of_the_kind", "ssl-optional[full]")
'''


@pytest.fixture
def site(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = workdir / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("SSLBENCH_PLUGINS", raising=False)
    return folder


def test_variables_are_explained_and_misspelt_ones_found() -> None:
    environ = {"SSLBENCH_RUNS": "x", "SSLBENCH_PLUGIN": "a", "SSLBENCH_LAUNCH": "1", "HOME": "/"}
    found = {check.name: check for check in variables(environ)}
    assert found.keys() == {"SSLBENCH_RUNS", "SSLBENCH_PLUGIN"}
    assert (found["SSLBENCH_RUNS"].level, found["SSLBENCH_PLUGIN"].level) == ("ok", "warning")
    assert "did you mean 'SSLBENCH_PLUGINS'" in found["SSLBENCH_PLUGIN"].detail


def test_every_variable_that_the_program_reads_is_explained() -> None:
    import re

    from sslbench.doctor.variables import _INTERNAL, VARIABLES

    root = Path(machine.__file__).parents[1]
    used = {name for path in root.rglob("*.py") for name in re.findall(r'"(SSLBENCH_[A-Z_]+)"', path.read_text())}
    assert used <= {*VARIABLES, *_INTERNAL}


def test_versions_devices_and_disk(tmp_path: Path) -> None:
    found = {check.name: check for check in [*machine.versions(), *machine.devices()]}
    assert found["python"].level == found["torch"].level == "ok"
    assert found["CPU"].data["cores"] >= 1
    assert "plugin API" in found["sslbench"].detail
    assert str(tmp_path) in machine.disk(tmp_path / "runs" / "below").detail


def test_files_that_nothing_leads_to_are_found(site: Path, workdir: Path) -> None:
    hook = "@hookimpl\ndef sslbench_methods():\n    return []\n"
    (workdir / "here.py").write_text(f"from sslbench.plugin.hooks import hookimpl\n\n{hook}")
    (workdir / "given.py").write_text(f"from sslbench.plugin.hooks import hookimpl\n\n{hook}")
    (workdir / "plugins").mkdir()
    (workdir / "plugins" / "below.py").write_text(hook.replace("methods", "run_started"))
    (workdir / "plain.py").write_text("def sslbench_methods():\n    return []\n")
    files = {"ssl_two/__init__.py": "", "ssl_two/known.py": hook, "ssl_two/forgotten.py": hook}
    install(site, "ssl-two", files, {"methods": {"known": "ssl_two.known"}})
    catalog = Catalog.from_options(["given.py"])
    found = {check.name: check for check in files_without_entry_points(catalog, workdir)}
    own = {name: check for name, check in found.items() if not name.endswith(" of sslbench 0.1.0")}
    assert own.keys() == {"here.py", "plugins/below.py", "forgotten.py of ssl-two 1.0"}
    assert "sslbench -p here.py" in own["here.py"].advice
    assert 'entry-points."sslbench.methods"' in own["forgotten.py of ssl-two 1.0"].advice
    assert 'entry-points."sslbench.extensions"' in own["plugins/below.py"].advice
    assert "method.py of sslbench 0.1.0" not in found, "a template of new-plugin is no plugin"
    points = '[project.entry-points."sslbench.methods"]\nforgotten = "ssl_two.forgotten"\n'
    (site / "pyproject.toml").write_text(points)
    found = {check.name: check for check in files_without_entry_points(catalog, workdir)}
    assert f"pip install -e {site}" in found["forgotten.py of ssl-two 1.0"].advice


def loaded(kind: str, name: str, **facts: object) -> Loaded:
    return Loaded(kind, name, f"d:{name}", "m", 0.1, {"facts": facts})


def test_methods_times_backbones() -> None:
    everything = [
        loaded("method", "a", requires=["pooled"]),
        loaded("method", "b", requires=["map"]),
        loaded("method", "c", requires=["tokens"]),
        loaded("backbone", "x", provides=["pooled", "map"]),
        loaded("backbone", "y", provides=["pooled"]),
    ]
    rows = {check.name: check for check in compatibility(everything)}
    assert rows["a"].data == {"fits": ["x", "y"], "lacking": []}
    assert rows["b"].detail == "needs map; not with y"
    assert (rows["b"].level, rows["c"].level) == ("ok", "warning")


def test_roots_of_data_sets(tmp_path: Path) -> None:
    everything = [
        loaded("dataset", "a", root=None, layout="ROOT/x"),
        loaded("dataset", "b", root=str(tmp_path), layout=""),
        loaded("dataset", "c"),
    ]
    rows = {check.name: check for check in data_roots(everything, {})}
    assert rows.keys() == {"a", "b"}
    assert (rows["a"].level, rows["a"].detail, rows["b"].data["found"]) == ("ok", "no root configured", True)
    assert "expected layout: ROOT/x" in rows["a"].advice
    (again,) = [c for c in data_roots(everything, {"a": "/none"}) if c.name == "a"]
    assert again.detail == "/none: not found"


def test_a_fork_that_ends_or_hangs_says_so() -> None:
    import os
    import time

    assert child._in_fork(lambda: {"fine": "x" * 200_000}, 60)["fine"] == "x" * 200_000
    assert child._in_fork(lambda: os._exit(3), 60) == {"failure": "its process ended with exit code 3"}
    assert child._in_fork(lambda: os.abort(), 60) == {"failure": "its process was killed by SIGABRT"}
    assert child._in_fork(lambda: time.sleep(600) or {}, 0.2) == {"failure": "still importing after 0.2 s"}


@pytest.mark.slow
def test_plugins_that_crash_or_lack_an_extra_and_extensions_with_complaints(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "IMPORT_SECONDS", 60.0)
    sources = {"crash": "import os\nos.abort()\n", "leave": "import os\nos._exit(0)\n", "optional": OPTIONAL}
    for name, source in sources.items():
        install(site, f"ssl-{name}", {f"ssl_{name}.py": source}, {"methods": {name: f"ssl_{name}"}})
    install(site, "ssl-health", {"ssl_health.py": EXTENSION}, {"extensions": {"health": "ssl_health"}})
    everything = load_all(Catalog())
    rows: dict[str, Check] = {check.name: check for check in imports(everything)}
    assert rows["method crash"].detail == "ssl_crash: its process was killed by SIGABRT"
    assert rows["method leave"].detail == "ssl_leave: its process ended with exit code 0"
    assert "-p no:ssl-crash" in rows["method crash"].advice
    optional = rows["method optional"]
    assert (optional.level, optional.detail) == (
        "ok",
        "not installed (optional): pip install 'ssl-optional[full]'",
    )
    assert rows["extension health"].level != "failure"
    assert "failure" not in {rows["method simclr"].level, rows["dataset cifar10"].level}
    told = {check.name: (check.level, check.advice) for check in health(everything)}
    assert told == {"quota": ("ok", ""), "token": ("failure", "export TOKEN=...")}
    layouts = {check.name: check.data["layout"] for check in data_roots(everything, {})}
    assert layouts["imagenet"].startswith("ROOT/train/")
    assert json.dumps(layouts)
    assert all(check.level == "ok" for check in compatibility(everything))


def test_a_damaged_registry_file_and_a_broken_file_are_findings(site: Path, workdir: Path) -> None:
    files = {"ssl_bad/__init__.py": "", "ssl_bad/registry.yaml": "recipes: ["}
    install(site, "ssl-bad", files, {"registries": {"own": "ssl_bad"}})
    main = Registry(version=1, defaults={"dataset": {"name": "d", "root": "r"}})
    found, configured = recipes.registries(Catalog(), lambda: main, [])
    assert configured == {"d": "r"}
    levels = [(check.name, check.level) for check in found]
    assert levels == [("registry", "ok"), ("registry of ssl-bad 1.0", "warning")]
    (workdir / "torn.py").write_text("1 / 0\n")
    torn = checks._broken_file(workdir / "torn.py")
    assert torn is not None
    assert (torn.level, "ZeroDivisionError" in torn.detail) == ("failure", True)


def test_published_results_that_nothing_here_measures_are_named() -> None:
    keys = {
        "eval/knn.v1/digits/top1": None,
        "detection AP": None,
        "eval/knm.v1/digits/top1": "no evaluation is named 'knm'; did you mean 'knn'?",
        "eval/knn.v9/digits/top1": "knn has version 1 here",
        "eval/knn.v1/digits/tpo1": "knn does not measure 'tpo1'; did you mean 'top1'?",
        "eval/knn/top1": "not of the form",
    }
    references = [{"recipe": "r", "metric": key, "value": 1, "tolerance": 1, "source": "s"} for key in keys]
    recipe = {"r": {"summary": "s", "source": "s"}}
    main = Registry.model_validate({"version": 1, "recipes": recipe, "references": references})
    loaded = [Loaded("eval", "knn", "sslbench:knn", "m", 0.1, {"facts": {"version": 1, "metrics": ["top1"]}})]
    found, _ = recipes.registries(Catalog(), lambda: main, loaded)
    told = [check.detail for check in found if check.name == "reference of r"]
    expected = [f"{key}: {why}" for key, why in keys.items() if why]
    assert len(told) == len(expected)
    assert all(line.startswith(begin) for line, begin in zip(told, expected, strict=True))


def test_every_result_of_the_registry_file_can_be_measured_here() -> None:
    catalog = Catalog()
    facts = {name: child._FACTS["eval"](catalog.load("eval", name)) for name in catalog.names("eval")}
    loaded = [
        Loaded("eval", name, f"sslbench:{name}", "m", 0.1, {"facts": known}) for name, known in facts.items()
    ]
    found, _ = recipes.registries(catalog, lambda: load_registry(find_registry()), loaded)
    assert [check for check in found if check.level != "ok"] == []
