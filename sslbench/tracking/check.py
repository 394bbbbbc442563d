"""Is the MLflow store within reach?"""

from __future__ import annotations

from sslbench.tracking.store import RejectedError, StoreError, connect, sqlite_path


def check_store(uri: str) -> str | None:
    """Why the store cannot be used, or None. A database that does not exist yet is not created."""
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        folder = database.parent
        return None if folder.is_dir() else f"{folder} is not a folder"
    try:
        connect(uri)
    except (StoreError, RejectedError) as error:
        return f"{uri}: {error}"
    return None
