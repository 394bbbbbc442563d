"""The command that tries a plugin's contract: check."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslbench.commands.options import AsJson, Session
from sslbench.errors import ConfigError, ExitCode, SslbenchError, did_you_mean
from sslbench.plugin.catalog import KINDS, Kind

if TYPE_CHECKING:
    from sslbench.testing.rules import Checkup

    Checks = Callable[[str], Checkup]

#: Arguments of the kits for what ``--quick`` leaves out.
_SLOW = ("processes", "compiled")


def check(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="method, dataset, backbone or eval.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME [KEY=VALUE]...",
            help="The plugin and options of it; a method also takes core options such as train.sync_bn=false.",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every plugin of the kind.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what starts processes or the compiler.")
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="Check a method on this backbone instead of a tiny one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try every rule of a plugin's contract and say what is broken and how to mend it."""
    session: Session = context.obj
    known = _known_kind(kind)
    if backbone and known != "method":
        raise ConfigError(f"check {known}: --backbone is for methods", hint="drop it")
    names, items = _names(session, known, words or [], every)
    from sslbench.report.checkup import print_checkups
    from sslbench.terminal import prepare_environment

    prepare_environment()
    arguments = _arguments(known, items) | ({"backbone": backbone} if backbone else {})
    checks = _kit(session, known, arguments, quick)
    checkups = [(_forgiving if every else _watched)(checks, known, name) for name in names]
    print_checkups(checkups, as_json, several=every)
    if any(checkup.broken for checkup in checkups):
        raise typer.Exit(ExitCode.PLUGIN)


def _known_kind(kind: str) -> Kind:
    for known in KINDS:
        if kind in (known, f"{known}s"):
            return known
    raise ConfigError(
        f"check: there is no kind '{kind}'{did_you_mean(kind, KINDS)}", hint=f"one of: {', '.join(KINDS)}"
    )


def _names(session: Session, kind: Kind, words: list[str], every: bool) -> tuple[list[str], list[str]]:
    """Plugins to check, and options."""
    if every:
        stray = [word for word in words if "=" not in word]
        if stray:
            raise ConfigError(f"check: '{stray[0]}' and --all exclude each other", hint="drop one of them")
        return [entry.address for entry in session.catalog.entries(kind)], words
    if not words or "=" in words[0]:
        raise ConfigError(
            f"check: which {kind}?", hint=f"sslbench check {kind} NAME, or --all; sslbench list {kind}s"
        )
    return words[:1], words[1:]


def _arguments(kind: Kind, items: list[str]) -> dict[str, Any]:
    """Options as the kits take them, written as ``key``, or with their section: ``method.key``, ``train.key``."""
    from sslbench.config.compose import CORE_SECTIONS
    from sslbench.config.tree import parse_overrides

    tree = parse_overrides(items)
    core = {key: tree.pop(key) for key in CORE_SECTIONS if kind == "method" and isinstance(tree.get(key), dict)}
    own = tree.pop(kind, {}) if isinstance(tree.get(kind), dict) else {}
    return {"options": {**tree, **own}} | ({"core": core} if core else {})


def _kit(session: Session, kind: Kind, arguments: dict[str, Any], quick: bool) -> "Checks":
    """Checks one plugin by its name."""
    import inspect

    from sslbench import testing
    from sslbench.testing.reference import PluginReference

    kit = getattr(testing, f"check_{kind}")
    accepted = inspect.signature(kit).parameters
    slow = {name: False for name in _SLOW if quick and name in accepted}

    def checked(name: str) -> Any:
        plugin, chosen = session.catalog.choose(kind, name)
        reference = PluginReference.in_catalog(session.catalog, kind, plugin)
        return kit(reference, **{**arguments, **slow, "options": {**chosen, **arguments["options"]}})

    return checked


def _watched(checks: "Checks", kind: Kind, name: str) -> "Checkup":
    from sslbench.screen import Screen

    with Screen(stderr=True).status(f"checking {kind} {name}"):
        return checks(name)


def _forgiving(checks: "Checks", kind: Kind, name: str) -> "Checkup":
    """A plugin that cannot be checked does not keep others from it."""
    from sslbench.testing.rules import Checkup, Verdict

    try:
        return _watched(checks, kind, name)
    except ConfigError as error:
        verdict = Verdict("has the options it needs", "not tried", error.message, error.hint or "")
    except SslbenchError as error:
        verdict = Verdict("can be loaded", "broken", error.message, error.hint or "")
    return Checkup(kind, name, (verdict,))


COMMANDS: dict[str, Callable[..., None]] = {"check": check}
