"""A few real steps on this machine, on synthetic images of the data set's size."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslbench.config.compose import Composed, Selection
from sslbench.data.imagefile import decode_image
from sslbench.engine.loop import Loop, Plan
from sslbench.engine.optim import build_optimizer
from sslbench.engine.setup import build_parts, prepare_torch
from sslbench.errors import PluginError
from sslbench.planning.devices import Device
from sslbench.planning.prediction import Cluster, predict
from sslbench.planning.subject import Subject
from sslbench.plugin.api import Dataset, DatasetInfo, Source

_WARM_UP = 2
"""Steps that are not counted."""
_PATIENCE = 3.0
"""Seconds that a measured step may take by the counts."""
_FEWEST = 8


@dataclass(frozen=True)
class Measured:
    """What steps took."""

    rows: int
    """Images in each."""
    seconds: float
    """Of a step: the median."""
    steps: int

    def __str__(self) -> str:
        rate = self.rows / self.seconds
        return f"{self.steps} measured steps of {self.rows} synthetic images ({rate:,.3g} images/s here)"


@dataclass(frozen=True)
class Speed:
    """How fast this machine is, beside what counts say about it."""

    measured: Measured
    factor: float
    """Speed over that of the counts."""


def compare(subject: Subject, device: Device, cores: int, steps: int) -> Speed:
    """Measure steps of this machine, of as many images as it computes in a few seconds.

    Args:
        device: this machine.
        cores: of it.
        steps: to measure.
    """
    alone = Cluster(device, 1, 1)
    rows = subject.batch
    while rows > _FEWEST and predict(subject.with_batch(rows), alone, cores).seconds > _PATIENCE:
        rows //= 2
    measured = measure(subject, rows, steps)
    counted = predict(subject.with_batch(rows), alone, cores)
    return Speed(measured, counted.seconds / measured.seconds)


def measure(subject: Subject, rows: int, steps: int, timer: Callable[[], float] = time.perf_counter) -> Measured:
    """Train for some steps as a run would, without its files.

    Args:
        rows: images in the batch.
        steps: that count; a few more come before them.
        timer: tells seconds.

    Raises:
        SslbenchError: the method does not accept so small a batch or data set.
    """
    composed = _standing_in(subject, rows, rows * (steps + _WARM_UP + 2))
    core = composed.core
    prepare_torch(core.train)
    parts = build_parts(composed, lambda message: None)
    if parts.loader is None or parts.plan is None:
        raise PluginError(f"method '{composed.method.name}' does not train", hint="sslbench list methods")
    # From the second step on: what a method does before an epoch is no part of a step.
    plan = Plan(parts.plan.core, parts.plan.steps_per_epoch, start_step=1)
    clock = _Clock(timer)
    loop = Loop(
        model=parts.method,
        method=parts.method,
        optimizer=build_optimizer(core.optim, parts.method.param_groups(), parts.method, rows),
        loader=parts.loader,
        plan=plan,
        observer=clock,
        device=parts.device,
        precision=parts.precision,
    )
    loop.run()
    return Measured(rows, clock.median(), steps)


@dataclass
class _Clock:
    """Notes when each step has ended; nothing is logged, probed or saved."""

    timer: Callable[[], float]
    ends: list[float] = field(default_factory=list)

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def probe(self, step: int, epoch: int) -> None: ...
    def save(self, step: int, meter: Mapping[str, Any]) -> None: ...

    def should_stop(self) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(self.timer())
        return False

    def median(self) -> float:
        """Seconds between the ends of two steps."""
        ends = self.ends[_WARM_UP - 1 :]
        return float(np.median(np.diff(ends)))


def _standing_in(subject: Subject, rows: int, images: int) -> Composed:
    """The configuration with another data set and batch, and no more steps than are measured."""
    composed, core = subject.composed, subject.composed.core
    train = core.train.model_copy(update={"batch_size": rows, "limit": images // rows - 1, "log_every": 10**9})
    dataset = Selection("dataset", composed.dataset.name, _stand_in(subject, images), composed.dataset.cfg)
    data = core.data.model_copy(update={"packed_size": None, "cache": False})
    return replace(composed, core=core.model_copy(update={"train": train, "data": data}), dataset=dataset)


def _stand_in(subject: Subject, images: int) -> type[Dataset]:
    """A data set of random images of the subject's size and number of classes."""

    class StandIn(Dataset):
        name = subject.composed.dataset.name

        @property
        def info(self) -> DatasetInfo:
            return DatasetInfo(
                classes=tuple(map(str, range(max(2, subject.classes or 0)))),
                size=subject.size[0] if subject.same_size else None,
                mean=(0.5,) * 3,
                std=(0.25,) * 3,
                splits=("train", "val"),
            )

        def split(self, name: str) -> Source:
            return Pictures(subject, images)

        def fingerprint(self) -> str:
            return ""

    return StandIn


class Pictures(Source):
    """Random images: pixels in memory if they are of one size, else one JPEG that is decoded for each."""

    def __init__(self, subject: Subject, images: int) -> None:
        self._subject = subject
        self._images = images

    def __len__(self) -> int:
        return self._images

    def image(self, index: int) -> Tensor:
        if self._subject.same_size:
            return self._pixels[index]
        return decode_image(self._file, self.describe(index))

    @property
    def targets(self) -> Tensor:
        return torch.arange(self._images) % max(2, self._subject.classes or 0)

    def pixels(self) -> Tensor | None:
        return self._pixels if self._subject.same_size else None

    def image_sizes(self) -> Tensor:
        return torch.tensor(self._subject.size).expand(self._images, 2)

    def common_size(self) -> tuple[int, int] | None:
        return self._subject.size if self._subject.same_size else None

    @cached_property
    def _pixels(self) -> Tensor:
        return torch.randint(256, (self._images, 3, *self._subject.size), dtype=torch.uint8)

    @cached_property
    def _file(self) -> Any:
        """Noise of 8 pixels' width: as many bytes for each pixel as a photograph has."""
        height, width = self._subject.size
        coarse = np.random.default_rng(0).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        written = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
        return np.frombuffer(written.getvalue(), np.uint8)
