"""Addresses of stores and of their artifacts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

DEFAULT_DATABASE = "mlflow.db"


def resolve_tracking_uri(option: str | None) -> str:
    """The store to use: the option, ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory.

    SQLite paths become absolute, so that a run can be synchronised from any folder.
    """
    uri = option or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_DATABASE}"
    database = sqlite_path(uri)
    return f"sqlite:///{database.absolute()}" if database else uri


def sqlite_path(uri: str) -> Path | None:
    """The file behind a ``sqlite:///`` address, None for any other store."""
    match = re.fullmatch(r"sqlite:///([^?]+)", uri)
    return Path(unquote(match[1])) if match else None


def local_path(uri: str | None) -> Path | None:
    """The folder behind an artifact address, None if it is not on this machine."""
    if uri is None:
        return None
    parts = urlparse(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def is_server(uri: str) -> bool:
    """Whether requests go over the network."""
    return urlparse(uri).scheme in ("http", "https")
