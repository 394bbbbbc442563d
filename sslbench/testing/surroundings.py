"""What a plugin shares with everything else in its process: settings of torch and random generators."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: By what a reader would look for in the plugin's source: how a setting is read, and how it is put back.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, torch.set_default_device),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.set_deterministic_debug_mode": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "torch.backends.cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "torch.autograd.set_detect_anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "os.chdir": (os.getcwd, os.chdir),
}
_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "random.seed": (random.getstate, random.setstate),
    "numpy.random.seed": (np.random.get_state, np.random.set_state),
    "torch.manual_seed": (torch.get_rng_state, torch.set_rng_state),
}


def settings() -> dict[str, Any]:
    """All settings, by the name of the function that changes them."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put settings and generators back as they were."""
    before = settings()
    states = {name: read() for name, (read, _) in _GENERATORS.items()}
    try:
        yield
    finally:
        for name, value in settings().items():
            if value != before[name]:
                _SETTINGS[name][1](before[name])
        for name, state in states.items():
            _GENERATORS[name][1](state)


def scatter(seed: int) -> None:
    """Put the generators of Python, numpy and torch into a state of one's own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_states() -> dict[str, str]:
    """A description of each generator's state, by the name of the function that seeds it."""
    return {
        "random.seed": repr(random.getstate()),
        "numpy.random.seed": repr(np.random.get_state(legacy=False)["state"]),
        "torch.manual_seed": repr(torch.get_rng_state().tolist()),
    }
