"""The page of all commands, from the program itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sslbench.errors import ExitCode
from sslbench.report.reference.markdown import table

_COMMANDS = """# Commands

`sslbench --help` and `sslbench COMMAND --help` print the same. Options of the program itself (`-p`, `--registry`,
`--runs`) may stand anywhere. What `KEY=VALUE` can be is told in [configuration](../configuration.md) and
[options](options.md).
"""


def commands_page() -> str:
    """Every command with its arguments and options, and the exit codes."""
    import typer.main

    from sslbench.cli import app

    program: Any = typer.main.get_command(app)
    parts = [_COMMANDS, "## sslbench\n", *_command("sslbench", program)]
    for name, command in program.commands.items():
        parts += [f"## sslbench {name}\n", *_command(f"sslbench {name}", command)]
    codes = ((str(code.value), code.name.lower()) for code in ExitCode)
    parts += ["## Exit codes\n", table(("code", "name"), codes)]
    parts.append("[Configuration](../configuration.md#exit-codes) says what they mean.\n")
    return "\n".join(parts)


def _command(path: str, command: Any) -> Iterator[str]:
    import typer

    params = [p for p in command.get_params(typer.Context(command)) if not getattr(p, "hidden", False)]
    arguments = [param for param in params if param.param_type_name == "argument"]
    options = [param for param in params if param.param_type_name == "option"]
    last = ["COMMAND", "..."] if hasattr(command, "commands") else map(_place, arguments)
    yield f"```text\n{' '.join([path, '[OPTIONS]', *last])}\n```\n"
    yield f"{command.help}\n"
    columns = ("default", "meaning")
    yield table(("argument", *columns), ((f"`{_value(p)}`", _default(p), p.help or "") for p in arguments))
    yield table(("option", *columns), ((_names(p), _default(p), _meaning(p)) for p in options))


def _place(argument: Any) -> str:
    """An argument in the line of usage."""
    shown = _value(argument) if argument.required else f"[{_value(argument)}]"
    return f"{shown}..." if argument.nargs == -1 else shown


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag or option.name == "help" else f"{names} `{_value(option)}`"


def _value(param: Any) -> str:
    """What stands for the value; Typer's own words for types change from version to version."""
    return str(param.metavar or param.name.upper())


def _default(param: Any) -> str:
    if param.param_type_name == "argument" and param.required:
        return "required"
    return "" if param.default in (None, False) or callable(param.default) else f"`{param.default}`"


def _meaning(option: Any) -> str:
    variable = f" Environment: `{option.envvar}`." if option.envvar else ""
    return (option.help or "") + variable
