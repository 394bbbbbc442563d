"""Networks that follow another one by an exponential moving average (target, teacher, key encoder)."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from sslbench import comm


class EMA(nn.Module):
    """A frozen network whose parameters trail those of an online network.

    Only parameters are averaged. Normalisation buffers come from the network's own forward passes, which is why
    its normalisations stay in train mode, as BYOL's and SCRL's authors do. All else is in eval mode: a target
    drops neither units nor paths.

    Args:
        module: the network to freeze and own. Give an independently initialised one, or use :meth:`copy_of`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Only normalisations over the batch are ever in train mode."""
        super().train(mode)
        for module in self.module.modules():
            module.training = mode and isinstance(module, _NormBase)
        return self

    @classmethod
    def copy_of(cls, online: nn.Module) -> Self:
        """Start from the online network's own weights."""
        return cls(copy.deepcopy(online))

    @torch.no_grad()
    def forward(self, *args: Any) -> Any:
        """The network's output, without gradient."""
        return self.module(*args)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """``target <- momentum * target + (1 - momentum) * online`` over parameters."""
        target, source = (comm.own_rows(network.parameters()) for network in (self.module, online))
        torch._foreach_lerp_(target, source, 1 - momentum)


def cosine_momentum(base: float, progress: float) -> float:
    """Momentum that rises along a cosine from ``base`` at progress 0 to 1 at progress 1, as in BYOL."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2
