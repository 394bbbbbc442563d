"""The training loop. It receives built objects and knows no plugin, file or tracker."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sslbench import comm
from sslbench.config.schema import CoreOptions
from sslbench.engine.accumulate import gathering, part_weights, parts_of
from sslbench.engine.blame import blaming
from sslbench.engine.divergence import Watch
from sslbench.engine.firstlook import without_loss
from sslbench.engine.optim import set_learning_rate, set_weight_decay
from sslbench.engine.precision import LossScaler, Precision, autocast
from sslbench.engine.schedule import learning_rate, peak_lr, weight_decay
from sslbench.engine.shards import Shards
from sslbench.engine.update import Update
from sslbench.errors import PluginError
from sslbench.plugin.api import Batch, Method, Progress, TrainingImages
from sslbench.rng import derive_seed


class Loader(Protocol):
    """What the loop needs of a training loader."""

    steps_per_epoch: int
    wait_seconds: float

    @property
    def images(self) -> TrainingImages: ...

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]: ...


class Observer(Protocol):
    """Who is told what happens. All calls come from every rank."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def probe(self, step: int, epoch: int) -> None: ...
    def save(self, step: int, meter: Mapping[str, Any]) -> None: ...
    def should_stop(self) -> bool: ...


@dataclass
class Plan:
    """How long a run is and where it starts and ends."""

    core: CoreOptions
    steps_per_epoch: int
    start_step: int = 0

    @property
    def steps(self) -> int:
        """Steps of the complete schedule, which a limit does not shorten."""
        return self.core.train.epochs * self.steps_per_epoch

    @property
    def stop_step(self) -> int:
        return min(self.steps, self.core.train.limit or self.steps)

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after ``done`` steps."""
        options = self.core.checkpoint
        if done == self.stop_step:
            return True
        if options.every_steps and done % options.every_steps == 0:
            return True
        epoch, rest = divmod(done, self.steps_per_epoch)
        return bool(options.every) and rest == 0 and epoch % options.every == 0

    def probes_after(self, done: int) -> bool:
        epoch, rest = divmod(done, self.steps_per_epoch)
        every = self.core.probe.every
        return bool(every) and rest == 0 and (epoch % every == 0 or done == self.steps)


@dataclass
class Meter:
    """Sums of scalars on the device since the last line; part of a checkpoint so that lines resume too."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            value = value.detach().double()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.count += 1

    def flush(self) -> dict[str, float]:
        """Means over steps and ranks, read from the device in one go."""
        keys = list(self.sums)
        packed = torch.stack([self.sums[key] for key in keys]) / self.count
        means = (comm.all_sum(packed) / comm.world()).tolist()
        self.sums, self.count = {}, 0
        return dict(zip(keys, means, strict=True))

    def state(self) -> dict[str, Any]:
        return {"sums": {key: value.cpu() for key, value in self.sums.items()}, "count": self.count}

    @classmethod
    def restore(cls, state: Mapping[str, Any], device: torch.device) -> Meter:
        return cls({key: value.to(device) for key, value in state["sums"].items()}, int(state["count"]))


@dataclass
class Clock:
    """Throughput since the last line, without the time spent in probes and checkpoints."""

    global_batch: int
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0
    steps: int = 0
    waited: float = 0.0

    def flush(self, wait_seconds: float) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        values = {
            "perf/images_per_second": self.steps * self.global_batch / seconds,
            "perf/data_wait_share": min(1.0, (wait_seconds - self.waited) / seconds),
            "perf/memory_mb": _memory_mb(),
        }
        self.started, self.paused, self.steps, self.waited = time.perf_counter(), 0.0, 0, wait_seconds
        return values

    def pause(self) -> AbstractContextManager[None]:
        return _Pause(self)


class _Pause(AbstractContextManager[None]):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.clock.paused += time.perf_counter() - self.began


