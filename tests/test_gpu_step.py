"""What only a CUDA device can show: a training step does not wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sslbench.config.compose import Layer, compose
from sslbench.config.registry import find_registry, load_registry
from sslbench.config.tree import parse_overrides
from sslbench.engine.optim import build_optimizer
from sslbench.engine.setup import build_parts
from sslbench.plugin.api import Progress
from sslbench.plugin.catalog import Catalog

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


METHODS = [
    "simclr",
    "byol",
    "scrl",
    "supervised",
    "moco",
    "swav",
    "relationnet",
    "rotationnet",
    "deepinfomax",
    "deepcluster",
]


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_an_error")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_device(method: str) -> None:
    items = [f"method.name={method}", "backbone.name=conv4", "dataset.name=digits", "train.batch_size=64"]
    registry = load_registry(find_registry(Path(__file__).parents[1] / "registry.yaml"))
    composed = compose(Catalog(), registry, recipe=None, layers=[Layer("test", parse_overrides(items))])
    parts = build_parts(composed, print)
    assert parts.loader is not None
    optimizer = build_optimizer(composed.core.optim, parts.method.param_groups(), parts.method, 64)
    for step, batch in enumerate(parts.loader.batches(0, 3)):
        with torch.autocast("cuda", torch.bfloat16):
            loss = parts.method(batch)["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        parts.method.after_step(Progress(step, 3, 3))
        torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first one fills caches
