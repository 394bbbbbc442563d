"""Activations that are computed again in the backward pass instead of being kept.

Chen et al., "Training deep nets with sublinear memory cost", 2016. Only the inputs of a backbone's segments stay.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslbench.errors import ConfigError
from sslbench.plugin.api import Backbone


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute the segments of every trained backbone in ``network``, changed in place; its keys stay.

    Raises:
        ConfigError: a backbone names no segments.
    """
    for backbone in network.modules():
        if not isinstance(backbone, Backbone) or not any(p.requires_grad for p in backbone.parameters()):
            continue
        segments = backbone.segments()
        if not segments:
            raise ConfigError(
                f"train.checkpoint_activations=true: backbone '{backbone.name}' names no segments",
                hint="train.checkpoint_activations=false, or define segments() in the backbone",
            )
        for segment in segments:
            # A method of the instance, not a wrapper around it: state-dict keys and copies stay what they are.
            segment.forward = types.MethodType(_recomputed, segment)


def _recomputed(segment: nn.Module, *inputs: Tensor, **more: Any) -> Any:
    forward = partial(type(segment).forward, segment, **more)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts = partial(_contexts, segment)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


def _contexts(segment: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _copied_buffers(segment)


@contextmanager
def _copied_buffers(segment: nn.Module) -> Iterator[None]:
    """Inside, running statistics and other buffers are copies: the first pass has moved the real ones already."""
    real = [(module, dict(module._buffers)) for module in segment.modules() if module._buffers]
    for module, buffers in real:
        module._buffers.update({key: None if value is None else value.clone() for key, value in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in real:
            module._buffers.update(buffers)
