"""Noticing that training has gone wrong: since which step, and which numbers are none any more."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sslbench import comm
from sslbench.errors import DivergedError
from sslbench.plugin.api import Method

_SHOWN = 4


class Watch:
    """Looks for losses and weights that are not finite.

    Losses of the steps since the last look stay on the device, where it makes nobody wait to keep them. A CPU has
    its numbers at once: a process of its own looks at each before the weights move, and can still tell which
    gradients are to blame.
    """

    def __init__(self, method: Method, device: torch.device, done: int) -> None:
        self.method = method
        self._at_once = device.type == "cpu" and comm.world() == 1
        self._losses: list[Tensor] = []
        self._seen = done

    def add(self, output: Mapping[str, Tensor], lr: float) -> None:
        """Take note of what a step gave, between its gradients and the update.

        Raises:
            DivergedError: its loss is not finite.
        """
        self._losses.append(output["loss"].detach())
        if self._at_once and not math.isfinite(float(self._losses[-1])):
            scalars = {f"train/{key}": float(value.detach()) for key, value in output.items()}
            raise self._diverged(self._seen + len(self._losses), scalars, lr)

    def look(self, done: int, values: Mapping[str, float], lr: float) -> None:
        """Look at the scalars of a line, averaged over steps and ranks.

        Raises:
            DivergedError: on all ranks, if one is not finite.
        """
        if not all(map(math.isfinite, values.values())):
            raise self._diverged(self._first_bad() or done, values, lr)
        self._losses, self._seen = [], done

    def look_at_weights(self, done: int, lr: float) -> None:
        """Look at all that a checkpoint would hold: a good one must not be replaced by one that is already lost.

        Raises:
            DivergedError: on all ranks, if a loss, weight or buffer is not finite.
        """
        bad = self._first_bad()
        if bad is not None:
            raise self._diverged(bad, {"train/loss": self._summed()[bad - self._seen - 1]}, lr)
        if self._places(dict(self.method.state_dict())):
            raise self._diverged(done, {}, lr)

    def _first_bad(self) -> int | None:
        """The first step since the last look whose loss is not finite on any rank."""
        finite = [math.isfinite(loss) for loss in self._summed()]
        return self._seen + 1 + finite.index(False) if False in finite else None

    def _summed(self) -> list[float]:
        """Losses since the last look, summed over ranks."""
        losses: list[float] = comm.all_sum(torch.stack(self._losses)).tolist() if self._losses else []
        return losses

    def _diverged(self, step: int, scalars: Mapping[str, float], lr: float) -> DivergedError:
        bad = {key: value for key, value in scalars.items() if not math.isfinite(value)}
        words = [f"{key} {value}" for key, value in bad.items()]
        gradients = {name: p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        words += self._described("weights", dict(self.method.state_dict()))
        words += self._described("gradients", gradients)
        error = DivergedError(
            f"not finite at step {step}: {'; '.join(words) or 'the loss'}; learning rate {lr:.4g}",
            hint="start again with a lower optim.lr, a longer optim.warmup_epochs or train.clip_grad",
        )
        error.step = step
        return error

    def _described(self, kind: str, tensors: Mapping[str, Tensor]) -> list[str]:
        bad = self._places(tensors)
        more = ", ..." if len(bad) > _SHOWN else ""
        return [f"{kind} of {len(bad)} of {len(tensors)} ({', '.join(bad[:_SHOWN])}{more})"] if bad else []

    @staticmethod
    def _places(tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of those that are not finite on any rank; one look at the device for all."""
        kept = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
        if not kept:
            return []
        sizes = torch.stack([_size(rows) for rows in comm.own_rows(kept.values())])
        finite = comm.all_sum(sizes).isfinite().tolist()
        return [name for name, good in zip(kept, finite, strict=True) if not good]


def _size(rows: Tensor) -> Tensor:
    """The largest magnitude; of a sharded tensor a rank may have no row."""
    return (
        torch.linalg.vector_norm(rows.detach(), math.inf).double() if rows.numel() else rows.new_zeros(()).double()
    )
