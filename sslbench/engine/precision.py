"""Which numbers a network computes with, and the scale that keeps small gradients representable in fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from sslbench import comm
from sslbench.config.schema import TrainOptions
from sslbench.engine.layout import has_fast_bf16

Precision = Literal["fp32", "bf16", "fp16"]
_HALF: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(options: TrainOptions, device: torch.device) -> Precision:
    """What ``train.precision`` means on ``device``."""
    if options.precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return options.precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which networks compute in ``precision``."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, _HALF[precision])


class LossScaler(torch.amp.GradScaler):
    """Scales losses before the backward pass; all ranks agree on the scale and on the steps to skip.

    Multiplied by a large number, gradients below fp16's smallest one (6e-8) survive. Where one overflows, the step
    is skipped and the scale halved; after 2000 good steps in a row it doubles (Micikevicius et al., "Mixed
    precision training", ICLR 2018, section 3.2).
    """

    def unscale(self, optimizer: Optimizer) -> bool:
        """Divide the gradients of ``optimizer`` by the scale.

        Returns:
            Whether all of them are finite on all ranks. Reading that waits for the device.
        """
        self.unscale_(optimizer)
        found: list[torch.Tensor] = list(self._found_inf_per_device(optimizer).values())
        for flag in found:
            flag.copy_(comm.all_sum(flag))  # a rank may keep a part of the parameters only
        return not any(bool(flag) for flag in found)


def loss_scaler(precision: Precision, device: torch.device) -> LossScaler | None:
    """What fp16 needs and the others do not."""
    return LossScaler(device.type) if precision == "fp16" else None
