"""The command that begins a plugin: new-plugin."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslbench.commands.options import Session
from sslbench.errors import ConfigError, did_you_mean
from sslbench.plugin.catalog import KINDS, Catalog, Kind
from sslbench.plugin.entry import normalized

if TYPE_CHECKING:
    from sslbench.plugin.scaffold import Scaffold


def new_plugin(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="method, dataset, backbone or eval.")],
    name: Annotated[str, typer.Argument(help="What users will type: small letters, digits, - and _.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="New folder; default: sslbench-NAME, here.")
    ] = None,
) -> None:
    """Write a package with a small plugin that works, its test, README and CI file."""
    from sslbench.plugin.scaffold import Scaffold

    session: Session = context.obj
    scaffold = Scaffold(_kind(kind), name)
    folder = out or Path(scaffold.package)
    written = scaffold.write(folder)
    _warn_of_clashes(session.catalog, scaffold)
    typer.echo(f"Wrote {len(written)} files to {folder}; the plugin is {folder / scaffold.module}\n")
    typer.echo("Next:")
    for command in (f"cd {folder}", *scaffold.commands()):
        typer.echo(f"  {command}")


def _kind(word: str) -> Kind:
    for kind in KINDS:
        if word in (kind, f"{kind}s"):
            return kind
    known = ", ".join(KINDS)
    raise ConfigError(f"there is no kind '{word}'{did_you_mean(word, KINDS)}", hint=f"one of: {known}")


def _warn_of_clashes(catalog: Catalog, scaffold: "Scaffold") -> None:
    kind, name = scaffold.kind, scaffold.name
    for entry in catalog.entries(kind):
        if entry.name == name:
            with_both = f"With both installed, '{name}' alone is refused: name one as PACKAGE:{name}"
            same = normalized(entry.distribution) == scaffold.package
            typer.echo(
                f"Warning: {entry.distribution} {entry.version} has the {kind} '{name}' too. "
                f"{'Installing this one replaces it' if same else with_both}, or begin again with another name.",
                err=True,
            )


COMMANDS: dict[str, Callable[..., None]] = {"new-plugin": new_plugin}
