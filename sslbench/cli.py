"""The command line: the program, its global options, and what becomes of errors."""

import io
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from sslbench import __version__
from sslbench.commands import checking, looking, planning, running, scaffolding, submitting
from sslbench.commands.options import Session
from sslbench.commands.parsing import Command, Group
from sslbench.errors import ExitCode, PreemptedError, described
from sslbench.plugin.catalog import Catalog
from sslbench.terminal import hoisted, is_terminal, report

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # The frames around help are for people: drawing them takes longer than all the rest.
    rich_markup_mode="rich" if is_terminal() else None,
    help="Benchmark self-supervised visual representation learning.",
    epilog="A first run: sslbench pretrain --method simclr, then sslbench compare.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sslbench {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", "-p", help="Load a local plugin FILE.py, or block one: no:NAME. Repeatable."),
    ] = None,
    registry: Annotated[str | None, typer.Option(metavar="PATH", help="Use this registry.yaml.")] = None,
    runs: Annotated[
        str, typer.Option(metavar="PATH", help="Folder of the run directories.", envvar="SSLBENCH_RUNS")
    ] = "runs",
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit."),
    ] = False,
) -> None:
    context.obj = Session(
        Catalog.from_options(plugin or ()),
        Path(registry) if registry else None,
        Path(runs),
        tuple(context.obj or ()),
    )


_MODULES = (running, submitting, planning, looking, checking, scaffolding)
_COMMANDS = {name: command for module in _MODULES for name, command in module.COMMANDS.items()}
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Command, context_settings=submitting.SETTINGS.get(_name))(_command)


def run(arguments: list[str] | None = None) -> int:
    """Run one command, turn every error into a message, and return the exit code.

    Args:
        arguments: words after ``sslbench``; unset: those of this process.
    """
    try:
        _invoke(hoisted(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as finished:  # Typer ends every command with one
        if isinstance(finished.__context__, BrokenPipeError):
            return ExitCode.OK
        return finished.code if isinstance(finished.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        report(PreemptedError("interrupted", hint="what was finished is kept; give the same command again"))
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of a listing (head, less) went away: not an error of ours.
        _discard_output()
        return ExitCode.OK
    except Exception as error:  # noqa: BLE001 - the last line of defence against a bare traceback
        if os.environ.get("SSLBENCH_DEBUG"):
            traceback.print_exc()
        problem = described(error)
        report(problem)
        if isinstance(error, OSError) and error.filename is None:
            _discard_output()
        return problem.exit_code
    return ExitCode.OK


def _invoke(arguments: list[str]) -> None:
    try:
        app(arguments, obj=arguments)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # while an error can still be reported


def _discard_output() -> None:
    """Python writes what is left of the output when it ends, and would fail again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """The command ``sslbench``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name with an umlaut on an ASCII terminal is no error
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())


if __name__ == "__main__":
    main()
