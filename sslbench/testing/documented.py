"""The options of a plugin of any kind: they tell what they are for, and survive being written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from sslbench.config.options import Options
from sslbench.config.validate import validate_section
from sslbench.testing.rules import BrokenRuleError


def options_of(cls: type[Any], options: Mapping[str, Any] | None) -> Any:
    """The validated options of a plugin.

    Raises:
        ConfigError: with every problem; a required option that is not given is one.
    """
    return validate_section(cls.Config, dict(options or {}), "", "options of the check")


def check_options(cfg: Options) -> str:
    """Every option has a docstring, and options written as YAML or JSON are the same when they are read again.

    Raises:
        BrokenRuleError: naming the option.
    """
    silent = sorted(_undocumented(type(cfg)))
    if silent:
        raise BrokenRuleError(
            f"no docstring: {', '.join(silent)}",
            "write a string under each field of Config: users see it in info, in errors and in the reference",
        )
    try:
        again = type(cfg).model_validate_json(cfg.model_dump_json())
    except ValidationError as error:
        raise BrokenRuleError(
            f"options that are written to a file cannot be read again: {error}", _PLAIN
        ) from error
    different = [name for name in type(cfg).model_fields if getattr(again, name) != getattr(cfg, name)]
    if different:
        raise BrokenRuleError(f"changed by being written and read: {', '.join(different)}", _PLAIN)
    return f"{len(type(cfg).model_fields)} options"


_PLAIN = (
    "runs and checkpoints keep options as JSON: give fields plain types, and validators that accept their results"
)


def _undocumented(model: type[BaseModel]) -> Iterator[str]:
    return (name for name, field in model.model_fields.items() if not field.description)
