"""Projection and prediction heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import nn

Activation = Literal["relu", "leaky-relu", "gelu"]
_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky-relu": partial(nn.LeakyReLU, inplace=True),
    "gelu": nn.GELU,
}


def mlp(
    *dims: int,
    norm: bool = True,
    final_bias: bool = True,
    final_norm: Literal["affine", "plain"] | None = None,
    activation: Activation = "relu",
) -> nn.Sequential:
    """A multi-layer perceptron on rows: Linear, BatchNorm, activation for each hidden layer, then Linear.

    Hidden linear layers keep their bias before the normalisation, as in every paper's code that we follow, so
    parameter counts match theirs.

    Args:
        dims: widths from input to output, at least two; ``mlp(2048, 4096, 256)`` has one hidden layer.
        norm: batch normalisation of the hidden layers (off in MoCo v2).
        final_bias: bias of the last layer (off in BYOL and SCRL).
        final_norm: batch normalisation of the output, with learnt scale and shift (``affine``, NNCLR) or without
            (``plain``, SimSiam).
        activation: ``leaky-relu`` (slope 0.01) is what the relational reasoning code uses.
    """
    layers: list[nn.Module] = []
    for width, next_width in pairwise(dims[:-1]):
        layers.append(nn.Linear(width, next_width))
        if norm:
            layers.append(nn.BatchNorm1d(next_width))
        layers.append(_ACTIVATIONS[activation]())
    layers.append(nn.Linear(dims[-2], dims[-1], bias=final_bias))
    if final_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=final_norm == "affine"))
    return nn.Sequential(*layers)
