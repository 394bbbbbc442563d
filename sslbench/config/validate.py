"""Validation of option models that reports every problem with its origin and the closest known key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from sslbench.config.options import Options
from sslbench.config.renaming import model_in, with_current_keys
from sslbench.errors import ConfigError, did_you_mean


class Problem(NamedTuple):
    """One row of a configuration report."""

    key: str
    message: str
    origin: str


class ConfigProblems(ConfigError):  # noqa: N818 - it is a report
    """All problems of a configuration in one report."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        count = len(problems)
        width = max(len(p.key) for p in problems)
        rows = [f"  {p.key:<{width}}   {p.message}   [{p.origin}]" for p in problems]
        super().__init__(f"{count} problem{'s' if count > 1 else ''}\n" + "\n".join(rows))
        self.problems = tuple(problems)


def validate_section(model: type[Options], values: dict[str, Any], prefix: str, origin: str) -> Any:
    """Validate one section by itself; used where no layers are involved.

    Raises:
        ConfigProblems: with every problem of the section.
    """
    current = with_current_keys(model, values, prefix, origin)
    cfg, problems = check(model, current, prefix, lambda key: origin)
    if problems or cfg is None:
        raise ConfigProblems(problems)
    return cfg


def check(
    model: type[Any], values: Any, prefix: str, origin_of: Callable[[str], str]
) -> tuple[Any, list[Problem]]:
    if not isinstance(values, dict):
        return None, [Problem(prefix, f"must be a section with keys, found {values!r}", origin_of(prefix))]
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        return None, [_problem(model, details, prefix, origin_of) for details in error.errors()]


def _problem(model: type[BaseModel], details: Any, prefix: str, origin_of: Callable[[str], str]) -> Problem:
    path = [str(part) for part in details["loc"]]
    key = ".".join([prefix, *path] if prefix else path)
    if details["type"] == "missing":
        return Problem(key, f"required; write {key}=VALUE", "nothing set it")
    if details["type"] == "extra_forbidden":
        guess = did_you_mean(path[-1], _known_keys(model, path[:-1]))
        return Problem(key, f"unknown key{guess}", origin_of(key))
    message = details["msg"].removeprefix("Value error, ")
    shown = f"{message[0].lower()}{message[1:]}"
    if not isinstance(details["input"], dict | BaseModel):
        shown += f", got {details['input']!r}"
    return Problem(key or "(all)", shown, origin_of(key))


def _known_keys(model: Any, path: Sequence[str]) -> list[str]:
    """Field names of the model that lies at ``path`` inside ``model``."""
    for part in path:
        if part.isdigit():
            continue
        field = getattr(model, "model_fields", {}).get(part)
        model = model_in(field.annotation) if field else None
        if model is None:
            return []
    return list(getattr(model, "model_fields", {}))
