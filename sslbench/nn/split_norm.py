"""Batch normalisation in groups: one process normalises as several would, each over its own rows."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.sync_norm import is_shared


def split_batch_norm(network: nn.Module, groups: int) -> None:
    """Let every batch normalisation of ``network`` treat the rows as ``groups`` equal, consecutive groups.

    Parameters, buffers and state-dict keys stay as they are, and in eval mode nothing changes, so the network is
    saved, loaded and evaluated like any other.

    Args:
        network: changed in place; itself not a normalisation layer.
        groups: 1 leaves the network alone.
    """
    if groups == 1:
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SplitBatchNorm.like(child, groups))


class SplitBatchNorm(_BatchNorm):
    """Batch normalisation with one mean and variance per group of rows.

    The running statistics follow the first group, as in data-parallel training that keeps those of rank 0. So a
    checkpoint does not depend on how many processes share the groups.
    """

    groups: int

    @classmethod
    def like(cls, norm: _BatchNorm, groups: int) -> Self:
        """With the parameters, buffers and options of ``norm``."""
        split = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        split._parameters, split._buffers = norm._parameters, norm._buffers
        split.groups = groups
        return split.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[N,C,...]`` to the same shape."""
        if not self.training:
            return super().forward(input)
        first, *others = input.tensor_split(self.groups)
        return torch.cat([super().forward(first), *map(self._normalised, others)])

    def _normalised(self, rows: Tensor) -> Tensor:
        return F.batch_norm(rows, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        """One class serves rows, images and volumes."""


def share_running_statistics(network: nn.Module) -> None:
    """Give all ranks the running statistics of the first group, which are rank 0's.

    Call it after each step: each rank has those of its own first group then, and whatever looks at the network
    between two steps would see another one on each rank.
    """
    if comm.world() == 1:
        return
    norms = (module for module in network.modules() if isinstance(module, _BatchNorm))
    running = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
    if running:
        shared = comm.broadcast(torch.cat(running))
        torch._foreach_copy_(running, torch.split(shared, [len(value) for value in running]))


def local_groups(groups: int, global_batch: int, option: str = "method.bn_groups") -> int:
    """How many of the groups of the global batch this process normalises.

    Args:
        groups: 1 stands for one statistic of the whole batch, which over several processes the core computes.
        global_batch: images that the groups share.
        option: the option that sets ``groups``, for the error message.

    Raises:
        ConfigError: groups do not fall on processes, or the batch on groups.
    """
    world = comm.world()
    if groups > 1 and (groups % world or global_batch % groups):
        raise ConfigError(
            f"{option}={groups} must be a multiple of the number of processes ({world}) and divide "
            f"train.batch_size={global_batch}",
            hint=f"set {option}={world}, or {option}=1 together with train.sync_bn=true",
        )
    return max(1, groups // world)


def check_statistics(network: nn.Module, groups: int, option: str = "method.bn_groups") -> None:
    """Groups of their own and statistics over all processes exclude each other; one group over several processes
    needs them.

    Raises:
        ConfigError: the core normalises over all processes and ``groups`` is not 1, or the other way round.
    """
    synchronised = is_shared(network)
    if groups == 1 and comm.world() > 1 and not synchronised and _normalises(network):
        raise ConfigError(
            f"{option}=1 normalises all images together, which several processes do with train.sync_bn=true only",
            hint=f"set train.sync_bn=true, or {option}={comm.world()}",
        )
    if groups > 1 and synchronised:
        raise ConfigError(
            f"train.sync_bn normalises images of several processes together, but {option}={groups}",
            hint=f"set train.sync_bn=false, or {option}=1",
        )


def _normalises(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())
