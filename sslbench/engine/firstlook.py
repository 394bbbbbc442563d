"""A first look at what a plugin gives: what is not as promised is named before something trips over it."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslbench.errors import PluginError, SslbenchError
from sslbench.plugin.api import Backbone, Features


def check_backbone(backbone: Backbone, side: int, device: torch.device) -> None:
    """Look at the features of one grey image; weights, statistics and generators stay as they are.

    Args:
        backbone: as it was built, on the CPU.
        side: of the image in pixels.
        device: that it is to run on. What only works there cannot be looked at.

    Raises:
        PluginError: it fails, or what it returns is not what it promised.
    """
    _check_facts(backbone)
    try:
        found = _features(backbone, side)
    except (SslbenchError, MemoryError):
        raise
    except Exception as error:
        if device.type != "cpu":
            return
        raise PluginError(
            f"backbone '{backbone.name}' failed on an image of {side}x{side}{_place(backbone, error)}: "
            f"{type(error).__name__}: {error}",
            hint=_hint(backbone),
        ) from error
    _check_features(backbone, found, side)


def _check_facts(backbone: Backbone) -> None:
    for fact in ("dim", "stride"):
        if not isinstance(getattr(backbone, fact, None), int):
            raise PluginError(
                f"backbone '{backbone.name}' does not tell its {fact}",
                hint=f"set {fact} on the class or in its __init__: a whole number",
            )


def _features(backbone: Backbone, side: int) -> Any:
    modes = {module: module.training for module in backbone.modules()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return backbone.eval()(torch.zeros(1, 3, side, side))
    finally:
        for module, training in modes.items():
            module.training = training


def _check_features(backbone: Backbone, found: Any, side: int) -> None:
    if not isinstance(found, Features):
        raise _broken(backbone, f"returned {_named(found)}", "Features(pooled=..., map=...)")
    expected = (1, backbone.dim)
    if not isinstance(found.pooled, Tensor) or found.pooled.shape != expected:
        raise _broken(backbone, f"gave pooled features {_shown(found.pooled)}", f"[1, {backbone.dim}] (its dim)")
    if "map" not in backbone.provides:
        return
    if not isinstance(found.map, Tensor) or found.map.ndim != 4 or found.map.shape[:2] != expected:
        raise _broken(backbone, f"gave a map {_shown(found.map)}", f"[1, {backbone.dim}, h, w] (its dim)")
    cells = side / backbone.stride
    if any(abs(places - cells) >= 2 for places in found.map.shape[2:]):  # unpadded convolutions lose a border
        raise _broken(
            backbone,
            f"gave a map {_shown(found.map)} of {side}x{side} pixels",
            f"a cell for every {backbone.stride} pixels (its stride)",
        )


def without_loss(output: object) -> str:
    """In words, what a method returned that has no loss."""
    if not isinstance(output, dict):
        return f"{_named(output)} instead of a dictionary with 'loss'"
    keys = ", ".join(map(str, output))
    return f"a dictionary with {keys}, without 'loss'" if keys else "an empty dictionary, without 'loss'"


def _broken(backbone: Backbone, did: str, promised: str) -> PluginError:
    return PluginError(
        f"backbone '{backbone.name}' {did} for one image; promised: {promised}", hint=_hint(backbone)
    )


def _hint(backbone: Backbone) -> str:
    return f"sslbench check backbone {backbone.name}   tries all that is expected of a backbone"


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _named(value: Any) -> str:
    return f"a tensor {_shown(value)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _place(backbone: Backbone, error: BaseException) -> str:
    """The deepest line of the backbone's own file that led to an error."""
    file = inspect.getfile(type(backbone))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
