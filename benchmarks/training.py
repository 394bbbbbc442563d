"""A real training inside a timed window: the real loop, loader and automatic settings of a run.

Of a run only checkpoints, probes and the MLflow store are missing; metrics are written to a file every
``train.log_every`` steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from stopwatch import Stopwatch
from window import Window

from sslbench.config.compose import Composed, Layer, compose
from sslbench.config.registry import Registry, load_registry
from sslbench.config.tree import parse_overrides
from sslbench.engine.loop import Loader, Loop
from sslbench.engine.optim import build_optimizer
from sslbench.engine.setup import Parts, build_parts, prepare_torch
from sslbench.plugin.api import Batch, TrainingImages
from sslbench.plugin.catalog import Catalog

HERE = Path(__file__).resolve().parent
COMMON = ("train.epochs=100000", "probe.every=0", "run.evals=[]")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What ``benchmarks/ours.py`` was asked for."""
    composed = configure([*COMMON, *options.options])
    prepare_torch(composed.core.train)
    parts = build_parts(composed, partial(print, file=sys.stderr))
    return windows(composed, parts, options) | settings(parts)


def configure(options: list[str]) -> Composed:
    catalog, registry = plugins()
    return compose(catalog, registry, recipe=None, layers=[Layer("benchmark", parse_overrides(options))])


@cache
def plugins() -> tuple[Catalog, Registry]:
    catalog = Catalog.from_options(str(path) for path in plugin_files())
    return catalog, load_registry(HERE.parent / "registry.yaml")


def plugin_files() -> list[Path]:
    """Ours, and all of the project's where it is not installed but only on the path."""
    installed = Catalog().names("method")
    others = [] if installed else sorted((HERE.parent / "plugins").glob("*/[!_]*.py"))
    return [HERE / "parts.py", *others]


def windows(composed: Composed, parts: Parts, options: argparse.Namespace) -> dict[str, Any]:
    """The training's window, and in the same process, which is warm then, what else is asked for."""
    assert parts.loader is not None
    waiting = waits(parts.device)
    result = train(composed, parts, parts.loader, Window(options.seconds, options.warmup, synchronize=waiting))
    result["memory_mb"] = memory_mb(parts.device)
    if options.ceiling:
        window = Window(options.ceiling, warmup=0, warmup_steps=1, synchronize=waiting)
        result["ceiling"] = train(composed, parts, InMemory(parts.loader), window)
    if options.phases:
        window, watch = Window(options.phases, 0, 2, waiting), Stopwatch(parts.device)
        result["phases"] = train(composed, parts, parts.loader, window, watch)
        result["phases"] |= watch.phases(window.steps, window.seconds)
    return result


def train(
    composed: Composed, parts: Parts, loader: Loader, window: Window, watch: Stopwatch | None = None
) -> dict[str, Any]:
    """Train until the window is over."""
    core = composed.core
    optimizer = build_optimizer(core.optim, parts.method.param_groups(), parts.method, core.train.batch_size)
    assert parts.plan is not None
    watching = watch.watching(parts, optimizer) if watch else nullcontext()
    with tempfile.TemporaryFile("w") as log, watching:
        Loop(
            model=parts.method,
            method=parts.method,
            optimizer=optimizer,
            loader=loader,
            plan=parts.plan,
            observer=Timed(window, log, watch),
            device=parts.device,
            precision=parts.precision,
        ).run()
    return window.result(core.train.batch_size)


class Timed:
    """The observer of a measured run."""

    def __init__(self, window: Window, log: IO[str], watch: Stopwatch | None) -> None:
        self.window = window
        self.log = log
        self.watch = watch

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.log.write(json.dumps({"step": step, "metrics": dict(values)}) + "\n")
        self.log.flush()

    def probe(self, step: int, epoch: int) -> None: ...

    def save(self, step: int, meter: Mapping[str, Any]) -> None: ...

    def should_stop(self) -> bool:
        if self.watch and not self.window.running:
            self.watch.restart()
        return self.window.step()


class InMemory:
    """A loader that gives one batch of another loader again and again."""

    wait_seconds = 0.0

    def __init__(self, loader: Loader) -> None:
        self.steps_per_epoch = loader.steps_per_epoch
        self.images: TrainingImages = loader.images
        self._batch = next(loader.batches(0, 1))

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        for _ in range(start_step, stop_step):
            yield self._batch


def waits(device: torch.device) -> Callable[[], None]:
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def memory_mb(device: torch.device) -> float:
    """The most this process held: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        # getrusage would count what the process that started this one held, too.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def settings(parts: Parts) -> dict[str, Any]:
    """What was chosen automatically."""
    assert parts.loader is not None
    assert parts.plan is not None
    channels_last = parts.loader.views.memory_format == torch.channels_last
    return {
        "precision": parts.precision,
        "layout": "channels-last" if channels_last else "contiguous",
        "threads": torch.get_num_threads(),
        "device": str(parts.device),
        "batch": parts.plan.core.train.batch_size,
        "versions": {name: version(name) for name in ("torch", "torchvision")},
    }
