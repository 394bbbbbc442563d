"""A method with what it is checked with, and what several rules look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sslbench.data.loader import TrainLoader
from sslbench.plugin.api import Batch, Method, MethodConfig
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import BrokenRuleError, NotTriedError
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
    options: Mapping[str, Any]
    core: Mapping[str, Any]
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
        return training.method(first_batch(training))

    def trains(self) -> None:
        """
        Raises:
            NotTriedError: it does not.
        """
        if not self.cls.trains:
            raise NotTriedError("it trains nothing")

    @cached_property
    def _obstacle(self) -> str:
        try:
            checked_loss(self.output)
            finite = bool(self.training().run(0, 1)[0].isfinite())
        except NotTriedError as reason:
            return str(reason)
        except Exception:  # noqa: BLE001 - another rule reports it
            return "a step must work first"
        return "" if finite else "the loss must be finite first"

    def sound(self) -> None:
        """
        Raises:
            NotTriedError: not even the first step works, which other rules report.
        """
        if self._obstacle:
            raise NotTriedError(self._obstacle)


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
        raise BrokenRuleError(f"forward returned {_shown(output)} instead of a dictionary with 'loss'", _SCALAR)
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
