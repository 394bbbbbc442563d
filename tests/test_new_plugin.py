"""`sslbench new-plugin`: packages that run at once, under the names that were asked for."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from installed_kit import install

import sslbench
from sslbench.cli import app, run
from sslbench.errors import ConfigError
from sslbench.plugin.catalog import KINDS, Catalog, Kind
from sslbench.plugin.scaffold import Scaffold

TEMPLATES = Path(sslbench.__file__).parent / "plugin-templates"
ROOT = Path(sslbench.__file__).parents[1]
GROUP: Any = typer.main.get_command(app)


def _python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_whole_and_under_its_own_names(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "package"
    written = Scaffold(kind, "red-panda_2").write(folder)
    assert set(map(str, written)) == {
        ".github/workflows/test.yml",
        ".gitignore",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/sslbench_red_panda_2/__init__.py",
        f"src/sslbench_red_panda_2/{kind}.py",
        "src/sslbench_red_panda_2/py.typed",
        "tests/test_red_panda_2.py",
    }
    for path in written:
        text = (folder / path).read_text()
        assert not re.search("plugin.?template", text, re.IGNORECASE), path
        if path.suffix == ".py":
            compile(text, str(path), "exec")
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "sslbench-red-panda-2"
    assert f"sslbench>={sslbench.__version__}" in project["dependencies"]
    points = project["entry-points"][KINDS[kind]]
    names = {"red-panda_2", "test_red-panda_2"} if kind == "eval" else {"red-panda_2"}
    assert points == dict.fromkeys(names, f"sslbench_red_panda_2.{kind}")
    assert "pypi" not in (folder / "pyproject.toml").read_text() + (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["x", "a-name-of-24-characters1"])
def test_packages_are_in_good_style_whatever_the_length_of_the_name(name: str, tmp_path: Path) -> None:
    for kind in KINDS:
        Scaffold(kind, name).write(tmp_path / kind)
    for check in (["check"], ["format", "--check"]):
        found = _python("ruff", *check, "--no-cache", tmp_path)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_loads_from_its_file_and_says_what_it_is(kind: Kind, tmp_path: Path) -> None:
    scaffold = Scaffold(kind, "red-panda")
    scaffold.write(tmp_path / "package")
    catalog = Catalog((tmp_path / "package" / scaffold.module,))
    cls = catalog.load(kind, "red-panda")
    assert cls.__name__ == "RedPanda"
    assert cls.Config.__name__ == "RedPandaOptions"
    assert catalog.find(kind, "red-panda").summary.startswith("red-panda: ")
    assert all(field.description for name, field in cls.Config.model_fields.items())
    module = sys.modules[cls.__module__]
    assert module.API_VERSION.split(".")[0] == sslbench.API_VERSION.split(".")[0]


def test_templates_agree_in_what_is_not_about_their_kind() -> None:
    """Each is a package that can be installed as it is, so they repeat each other."""

    def common(kind: str) -> dict[str, Any]:
        content = tomllib.loads((TEMPLATES / kind / "pyproject.toml").read_text())
        content["tool"]["mypy"].pop("overrides", None)
        for key in ("description", "dependencies", "entry-points"):
            del content["project"][key]
        return content

    assert all(common(kind) == common("method") for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_to_type_next_are_commands_that_exist(kind: Kind, workdir: Path, capsys: Any) -> None:
    assert run(["new-plugin", kind, "red-panda"]) == 0
    shown = capsys.readouterr().out
    assert f"the plugin is sslbench-red-panda/src/sslbench_red_panda/{kind}.py" in shown
    readme = Path("sslbench-red-panda/README.md").read_text()
    typed = re.findall(r"^  ((?:python|sslbench|cd) .*)$", shown, re.MULTILINE)
    assert typed[0] == "cd sslbench-red-panda"
    assert all(command in readme for command in typed[1:])
    quoted = re.findall(r"^sslbench .*$|(?<=`)sslbench [^`]*(?=`)", readme, re.MULTILINE)
    for command in quoted:
        words = [word for word in shlex.split(command)[1:] if word != "..."]
        words = words[2:] if words[0] == "-p" else words
        assert words[0] in GROUP.commands, command
        GROUP.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize(
    ("kind", "name", "advice"),
    [
        ("method", "SimSiam2", "new-plugin method simsiam2"),
        ("method", "my method", "new-plugin method my-method"),
        ("method", "2fast", "new-plugin method fast"),
        ("method", "--", "new-plugin method NAME"),
        ("method", "../up", "new-plugin method up"),
        ("method", "a" * 25, "new-plugin method " + "a" * 24),
        ("method", "a__b", "new-plugin method a-b"),
        ("eval", "test", "new-plugin eval NAME"),
        ("eval", "test_layer", "new-plugin eval layer"),
    ],
)
def test_names_that_cannot_be_are_refused_with_one_that_can(kind: Kind, name: str, advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Scaffold(kind, name)
    assert name in refused.value.message
    assert str(refused.value.hint).endswith(advice)


@pytest.mark.parametrize("name", ["method", "tensor", "none", "exception", "view-spec", "batch"])
def test_a_class_is_not_named_like_what_its_module_uses(name: str, tmp_path: Path) -> None:
    scaffold = Scaffold("method", name)
    scaffold.write(tmp_path / "package")
    tree = ast.parse((tmp_path / "package" / scaffold.module).read_text())
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes[1].endswith("Method")
    assert Catalog((tmp_path / "package" / scaffold.module,)).load("method", name).name == name


def test_nothing_is_overwritten(workdir: Path, capsys: Any) -> None:
    (workdir / "mine").mkdir()
    (workdir / "mine" / "notes.txt").write_text("a year's work")
    (workdir / "file").write_text("also")
    for out in ("mine", "file"):
        assert run(["new-plugin", "method", "x", "--out", out]) == 2
        assert "exists already" in capsys.readouterr().err
    assert {path.name for path in workdir.iterdir()} == {"mine", "file"}
    assert [path.name for path in (workdir / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [("eval", "red-panda", "red-panda-eval"), ("method", "red_panda", "red_panda-method")],
)
def test_a_package_that_would_replace_another_plugin_is_refused(
    kind: Kind, name: str, other: str, workdir: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert run(["new-plugin", "method", "red-panda"]) == 0
    assert run(["new-plugin", kind, name]) == 2
    assert f"new-plugin {kind} {other}" in capsys.readouterr().err, "--out FOLDER would lead to two of one name"
    site = workdir / "site"
    point = {"red-panda": "sslbench_red_panda.method"}
    install(site, "SSLbench.Red_Panda", {"sslbench_red_panda/__init__.py": ""}, {"methods": point})
    monkeypatch.syspath_prepend(str(site))
    assert run(["new-plugin", kind, name, "--out", "elsewhere"]) == 2
    assert f"new-plugin {kind} {other}" in (told := capsys.readouterr().err)
    assert "sslbench-red-panda, which is installed" in " ".join(told.split())
    assert not Path("elsewhere").exists()
    assert run(["new-plugin", "method", "red-panda", "--out", "again"]) == 0
    assert "alone is refused" not in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/red-panda", "file/red-panda"])
def test_a_folder_that_cannot_be_made_is_said(out: str, workdir: Path, capsys: Any) -> None:
    Path("file").touch()
    assert run(["new-plugin", "method", "x", "--out", out]) == 2
    told = capsys.readouterr().err
    assert "red-panda: " in " ".join(told.split())
    assert "unexpected" not in told


def test_an_empty_folder_may_be_filled(workdir: Path) -> None:
    assert run(["new-plugin", "method", "x", "--out", "."]) == 0
    assert Path("pyproject.toml").is_file()
    assert Path(".gitignore").is_file()
    assert not [path for path in workdir.parent.iterdir() if path.name.startswith(f".{workdir.name}.")]


def test_a_name_that_is_taken_is_said(workdir: Path, capsys: Any) -> None:
    assert run(["new-plugin", "method", "simclr"]) == 0
    assert "sslbench " in (warning := capsys.readouterr().err)
    assert "has the method 'simclr' too" in warning


def test_an_unknown_kind_is_a_usage_error(workdir: Path, capsys: Any) -> None:
    assert run(["new-plugin", "methd", "x"]) == 2
    assert "did you mean 'method'?" in capsys.readouterr().err


def test_writing_a_package_imports_nothing_heavy(workdir: Path) -> None:
    code = (
        "import sys; from sslbench.cli import run; code = run(['new-plugin', 'eval', 'x']);"
        "print(code, *sorted({'torch', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")
