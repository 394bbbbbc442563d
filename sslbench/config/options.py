"""The base class of every option model, core or plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sslbench.deprecation import Renamed


class Options(BaseModel):
    """Typed, frozen options. Unknown keys are errors; a string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    renamed: ClassVar[Mapping[str, Renamed]] = {}
    """Old keys that are still accepted."""


def cosmetic(default: Any, **kwargs: Any) -> Any:
    """A field that cannot change results (names, paths, logging). It stays out of the config hash."""
    return Field(default, json_schema_extra={"cosmetic": True}, **kwargs)
