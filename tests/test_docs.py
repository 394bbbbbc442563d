"""What the documentation quotes must exist: commands, flags, options, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from sslbench.cli import app
from sslbench.config.compose import SECTIONS
from sslbench.config.schema import CoreOptions
from sslbench.config.validate import _known_keys
from sslbench.errors import SslbenchError
from sslbench.plugin.catalog import Catalog

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUP: Any = typer.main.get_command(app)
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.|…")


class Command(NamedTuple):
    page: str
    line: int
    words: tuple[str, ...]
    fails: bool
    """Whether the page shows an error as its output."""


def _commands() -> Iterator[Command]:
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            following = lines[number + 1] if number + 1 < len(lines) else ""
            for text in _quoted(line):
                fails = bool(re.match(r"\w+ error: ", following))
                yield Command(page.name, number + 1, tuple(shlex.split(text, comments=True)[1:]), fails)


def _quoted(line: str) -> list[str]:
    block = re.match(r"\s*\$? ?(sslbench(?: .*)?)$", line)
    return [block[1]] if block else re.findall(r"`(sslbench [^`]*)`", line)


def _without_globals(words: tuple[str, ...]) -> list[str]:
    """The words from the subcommand on; options of the program itself must be known."""
    rest = list(words)
    context = typer.Context(GROUP)
    flags = {name: option for option in GROUP.get_params(context) for name in option.opts}
    while rest and rest[0].startswith("-"):
        option = flags[rest[0]]
        rest = rest[1:] if option.is_flag else rest[2:]
    return rest


COMMANDS = list(_commands())
#: Complete files that pages show.
EXAMPLES = {
    name: source
    for page in PAGES
    for name, source in re.findall(
        r"`(\w+\.py)`,[^`]*complete:\n\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
}


def _name(command: Command) -> str:
    return f"{command.page}:{command.line}"


def test_the_pages_quote_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS, ids=_name)
def test_quoted_commands_parse(command: Command) -> None:
    rest = _without_globals(command.words)
    if not rest:
        return  # the program itself
    assert rest[0] in GROUP.commands, f"there is no command '{rest[0]}'"
    if len(rest) > 1:  # else the page speaks of the command, without its arguments
        GROUP.commands[rest[0]].make_context(rest[0], rest[1:])


PRETRAIN = [
    command
    for command in COMMANDS
    if "pretrain" in _without_globals(command.words)[:1]
    and "--resume" not in command.words
    and not any(PLACEHOLDER.search(word) for word in command.words)
]


@pytest.mark.parametrize("command", PRETRAIN, ids=_name)
def test_quoted_pretraining_commands_compose(command: Command, workdir: Path) -> None:
    for name, source in EXAMPLES.items():
        (workdir / name).write_text(source)
    arguments = [*command.words, "--dry-run"]
    if command.fails:
        with pytest.raises(SslbenchError):
            app(arguments, standalone_mode=False)
    else:
        app(arguments, standalone_mode=False)


#: How many lines an example may have, blank ones not counted.
LONGEST = {"spectral.py": 40, "my_barlow.py": 40}
KINDS_OF = {"few_folders.py": "dataset", "plainnet.py": "backbone", "centroid.py": "eval"}


@pytest.mark.parametrize("name", LONGEST)
def test_the_example_methods_are_short_and_train(name: str, cli: Any, workdir: Path) -> None:
    source = EXAMPLES[name]
    (workdir / name).write_text(source)
    assert len([line for line in source.splitlines() if line.strip()]) < LONGEST[name]
    run = ("pretrain", "--method", Path(name).stem, "--dataset", "digits", "--no-evals", "--limit", "3")
    assert "3 steps" in cli("-p", name, *run, "probe.every=0").stdout


@pytest.mark.parametrize("name", KINDS_OF)
def test_the_other_example_plugins_load(name: str, workdir: Path) -> None:
    (workdir / name).write_text(EXAMPLES[name])
    kind: Any = KINDS_OF[name]
    local = [e for e in Catalog((workdir / name,)).entries(kind) if e.version == "local"]
    for entry in local:
        assert Catalog((workdir / name,)).load(kind, entry.name).name == entry.name
    assert local


def _option_keys() -> Iterator[tuple[str, str]]:
    """Backticked words such as ``train.epochs`` or ``train.epochs=3``, with their page."""
    for page in PAGES:
        for key in re.findall(r"`'?([a-z]+(?:\.\w+)+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
            section, name = key.split(".")[0], key.split(".")[-1]
            if section in SECTIONS and name not in ("json", "yaml", "pt") and not PLACEHOLDER.search(key):
                yield page.name, key


def _models(section: str, path: list[str]) -> tuple[list[Any], list[str]]:
    """The option models a key may belong to, and the rest of its path."""
    catalog = Catalog()
    if section == "evals":
        return [catalog.load("eval", path[0]).Config], path[1:]
    if section in CoreOptions.model_fields:
        return [CoreOptions], [section, *path]
    entries = [e for e in catalog.entries(section) if e.distribution == "sslbench"]  # type: ignore[arg-type]
    return [catalog.load(e.kind, e.name).Config for e in entries], path


@pytest.mark.parametrize("key", sorted({key for _, key in _option_keys()}))
def test_quoted_options_exist(key: str) -> None:
    section, *path = key.split(".")
    models, path = _models(section, path)
    known = [_known_keys(model, path[:-1]) for model in models]
    assert path == ["name"] or not path or any(path[-1] in keys for keys in known), f"no option is named {key}"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *(ROOT / "docs" / "reference").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(linked), f"{page.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_named_tests_exist() -> None:
    """A name without a file is of the file before it."""
    count = 0
    for page in PAGES:
        file = ""
        for named, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", page.read_text(encoding="utf-8")):
            file = named or file
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
            count += 1
    assert count > 100
