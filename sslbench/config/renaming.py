"""Old names of options and plugins in the layers of a configuration become the current ones, with a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from sslbench.config.options import Options
from sslbench.deprecation import tell_user
from sslbench.errors import ConfigError

if TYPE_CHECKING:
    from sslbench.plugin.catalog import Catalog, Kind


def with_current_plugins(values: Mapping[str, Any], kinds: tuple[Kind, ...], catalog: Catalog) -> dict[str, Any]:
    """A layer's values with the current names of the plugins they name."""
    current = dict(values)
    for kind in kinds:
        section = current.get(kind)
        if isinstance(section, dict) and section.get("name"):
            current[kind] = {**section, "name": catalog.current_name(kind, str(section["name"]))}
    if isinstance(current.get("evals"), dict):
        current["evals"] = {catalog.current_name("eval", str(name)): o for name, o in current["evals"].items()}
    run = current.get("run")
    if isinstance(run, dict) and isinstance(run.get("evals"), list | tuple):
        current["run"] = {**run, "evals": [catalog.current_name("eval", str(name)) for name in run["evals"]]}
    return current


def with_current_keys(model: Any, values: Any, prefix: str, origin: str) -> Any:
    """A section's values with the current names of its options, nested ones included.

    Raises:
        ConfigError: an option is given under both of its names.
    """
    if isinstance(values, list | tuple):
        return [with_current_keys(model, item, f"{prefix}.{n}", origin) for n, item in enumerate(values)]
    if not isinstance(values, dict):
        return values
    if values and all(str(key).isdigit() for key in values):  # items of a list, by number
        return {n: with_current_keys(model, item, f"{prefix}.{n}", origin) for n, item in values.items()}
    current = {_current(model, str(key), values, prefix, origin): value for key, value in values.items()}
    return {key: _inside(model, key, value, prefix, origin) for key, value in current.items()}


def model_in(annotation: Any) -> Any:
    """The option model inside an annotation such as ``tuple[ViewSpec, ...]`` or ``Jitter | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (model_in(arg) for arg in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model is not None), None)


def _current(model: type[Options], key: str, values: Mapping[str, Any], prefix: str, origin: str) -> str:
    if key not in model.renamed:
        return key
    renamed = model.renamed[key]
    old, new = (f"{prefix}.{name}" if prefix else name for name in (key, renamed.to))
    if renamed.to in values:
        raise ConfigError(
            f"'{old}' and '{new}' are one option   [{origin}]", hint=f"drop {old}, which is its old name"
        )
    tell_user(f"{renamed.notice('option', old, new)}   [{origin}]")
    return renamed.to


def _inside(model: type[Options], key: str, value: Any, prefix: str, origin: str) -> Any:
    field = model.model_fields.get(key)
    inner = model_in(field.annotation) if field else None
    return with_current_keys(inner, value, f"{prefix}.{key}" if prefix else key, origin) if inner else value
