"""Batch normalisation over the rows of all ranks, or of groups of ranks, on any device.

Ioffe & Szegedy, "Batch Normalization", ICML 2015, section 3, with the moments of the ranks' shares combined as by
Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. torch's
own ``SyncBatchNorm`` exists for accelerators only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslbench import comm
from sslbench.errors import ConfigError


def ranks_that_share(sync_bn: bool | int) -> int:
    """How many consecutive ranks normalise together; fewer than 2: each alone.

    Raises:
        ConfigError: the number does not divide the number of ranks.
    """
    ranks = comm.world() if sync_bn is True else int(sync_bn)
    if ranks > 1 and comm.world() % ranks:
        raise ConfigError(
            f"train.sync_bn={ranks} must divide the number of processes ({comm.world()})",
            hint="train.sync_bn=true normalises over all processes, false over each alone",
        )
    return ranks


def share_statistics(network: nn.Module, sync_bn: bool | int, device: torch.device) -> nn.Module:
    """Let every batch normalisation of ``network`` see the rows of several ranks, as ``train.sync_bn`` says.

    Parameters, buffers and state-dict keys stay as they are. All ranks must call it.

    Args:
        network: changed in place; itself not a normalisation layer.
        sync_bn: True: all ranks share their statistics; a number: so many consecutive ones; False: none do.
        device: where it will train. Accelerators have torch's kernels for this.

    Raises:
        ConfigError: the number does not divide the number of ranks.
    """
    ranks = ranks_that_share(sync_bn)
    if ranks < 2:
        return network
    group = comm.neighbours(ranks)
    if device.type == "cuda":
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(network, group))  # type: ignore[no-untyped-call]
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SharedBatchNorm.like(child, ranks))
    return network


def is_shared(network: nn.Module) -> bool:
    """Whether any normalisation of ``network`` sees the rows of other ranks."""
    return any(isinstance(module, SharedBatchNorm | nn.SyncBatchNorm) for module in network.modules())


def may_be_empty(network: nn.Module, rows: int) -> bool:
    """Whether this rank may send no rows through ``network``, because ranks that share its statistics send some.

    All ranks must call it. torch's own synchronised layers do not count: without rows they fail under autocast.

    Args:
        rows: how many this rank has.
    """
    ranks = next((module.ranks for module in network.modules() if isinstance(module, SharedBatchNorm)), 1)
    if ranks == 1:
        return False
    return bool(comm.stack(torch.tensor([rows]), ranks).any()) or comm.rank() % ranks > 0


class _Moments(NamedTuple):
    """Of the rows of all ranks of a group; equal to the bit on all of them."""

    mean: Tensor
    """``[C]``"""
    variance: Tensor
    """``[C]``, biased."""
    values: int
    """Per channel."""


class SharedBatchNorm(_BatchNorm):
    """Batch normalisation whose mean and variance are those of the rows of several ranks.

    Output, gradients and running statistics are what one process with all these rows would have. Ranks may have
    different numbers of rows, and some none. In eval mode it is an ordinary batch normalisation.
    """

    ranks: int
    """How many consecutive ranks share their statistics. A number, not their group, so that copies can be made."""

    @classmethod
    def like(cls, norm: _BatchNorm, ranks: int) -> Self:
        """With the parameters, buffers and options of ``norm``."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        shared._parameters, shared._buffers = norm._parameters, norm._buffers
        shared.ranks = ranks
        return shared.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[N,C,...]`` to the same shape."""
        if not self.training or comm.world() == 1:
            return super().forward(input)
        with torch.no_grad():
            moments = _moments(input.detach(), self.ranks)
            if self.track_running_stats:
                self._track(moments)
        return cast(Tensor, _Normalize.apply(input, self.weight, self.bias, moments, self.eps, self.ranks))

    def _track(self, moments: _Moments) -> None:
        """Running statistics take the unbiased variance."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = moments.variance * (moments.values / (moments.values - 1))
        self.running_mean.lerp_(moments.mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """One class serves rows, images and volumes."""


def _moments(rows: Tensor, ranks: int) -> _Moments:
    """Moments of all ranks' ``[N,C,...]`` from those of each; no sum of squares is formed, which would cancel."""
    own = rows.numel() // rows.shape[1]
    mean, variance = _own_moments(rows)
    everyone = comm.stack(torch.cat([mean, variance, mean.new_full((1,), own)]), ranks)
    means, variances, counts = torch.split(everyone, [len(mean), len(mean), 1], dim=1)
    values = int(counts.sum())
    if values < 2:
        raise ValueError(f"expected more than 1 value per channel over {ranks} ranks in training, got {values}")
    shares = counts / values
    mean = (shares * means).sum(dim=0)
    variance = (shares * (variances + (means - mean).square())).sum(dim=0)
    return _Moments(mean, variance, values)


def _own_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` of this rank's rows, in fp32 at least; 0 without rows."""
    rows = _wide(rows)
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])
    # The first half of batch normalisation's own kernel: on CPUs 3 to 20 times as fast as var_mean.
    mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
    return mean, variance


def _wide(values: Tensor) -> Tensor:
    """At least fp32: half precision cannot hold sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Normalize(torch.autograd.Function):
    """Normalise by moments that depend on the rows of all ranks.

    The backward sums over ranks what it needs of the gradients, like all collectives of :mod:`sslbench.comm`. The
    gradients of scale and shift stay those of this rank's rows: data-parallel training adds them up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: _Moments,
        eps: float,
        ranks: int,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.moments, ctx.eps, ctx.ranks = moments, eps, ranks
        return _affine(_wide(rows), weight, bias, moments, eps).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad, moments = _wide(grads[0]), ctx.moments
        to_scale, to_shift = _reduced(grad, _wide(rows), moments, ctx.eps)
        to_rows = None
        if ctx.needs_input_grad[0]:
            sums = comm.add_up(torch.stack([to_scale, to_shift]), ctx.ranks)
            to_rows = _to_rows(grad, _wide(rows), weight, moments, sums / moments.values, ctx.eps).to(rows.dtype)
        return (
            to_rows,
            to_scale.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            to_shift if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def _affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None, moments: _Moments, eps: float) -> Tensor:
    """Normalised ``[N,C,...]`` times ``weight`` plus ``bias``, in one pass over memory of any layout."""
    if rows.numel() == 0:
        return rows.clone()
    mean, variance, _ = moments
    return torch.native_batch_norm(rows, weight, bias, mean, variance, False, 0.0, eps)[0]


def _reduced(grad: Tensor, rows: Tensor, moments: _Moments, eps: float) -> tuple[Tensor, Tensor]:
    """``[C]`` sums over this rank's rows: gradient times normalised row, and gradient."""
    mean, variance, _ = moments
    if rows.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    ones = torch.ones_like(mean)
    mask = [False, True, True]
    found = torch.ops.aten.native_batch_norm_backward(
        grad, rows, ones, mean, variance, None, None, False, eps, mask
    )
    return found[1], found[2]


def _to_rows(
    grad: Tensor, rows: Tensor, weight: Tensor | None, moments: _Moments, means: Tensor, eps: float
) -> Tensor:
    """The gradient of the rows: that of the output without its part along the mean and the normalised row.

    Args:
        means: ``[2,C]``: what :func:`_reduced` gives, as means over the rows of all ranks.
    """
    scale = torch.rsqrt(moments.variance + eps) * (1 if weight is None else weight)
    removed = _affine(rows, -scale * means[0], -scale * means[1], moments, eps)
    return removed.addcmul_(grad, scale.view(-1, *[1] * (rows.dim() - 2)))
