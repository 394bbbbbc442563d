"""An ordinary command line, composed before it waits in a queue, as the command lines of jobs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslbench.commands.options import Session
from sslbench.engine.runs import find_run, trained_run
from sslbench.errors import ConfigError, did_you_mean
from sslbench.launch.submission import JobLine

if TYPE_CHECKING:
    import typer

_COMMANDS = ("pretrain", "eval")
_LAUNCHER = ("--devices", "--nnodes", "--node-rank", "--rdzv-endpoint", "--launch-id", "--max-restarts")


def job_lines(context: typer.Context, words: Sequence[str]) -> list[JobLine]:
    """Compose a command line and fix what may mean something else when its jobs start.

    Args:
        context: of the command in progress; its program composes.
        words: ``pretrain`` or ``eval`` and what follows. ``--seeds`` makes a job of each seed.

    Raises:
        ConfigError: with every problem of the configuration.
    """
    session: Session = context.obj
    command = words[0]
    if command not in _COMMANDS:
        guess = did_you_mean(command, _COMMANDS)
        raise ConfigError(f"sslbench submit runs pretrain or eval, not '{command}'{guess}", hint=_USUAL)
    for word in words:
        if word.split("=")[0] in _LAUNCHER:
            raise ConfigError(
                f"{word}: the cluster starts the processes",
                hint="write it before the command: sslbench submit --nodes N --devices N -- pretrain ...",
            )
    composed = _compose(context, _globals(session), words)
    if command == "eval":
        return [_evaluation(context, words, composed[0])]
    return _pretraining(session, words, composed)


_USUAL = "sslbench submit --devices 8 -- pretrain --recipe NAME --seeds 1,2,3"


def _compose(context: typer.Context, own: Sequence[str], words: Sequence[str]) -> list[dict[str, Any]]:
    """What the command's own dry run says, once per run."""
    printed = io.StringIO()
    program: Any = context.find_root().command
    with contextlib.redirect_stdout(printed):
        program.main([*own, *words, "--dry-run", "--json"], standalone_mode=False)
    try:
        found = list(_documents(printed.getvalue()))
    except json.JSONDecodeError:
        found = []
    if not found:
        raise ConfigError(
            f"this command shows something and runs nothing: sslbench {shlex.join(words)}",
            hint="type it without submit, and submit what runs: " + _USUAL,
        )
    return found


def _documents(text: str) -> Iterator[dict[str, Any]]:
    decoder, place = json.JSONDecoder(), 0
    while place < len(text.rstrip()):
        document, place = decoder.raw_decode(text, place)
        yield document
        place += len(text[place:]) - len(text[place:].lstrip())


def _globals(session: Session) -> list[str]:
    """The program's own options, for another place and time."""
    plugins = [str(path.resolve()) for path in session.catalog.local]
    plugins += [f"no:{name}" for name in sorted(session.catalog.blocked)]
    words = [word for plugin in plugins for word in ("-p", plugin)]
    if session.registry_path is not None:
        words += ["--registry", str(session.registry_path.absolute())]
    return [*words, "--runs", str(session.runs.absolute())]


def _pretraining(session: Session, words: Sequence[str], composed: Sequence[dict[str, Any]]) -> list[JobLine]:
    configs = [document["config"] for document in composed]
    gpu = configs[0]["train"]["device"] != "cpu"
    resumed = _value(words, "--resume")
    if resumed is not None:
        name = _name_of(trained_run(resumed, session.runs))
        return [JobLine(name, name, (*_globals(session), *_replaced(words, "--resume", name)), gpu=gpu)]
    begun = _value(words, "--init-from")
    if begun is not None:
        words = _replaced(words, "--init-from", _name_of(find_run(begun, session.runs)))
    words = _replaced(words, "--seeds", None)
    if len(configs) == 1:
        name = configs[0]["run"]["name"] or _default_name(configs[0], f"s{configs[0]['run']['seed']}")
        return [_new_run(session, words, name, name, gpu)]
    group = configs[0]["run"]["name"] or _default_name(configs[0])
    seeds = [config["run"]["seed"] for config in configs]
    return [_new_run(session, [*words, f"run.seed={seed}"], f"{group}-s{seed}", group, gpu) for seed in seeds]


def _new_run(session: Session, words: Sequence[str], name: str, group: str, gpu: bool) -> JobLine:
    link = session.runs.absolute() / name
    if os.path.lexists(link):
        raise ConfigError(
            f"there is a run named '{name}' in {session.runs}",
            hint=f"run.name=ANOTHER, or continue that one: sslbench submit -- pretrain --resume {name}",
        )
    start = (*_globals(session), *words, f"run.name={name}")
    resume = (*_globals(session), "pretrain", "--resume", name, *_kept(words))
    return JobLine(name, group, start, resume, link, gpu)


def _kept(words: Sequence[str]) -> list[str]:
    """What a run's configuration does not hold. Until the first checkpoint it needs the weights it starts from."""
    given = {option: _value(words, option) for option in ("--init-from", "--peer-timeout")}
    kept = [word for option, value in given.items() if value is not None for word in (option, value)]
    return [*kept, *(["--json"] if "--json" in words else [])]


def _default_name(config: dict[str, Any], *more: str) -> str:
    parts = [config[kind]["name"] for kind in ("method", "dataset", "backbone")]
    return "-".join([*parts, *more, time.strftime("%Y%m%d-%H%M%S")]).replace("/", "_").replace(":", "_")


def _evaluation(context: typer.Context, words: Sequence[str], plan: dict[str, Any]) -> JobLine:
    """The run is written out: by the time the job starts, ``last`` may be another one."""
    program: Any = context.find_root().command
    given = program.commands["eval"].make_context("eval", list(words[1:]), parent=context.find_root()).params
    run, fixed = Path(plan["run"]), list(words)
    place = fixed.index(given["protocol"], 1) + 1
    if given["run"] in fixed[place:] and "=" not in given["run"]:
        del fixed[fixed.index(given["run"], place)]
    fixed.insert(place, str(run))
    name = f"{given['protocol']}-{_name_of(run)}"
    return JobLine(name, name, (*_globals(context.obj), *fixed), gpu=plan["train"]["device"] != "cpu")


def _name_of(run_dir: Path) -> str:
    return str(json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["name"])


def _value(words: Sequence[str], option: str) -> str | None:
    """What follows an option, as ``--option value`` or ``--option=value``."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _replaced(words: Sequence[str], option: str, value: str | None) -> list[str]:
    """The words with another value of an option; None: without the option."""
    out: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest, None)
        if word.split("=")[0] != option:
            out.append(word)
        elif value is not None:
            out += [option, value]
    return out
