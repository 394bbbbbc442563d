"""Sinkhorn-Knopp: codes that spread the samples of all ranks equally over the prototypes.

Cuturi, "Sinkhorn Distances", NeurIPS 2013; as used by SeLa (Asano et al., ICLR 2020) and SwAV (Caron et al.,
NeurIPS 2020, section 3.1 and appendix A.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslbench import comm
from sslbench.nn.losses import no_autocast

_FP32_RANGE = 80.0
"""exp(-80) is still a normal fp32 number."""

SMALLEST_EPSILON = 0.003
"""For cosines: exp(-2 / 0.003) is still a normal float64, so no sample loses its code."""


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, *, tolerance: float | None = None) -> Tensor:
    """Soft codes of this rank's samples, balanced over the samples of all ranks.

    Each round gives every prototype the same total, then every sample the total 1. The sample's step comes last,
    so the former holds approximately.

    Args:
        scores: ``[B,K]`` similarities of samples and prototypes; ``B`` may differ between ranks, and be zero on
            some. Adding a constant changes nothing.
        epsilon: weight of the codes' entropy; smaller is sharper.
        iterations: rounds, at least 1.
        tolerance: stop early once the prototypes' relative deviations from equal totals sum to this or less, which
            makes each round wait for the device. None: never.

    Returns:
        ``[B,K]`` without gradient, each row sums to 1. float64 for float64 scores, else fp32 in any autocast.
    """
    wanted = torch.float64 if scores.dtype == torch.float64 else torch.float32
    # Cosines divided by a small epsilon spread wider than the exponents of fp32 reach.
    inner = torch.float64 if 2 / epsilon > _FP32_RANGE else wanted
    with no_autocast(scores):
        # In place: over a whole data set one copy takes gigabytes.
        codes = scores.to(inner, copy=True).div_(epsilon)
        codes.sub_(_global_maximum(codes)).exp_()
        for number in range(iterations):
            totals = comm.all_sum(codes.sum(dim=0))
            if tolerance is not None and number > 0 and _deviation(totals) <= tolerance:
                break
            _divide_(codes, totals)
            _divide_(codes, codes.sum(dim=1, keepdim=True))
    return codes.to(wanted)


def hard_codes(codes: Tensor) -> Tensor:
    """One-hot ``[B,K]`` of each row's largest entry."""
    return torch.zeros_like(codes).scatter_(1, codes.argmax(dim=1, keepdim=True), 1.0)


def _global_maximum(logits: Tensor) -> Tensor:
    return comm.all_max(logits.amax() if logits.numel() else logits.new_full((), -torch.inf))


def _deviation(totals: Tensor) -> float:
    return float((totals / totals.mean() - 1).abs().sum())


def _divide_(codes: Tensor, sums: Tensor) -> None:
    """A sample or prototype far from all others may have underflown to zero and stays there."""
    codes.div_(sums.clamp_min(torch.finfo(sums.dtype).tiny))
