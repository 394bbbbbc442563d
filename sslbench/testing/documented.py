"""The options of a plugin of any kind: they tell what they are for, and survive being written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sslbench.config.options import Options
from sslbench.config.tree import plain, read_yaml
from sslbench.config.validate import validate_section
from sslbench.report.describe import nested_models
from sslbench.testing.rules import BrokenRuleError


def options_of(cls: type[Any], options: Mapping[str, Any] | None) -> Any:
    """The validated options of a plugin.

    Raises:
        ConfigError: with every problem; a required option that is not given is one.
    """
    return validate_section(cls.Config, dict(options or {}), "", "options of the check")


def check_options(cfg: Options) -> str:
    """Every option has a docstring and is the same after it was written to a file; misspelt ones are refused.

    Raises:
        BrokenRuleError: naming the option.
    """
    models = [type(cfg), *nested_models(type(cfg))]
    silent = sorted(f"{model.__name__}.{name}" for model in models for name in _undocumented(model))
    if silent:
        raise BrokenRuleError(
            f"no docstring: {', '.join(silent)}",
            "write a string under each field of Config: users see it in info, in errors and in the reference",
        )
    lax = [model.__name__ for model in models if model.model_config.get("extra") != "forbid"]
    if lax:
        raise BrokenRuleError(
            f"{', '.join(lax)} accepts options that it does not have",
            "derive it from sslbench.plugin.api.Options and leave model_config alone: a misspelt option must not "
            "pass in silence",
        )
    if "name" in type(cfg).model_fields:
        raise BrokenRuleError(
            "an option is called 'name', which is the plugin's own name in configurations", "call it otherwise"
        )
    for name in type(cfg).model_fields:
        _check_round_trip(cfg, name)
    return f"{sum(len(model.model_fields) for model in models)} options"


_PLAIN = "give fields plain types or models derived from Options, and validators that accept their own results"


def _check_round_trip(cfg: Options, name: str) -> None:
    value = getattr(cfg, name)
    try:
        text = yaml.safe_dump(plain(value))
    except yaml.YAMLError:
        raise BrokenRuleError(f"{name}: {value!r} cannot be written to a configuration file", _PLAIN) from None
    try:
        again = type(cfg).model_validate({**plain(cfg), name: read_yaml(text)})
    except ValidationError as error:
        message = f"{name}: {value!r} is refused when it is read from a file: {error.errors()[0]['msg']}"
        raise BrokenRuleError(message, _PLAIN) from None
    if getattr(again, name) != value:
        raise BrokenRuleError(f"{name}: {value!r} is read from a file as {getattr(again, name)!r}", _PLAIN)


def _undocumented(model: type[BaseModel]) -> Iterator[str]:
    """An option to which a subclass gives another default keeps its documentation."""
    bases = [base for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]
    for name in model.model_fields:
        if not any(name in base.model_fields and base.model_fields[name].description for base in bases):
            yield name
