"""A method with what it is checked with, and what several rules look at."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from sslbench.data.loader import TrainLoader
from sslbench.engine.firstlook import without_loss
from sslbench.plugin.api import Batch, Method, MethodConfig
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import BrokenRuleError, NotTriedError
from sslbench.testing.surroundings import scatter
from sslbench.testing.trial import Training, Trial

STEPS = 4
"""Of the toy runs, unless a rule needs more; an epoch of the toy images."""
FULL_PRECISION = (
    "compute losses in full precision: with sslbench.nn.losses.no_autocast(z): loss = ... z.float() ..."
)
_SCALAR = 'return {"loss": loss} with one number for the global batch, such as comm.global_mean(losses)'


@dataclass(frozen=True)
class MethodSubject:
    """What all rules on methods are tried on."""

    reference: PluginReference
    cls: type[Method]
    cfg: MethodConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    core: Mapping[str, Any] = field(default_factory=dict)
    backbone: PluginReference | None = None
    images: int = 128
    batch_size: int = 32
    world: int = 2
    processes: bool = True
    compiled: bool = True
    timeout: float = 120.0

    def training(self, loader: TrainLoader | None = None, **changes: Any) -> Training:
        """A fresh method with its optimiser, with the same initial weights each time.

        Args:
            changes: other fields of the :class:`~sslbench.testing.trial.Trial`.
        """
        return Training(self.trial(**changes), loader)

    def trial(self, **changes: Any) -> Trial:
        """The toy run; ``changes`` are other fields."""
        fields: dict[str, Any] = {
            "method": self.reference,
            "options": self.options,
            "core": self.core,
            "norm": "batch",
            "images": self.images,
            "batch_size": self.batch_size,
            "steps": STEPS,
            "backbone": self.backbone,
        }
        return Trial(**fields | changes)

    @cached_property
    def output(self) -> Any:
        """What the first step's forward pass returns.

        Raises:
            NotTriedError: the method trains nothing.
            Exception: whatever the method raises.
        """
        self.trains()
        training = self.training()
        training.begin(0)
        batch = WatchedBatch.of(first_batch(training))
        try:
            return training.method(batch)
        except Exception:
            if batch.reader:
                raise NotTriedError("it must do without labels first") from None
            raise

    def trains(self) -> None:
        """
        Raises:
            NotTriedError: it does not.
        """
        if not self.cls.trains:
            raise NotTriedError("it trains nothing")

    def returns_a_loss(self) -> None:
        """
        Raises:
            NotTriedError: it does not, which another rule reports.
        """
        try:
            checked_loss(self.output)
        except NotTriedError:
            raise
        except Exception:  # noqa: BLE001 - see above
            raise NotTriedError("a step must give a loss first") from None

    @cached_property
    def _obstacle(self) -> str:
        training = self.training()
        training.begin(0)
        try:
            loss = training.gradients(0, first_batch(training))["loss"]
            training.update(0)
        except Exception:  # noqa: BLE001 - another rule reports it
            return "a step must work first"
        numbers = [loss, *training.method.parameters()]
        return (
            "" if all(number.isfinite().all() for number in numbers) else "a step must give finite numbers first"
        )

    def sound(self) -> None:
        """
        Raises:
            NotTriedError: not even the first step works, which other rules report.
        """
        self.returns_a_loss()
        if self._obstacle:
            raise NotTriedError(self._obstacle)

    @cached_property
    def twins(self) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
        """Losses and last states of two runs that differ in what a run does not seed."""
        runs = []
        for seed in (1, 2):
            scatter(seed)
            training = self.training()
            runs.append((training.run(0, STEPS), training.method.state_dict()))
        return runs

    def repeatable(self) -> None:
        """
        Raises:
            NotTriedError: the same seed gives other results, so that nothing can be compared to the bit.
        """
        self.sound()
        (losses, state), (others, other_state) = self.twins
        if not (
            all(map(torch.equal, losses, others)) and all(map(torch.equal, state.values(), other_state.values()))
        ):
            raise NotTriedError("the same seed must give the same training first")


class WatchedBatch(Batch):
    """Notes who asks for labels."""

    reader: str | None = None

    @classmethod
    def of(cls, batch: Batch) -> Self:
        watched = cls(batch.views, batch.index, batch.draws, batch.labels)
        watched.reader = None
        return watched

    def __getattribute__(self, name: str) -> Any:
        if name == "labels":
            object.__setattr__(self, "reader", caller())
        return super().__getattribute__(name)


def caller() -> str:
    """Whoever called the function that asks."""
    frame = traceback.extract_stack(limit=3)[0]
    return f"{frame.filename}, line {frame.lineno}"


def first_batch(training: Training) -> Batch:
    return next(training.loader.batches(0, 1))


def first_loss(training: Training, seed: int = 0) -> Tensor:
    """Of the first step, without moving any weights.

    Args:
        seed: of torch's generator within the step.
    """
    training.begin(0)
    batch = first_batch(training)
    torch.manual_seed(seed)
    loss: Tensor = training.method(batch)["loss"]
    return loss


def checked_loss(output: Any) -> Tensor:
    """The loss among what a method returned.

    Raises:
        BrokenRuleError: it is no float32 scalar.
    """
    if not isinstance(output, dict) or "loss" not in output:
        raise BrokenRuleError(f"forward returned {without_loss(output)}", _SCALAR)
    loss = output["loss"]
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise BrokenRuleError(f"the loss is {_shown(loss)}", _SCALAR)
    if loss.dtype != torch.float32:
        raise BrokenRuleError(f"the loss is {_shown(loss)}", FULL_PRECISION)
    return loss


def check_reports(output: Mapping[str, Any]) -> None:
    """
    Raises:
        BrokenRuleError: something beside the loss cannot be logged.
    """
    for key, value in output.items():
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise BrokenRuleError(
                f"'{key}', which is to be logged, is {_shown(value)}",
                "return scalar tensors on the device of the loss; .item() would make a GPU wait",
            )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of type {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    return f"a {type(value).__name__}"
