"""From a configuration to devices and torch's switches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sslbench.config.schema import TrainOptions
from sslbench.engine.precision import choose_precision
from sslbench.engine.setup import prepare_torch


@pytest.fixture
def _torch_switches() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("_torch_switches")
def test_deterministic_kernels_do_not_fill_new_memory() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    prepare_torch(TrainOptions(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    with torch.profiler.profile() as profile:
        torch.empty(1000)
    assert "aten::fill_" not in {event.key for event in profile.key_averages()}


def test_a_gpu_that_emulates_bf16_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    cuda = torch.device("cuda")
    assert choose_precision(TrainOptions(precision="auto"), cuda) == "fp32"
    assert choose_precision(TrainOptions(precision="bf16"), cuda) == "bf16"
