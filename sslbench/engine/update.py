"""From the gradients of a step to the next weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from sslbench.engine.precision import LossScaler
from sslbench.engine.shards import Shards, clip_gradients
from sslbench.plugin.api import Method, Progress


class Update:
    """Unscale, let the method edit, clip, step.

    Args:
        clip: largest norm of the gradients; None: any.
        clip_each: that of each parameter's by itself, not of all together.
        scaler: for fp16. A step whose gradients overflow is skipped as if it had not been taken: neither weights,
            optimiser, ``before_step`` nor ``after_step`` (EMA, queues) move; only the data and the schedules,
            which are functions of the step, go on.
        shards: for parameters of which each rank keeps some rows.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
        clip_each: bool = False,
        scaler: LossScaler | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.clip = clip
        self.clip_each = clip_each
        self.scaler = scaler
        self.shards = shards

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        torch.autograd.backward(self.scaler.scale(loss) if self.scaler else loss)

    def step(self, progress: Progress) -> bool:
        """Use up the gradients.

        Returns:
            Whether the step was taken, which it always is without ``scaler``.
        """
        self._take_gradients()
        taken = self.scaler is None or self.scaler.unscale(self.optimizer)
        if taken:
            self._move(progress)
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.shards:
            self.shards.drop_gradients()
        return taken

    def _move(self, progress: Progress) -> None:
        self.method.before_step(progress)
        self._take_gradients()
        if self.clip:
            parameters = self.method.parameters()
            held = self.shards.instead_of(parameters) if self.shards else list(parameters)
            clip_gradients(held, self.clip, each=self.clip_each)
        self.optimizer.step()
        self.method.after_step(progress)

    def _take_gradients(self) -> None:
        if self.shards:
            self.shards.take_gradients()
