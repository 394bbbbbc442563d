"""Everything that users and plugins may rely on, as plain data that a snapshot keeps.

``python tests/public_surface.py`` (``make surface``) writes the snapshots anew; with names, those of them alone.
docs/compatibility.md says what a change of them means.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import typer
import typer.main

from sslbench import API_VERSION
from sslbench.cli import app, run
from sslbench.config.schema import CoreOptions
from sslbench.errors import ExitCode
from sslbench.plugin.catalog import KINDS, Catalog
from sslbench.plugin.entry import EXTENSIONS, REGISTRIES, RENAMED
from sslbench.report.describe import describe_options, nested_models
from sslbench.report.reference.contracts import BLOCKS, CONTRACTS, HOOKS
from sslbench.report.reference.source import Member, modules_of, read_module

SNAPSHOTS = Path(__file__).parent / "snapshots"
ADVICE = """
If this was not meant, mend the code. If it was:
  - what was removed or renamed must go on working with a warning first (docs/compatibility.md);
  - raise API_VERSION in sslbench/__init__.py: the second number for something new, the first for anything else;
  - say it in CHANGELOG.md, then run: make surface
"""
#: What holds data of the run or of the plugin; its keys are other surfaces.
DATA = {
    "cells",
    "checkpoints",
    "config",
    "data",
    "datasets",
    "directions",
    "metrics",
    "params",
    "registries",
    "tags",
    "values",
}
#: What is there in some installations only, such as the state of a repository.
SOMETIMES = re.compile("git_")


def names() -> dict[str, Any]:
    """Public modules with their names and signatures."""
    modules = [*CONTRACTS, *modules_of(BLOCKS)]
    return {"API_VERSION": API_VERSION} | {name: _module(name) for name in modules}


def hooks() -> dict[str, Any]:
    return _module(HOOKS)


def options() -> dict[str, Any]:
    """Every option of the core and of built-in plugins, with its type and default."""
    catalog = Catalog()
    found = {section: _options(type(value)) for section, value in CoreOptions()}
    for kind in KINDS:
        for entry in catalog.entries(kind):
            if entry.distribution == "sslbench":
                found[f"{kind} {entry.name}"] = _options(catalog.load(kind, entry.name).Config)
    return found


def commands() -> dict[str, Any]:
    """Every command with its arguments and options."""
    program: Any = typer.main.get_command(app)
    return {name: _parameters(command) for name, command in [("sslbench", program), *program.commands.items()]}


def exit_codes() -> dict[str, int]:
    return {code.name: code.value for code in ExitCode}


def entry_points() -> dict[str, list[str]]:
    """Groups, and the names of built-in plugins in them."""
    catalog = Catalog()
    own = {
        group: sorted(entry.name for entry in catalog.entries(kind) if entry.distribution == "sslbench")
        for kind, group in KINDS.items()
    }
    return own | {f"{group}{RENAMED}": [] for group in KINDS.values()} | {EXTENSIONS: [], REGISTRIES: []}


def json_keys() -> dict[str, Any]:
    """Keys of what each command prints with ``--json``."""
    return {line: _keys(output) for line, output in _tiny_run()["outputs"].items()}


def mlflow() -> dict[str, Any]:
    """Names in the store after a pretraining run with an evaluation."""
    found: dict[str, Any] = _tiny_run()["store"]
    return found


def run_directory() -> list[str]:
    """Files of a run."""
    found: list[str] = _tiny_run()["files"]
    return found


QUICK: dict[str, Callable[[], Any]] = {
    "names": names,
    "hooks": hooks,
    "options": options,
    "commands": commands,
    "exit_codes": exit_codes,
    "entry_points": entry_points,
}
OF_A_RUN: dict[str, Callable[[], Any]] = {"json_keys": json_keys, "mlflow": mlflow, "run_directory": run_directory}


def as_text(surface: Any) -> str:
    return json.dumps(surface, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _module(name: str) -> dict[str, Any]:
    return {member.name: _member(member) for member in read_module(name).members}


def _member(member: Member) -> Any:
    if "class " not in member.signature:
        return member.signature
    attributes = {a.name: f"{a.type} = {a.default}" if a.default else a.type for a in member.attributes}
    return {"is": member.signature, **attributes, **{method.name: method.signature for method in member.methods}}


def _options(model: Any) -> dict[str, Any]:
    rows = {row["key"]: f"{row['type']} = {row['default']}" for row in describe_options(model)}
    return rows | {part.__name__: _options(part) for part in nested_models(model)}


def _parameters(command: Any) -> dict[str, str]:
    found = {}
    for param in command.get_params(typer.Context(command)):
        words = (
            " ".join(sorted([*param.opts, *param.secondary_opts]))
            if param.param_type_name == "option"
            else param.name
        )
        kind = "flag" if getattr(param, "is_flag", False) else param.metavar or "value"
        default = None if callable(param.default) else param.default
        variable = f" ${param.envvar}" if param.envvar else ""
        found[words] = f"{kind}{' required' if param.required else ''} = {default}{variable}"
    return found


def _keys(value: Any) -> Any:
    """Keys all the way down; items of a list are taken together."""
    if isinstance(value, list):
        parts = [_keys(item) for item in value]
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= part if isinstance(part, dict) else {}
        return [merged] if merged else []
    if isinstance(value, dict):
        return {
            key: "data" if key in DATA else _keys(item) for key, item in value.items() if not SOMETIMES.match(key)
        }
    return "value"


@cache
def _tiny_run() -> dict[str, Any]:
    """What a pretraining run with an evaluation leaves behind and prints."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ.setdefault("XDG_CACHE_HOME", folder)
        outputs = dict(_outputs(Path(folder)))
        run_dir = next(path.parent for path in Path("runs").glob("*/config.yaml") if "tiny" in path.parent.name)
        return {"outputs": outputs, "store": _store(), "files": _files(run_dir)}


