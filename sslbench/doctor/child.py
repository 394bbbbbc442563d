"""The process in which ``doctor`` imports plugins: each module in a fork of its own, torch imported before.

It reads a request (JSON) from stdin and writes one JSON line per module to stdout. A module that crashes, hangs or
calls ``exit`` ends its own fork only; what it prints goes nowhere.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sslbench.errors import DataError, MissingExtraError, PluginError, SslbenchError
from sslbench.plugin.catalog import Catalog
from sslbench.plugin.entry import Entry, Kind, Registered

Answer = dict[str, Any]
SHARED = ("torch", "torchvision", "sslbench.engine.worker")
"""What every run imports: none of it is a plugin's fault."""


def main() -> None:
    request = json.load(sys.stdin)
    results = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    allowed = request["allowed"]
    catalog = Catalog(
        tuple(map(Path, request["local"])),
        frozenset(request["blocked"]),
        None if allowed is None else frozenset(allowed),
    )
    _import_what_plugins_share()
    for group in request["groups"]:
        answer = _in_fork(lambda group=group: examine(catalog, group), request["seconds"])  # type: ignore[misc]
        os.write(results, (json.dumps({"module": group["module"], **answer}) + "\n").encode())


def _import_what_plugins_share() -> None:
    for module in SHARED:
        importlib.import_module(module)


def _in_fork(work: Callable[[], Answer], seconds: float) -> Answer:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        with os.fdopen(theirs, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(theirs)
    text = _read(ours, seconds)
    if text is None:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if text is None:
        return {"failure": f"still importing after {seconds:g} s"}
    if not text:
        return {"failure": f"its process {_ending(status)}"}
    answer: Answer = json.loads(text)
    return answer


def _read(pipe: int, seconds: float) -> bytes | None:
    """All that comes until the other side closes; None if that takes too long."""
    text, deadline = b"", time.monotonic() + seconds
    with os.fdopen(pipe, "rb", buffering=0) as file:
        while select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = file.read(65536)
            if not part:
                return text
            text += part
    return None


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}"


def examine(catalog: Catalog, group: Answer) -> Answer:
    """Load what a module has registered.

    Args:
        group: ``entries`` as (kind, name, address); the kind is ``extension`` for observers.
    """
    started = time.perf_counter()
    seconds = 0.0
    answers: list[Answer] = []
    for kind, name, address in group["entries"]:
        loaded = _loaded(catalog, kind, address)
        seconds = seconds or time.perf_counter() - started  # the first one imports the module
        answers.append({"kind": kind, "name": name, "address": address, **loaded})
    return {"seconds": seconds, "entries": answers}


def _loaded(catalog: Catalog, kind: str, address: str) -> Answer:
    try:
        if kind == "extension":
            return _extension(next(e for e in catalog.observers() if e.address == address))
        return {"facts": _FACTS[kind](catalog.load(kind, address))}  # type: ignore[arg-type]
    except MissingExtraError as error:
        return {"missing": error.package, "advice": error.hint}
    except SslbenchError as error:
        return {"problem": error.message, "advice": error.hint}
    except Exception as error:  # noqa: BLE001 - a foreign plugin may fail in any way
        return {"problem": f"{type(error).__name__}: {error}"}


def _extension(entry: Registered) -> Answer:
    from sslbench.plugin.extensions import open_extension

    extension = open_extension(entry)
    if extension.problem:
        raise PluginError(extension.problem, hint=f"block it: -p no:{entry.distribution}")
    rows = [row for found in extension.call("sslbench_health_checks") for row in found]
    return {"health": [(str(name), bool(passed), str(advice)) for name, passed, advice in rows]}


def _method(cls: Any) -> Answer:
    return {"requires": sorted(cls.requires), "uses_labels": bool(cls.uses_labels)}


def _backbone(cls: Any) -> Answer:
    return {"provides": sorted(cls.provides)}


def _dataset(cls: Any) -> Answer:
    field = cls.Config.model_fields.get("root")
    if field is None:
        return {}
    root = None if field.is_required() or field.default is None else str(field.default)
    return {"root": root, "layout": _layout(cls) or _summary(cls)}


def _layout(cls: Any) -> str:
    """What the data set says when its files are missing."""
    try:
        dataset = cls(cls.Config.model_validate({"root": "ROOT"}))
        dataset.split(dataset.info.splits[0])
    except DataError as error:
        return error.message.partition("expected layout:")[2].strip()
    except Exception:  # noqa: BLE001 - it needs other options as well
        return ""
    return ""


def _summary(cls: Any) -> str:
    module = inspect.getmodule(cls)
    return (inspect.getdoc(module) or "").partition("\n")[0]


def _eval(cls: Any) -> Answer:
    return {"version": int(cls.version), "metrics": sorted(cls.metrics)}


_FACTS: dict[str, Callable[[Any], Answer]] = {
    "method": _method,
    "backbone": _backbone,
    "dataset": _dataset,
    "eval": _eval,
}


def groups(entries: Sequence[Entry], observers: Sequence[Registered]) -> list[Answer]:
    """Modules with what they have registered, for a request."""
    found: dict[str, list[tuple[Kind | str, str, str]]] = {}
    for entry in entries:
        found.setdefault(entry.module, []).append((entry.kind, entry.name, entry.address))
    for observer in observers:
        found.setdefault(observer.module, []).append(("extension", observer.name, observer.address))
    return [{"module": module, "entries": listed} for module, listed in found.items()]


if __name__ == "__main__":
    main()