class Loop:
    """Train a method from ``plan.start_step`` to ``plan.stop_step``.

    Args:
        model: the method, perhaps wrapped for data-parallel training.
        method: the method itself.
        lr_factor: on all learning rates, below 1 after a roll-back.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        plan: Plan,
        observer: Observer,
        device: torch.device,
        precision: Precision = "fp32",
        scaler: LossScaler | None = None,
        shards: Shards | None = None,
        meter: Meter | None = None,
        lr_factor: float = 1.0,
    ) -> None:
        self.model = model
        self.method = method
        self.optimizer = optimizer
        self.loader = loader
        self.plan = plan
        self.observer = observer
        self.device = device
        self.precision = precision
        self.core = plan.core
        self.update = Update(
            method,
            optimizer,
            clip=self.core.train.clip_grad,
            clip_each=self.core.train.clip_by == "tensor",
            scaler=scaler,
            shards=shards,
        )
        self.weights = part_weights(self.core.train.batch_size, comm.world(), self.core.train.accumulate)
        self.meter = meter or Meter()
        self.clock = Clock(self.core.train.batch_size, waited=loader.wait_seconds)
        self.peak = lr_factor * peak_lr(self.core.optim, self.core.train.batch_size)
        self.watch = Watch(method, device, plan.start_step)

    def run(self) -> bool:
        """Train.

        Returns:
            True if the run is complete, False if it was asked to stop; its state is saved then.

        Raises:
            DivergedError: the loss is not finite.
            PluginError: the method breaks its contract.
        """
        for done, batch in enumerate(
            self.loader.batches(self.plan.start_step, self.plan.stop_step), self.plan.start_step + 1
        ):
            self._step(Progress(done - 1, self.plan.steps, self.plan.steps_per_epoch), batch)
            stopping = self.observer.should_stop()
            self._after(done, stopping)
            if stopping and done < self.plan.stop_step:
                return False
        return True

    def _step(self, progress: Progress, batch: Batch) -> None:
        if progress.step % self.plan.steps_per_epoch == 0:
            self._start_epoch(progress.epoch)
        # Dropout and the like draw from torch's generators: seeding them per step makes a resumed run exact.
        torch.manual_seed(derive_seed(self.core.run.seed, "step", progress.step, comm.rank()))
        set_learning_rate(self.optimizer, self._lr(progress.step), self.peak)
        set_weight_decay(self.optimizer, weight_decay(self.core.optim, progress.step, progress.steps))
        first = progress.step == self.plan.start_step
        output = self._gradients(batch, first)
        if first:
            self._check_gradients()
        self.watch.add(output, self._lr(progress.step))
        taken = self.update.step(progress)
        if self.precision == "fp16":
            output["skipped"] = torch.tensor(float(not taken), device=self.device)
        self.meter.add(output)
        self.clock.steps += 1

    def _gradients(self, batch: Batch, check: bool) -> dict[str, Tensor]:
        """Go forward and backward; returns what the method reports of the whole batch."""
        parts = list(zip(parts_of(batch, len(self.weights)), self.weights, strict=True))
        reports = []
        for number, (part, weight) in enumerate(parts, 1):
            with gathering(self.model, last=number == len(parts)):
                reports.append(self._forward_backward(part, weight, check))
        if len(reports) == 1:
            return reports[0]
        return {key: torch.stack([report[key] for report in reports]).sum(dim=0) for key in reports[0]}

    def _forward_backward(self, batch: Batch, weight: float, check: bool) -> dict[str, Tensor]:
        plugins = (type(self.method), type(self.method.backbone))
        first_step = blaming(plugins, "in its first step") if check else nullcontext()
        with self._autocast(), first_step:
            output: dict[str, Tensor] = self.model(batch)
        if check:
            self._check_output(output)
        if weight != 1:
            output = {key: weight * value for key, value in output.items()}
        self.update.backward(output["loss"])
        return {key: value.detach() for key, value in output.items()}

    def _start_epoch(self, epoch: int) -> None:
        torch.manual_seed(derive_seed(self.core.run.seed, "epoch", epoch))
        with self.clock.pause(), self._autocast():
            self.method.start_epoch(epoch, self.loader.images)

    def _after(self, done: int, stopping: bool) -> None:
        if done % self.core.train.log_every == 0 or done == self.plan.stop_step:
            self._log(done)
        with self.clock.pause():
            if self.plan.probes_after(done):
                self.observer.probe(done, done // self.plan.steps_per_epoch)
            if stopping or self.plan.saves_after(done):
                self.watch.look_at_weights(done, self._lr(done - 1))
                self.observer.save(done, self.meter.state())

    def _log(self, done: int) -> None:
        values = {f"train/{key}": value for key, value in self.meter.flush().items()}
        self.watch.look(done, values, self._lr(done - 1))
        values["train/lr"] = self._lr(done - 1)
        values["train/epoch"] = done / self.plan.steps_per_epoch
        self.observer.metrics(done, values | self.clock.flush(self.loader.wait_seconds))

    def _lr(self, step: int) -> float:
        return learning_rate(
            self.core.optim,
            peak=self.peak,
            step=step,
            steps=self.plan.steps,
            steps_per_epoch=self.plan.steps_per_epoch,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.precision, self.device)

    def _check_output(self, output: Any) -> None:
        if not isinstance(output, dict) or "loss" not in output:
            raise PluginError(
                f"method '{self.method.name}': forward returned {without_loss(output)}",
                hint='return {"loss": loss} with one number for the global batch',
            )
        loss = output["loss"]
        if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.dtype != torch.float32:
            shown = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise PluginError(f"method '{self.method.name}' must return {{'loss': a float32 scalar}}, got {shown}")

    def _check_gradients(self) -> None:
        """A trainable parameter without a gradient would silently stop averaging between ranks."""
        without = [n for n, p in self.method.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise PluginError(
                f"method '{self.method.name}': {len(without)} trainable parameters received no gradient, "
                f"among them {', '.join(without[:4])}",
                hint="freeze them with requires_grad_(False) or use them in the loss",
            )


def _memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _peak_resident_kib() / 1024


def _peak_resident_kib() -> int:
    """Of this process alone; what ``getrusage`` reports begins with the peak of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