def _outputs(folder: Path) -> Iterator[tuple[str, Any]]:
    small = "--method simclr --dataset digits train.epochs=1 run.name=tiny run.evals=[knn]"
    yield "pretrain --dry-run", _printed(f"pretrain --dry-run {small}")
    yield "pretrain", _printed(f"pretrain {small}")
    yield "eval", _printed("eval linear tiny epochs=1")
    weights = next(Path("runs").glob("*/checkpoints/*/backbone.pt"))
    yield "import", _printed(f"import {weights} --backbone conv4 --dataset digits --name taken")
    for line in ("list", "list recipes", "list runs", "info method simclr", "info recipe demo/simclr", "doctor"):
        yield line, _printed(line)
    yield "config --explain", _printed("config --explain --method simclr")
    yield "compare", _printed("compare --reference")
    yield "plan", _printed("plan --method simclr --dataset digits")
    yield "check", _printed("check backbone conv4 --quick")
    yield (
        "submit --dry-run",
        _printed("submit --dry-run --cluster local -- pretrain --method simclr --dataset digits"),
    )


def _printed(line: str) -> Any:
    head, dashes, rest = line.partition(" -- ")
    words = [*head.split(), "--json", *(["--", *rest.split()] if dashes else [])]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        run(words)
    text = out.getvalue()
    start = re.search(r"^[\[{]", text, re.MULTILINE)
    if start is None:
        raise RuntimeError(f"sslbench {' '.join(words)} printed no JSON:\n{text}{err.getvalue()}")
    return json.JSONDecoder().raw_decode(text[start.start() :])[0]


def _store() -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    found: dict[str, Any] = {}
    for stored in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        kind = stored.data.tags["sslbench.kind"]
        kept = found.setdefault(kind, {"tags": set(), "metrics": set()})
        kept["tags"] |= {tag for tag in stored.data.tags if tag.startswith("sslbench.")}
        kept["metrics"] |= set(stored.data.metrics)
    return {kind: {what: sorted(values) for what, values in kept.items()} for kind, kept in found.items()}


def _files(run_dir: Path) -> list[str]:
    paths = (path.relative_to(run_dir).as_posix() for path in run_dir.rglob("[!.]*") if path.is_file())
    return sorted({re.sub(r"\d+", "N", path) for path in paths})


def main(wanted: list[str]) -> None:
    surfaces = QUICK | OF_A_RUN
    for name in wanted or surfaces:
        (SNAPSHOTS / f"{name}.json").write_text(as_text(surfaces[name]()), encoding="utf-8")
        print(SNAPSHOTS / f"{name}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
