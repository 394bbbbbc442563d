"""Memory, threads and layout that a process settles on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sslbench.config.schema import TrainOptions
from sslbench.engine.layout import faster_layout, has_fast_bf16, vector_lanes
from sslbench.engine.machine import cpu_quota, respect_cpu_quota, wait_passively
from sslbench.engine.setup import choose_layout

CPU = torch.device("cpu")

_FAULTS = """
import resource, sys
if sys.argv[1] == "prepared":
    from sslbench.engine.machine import prepare_process
    prepare_process()
    assert "torch" not in sys.modules
import torch
torch.set_num_threads(1)
def work():
    tensors = [torch.ones(1 << 20) for _ in range(8)]
    return sum(float(t[0]) for t in tensors)
work(), work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(mode: str) -> int:
    run = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not Path("/lib64/ld-linux-x86-64.so.2").exists(), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    pages = 5 * 8 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert _page_faults("plain") > pages / 2
    assert _page_faults("prepared") < pages / 5


@pytest.mark.parametrize("theirs", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_users_own_wait_policy_stays(theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(theirs, "1")
    wait_passively()
    assert os.environ.get("OMP_WAIT_POLICY", "1") == "1"


def test_idle_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    wait_passively()
    assert os.environ.pop("OMP_WAIT_POLICY") == "passive"


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("", None)]
)
def test_cpu_quota(content: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_quota(tmp_path) == cores


def test_no_control_group_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


def test_a_quota_below_the_cores_limits_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslbench.engine.machine.cpu_quota", lambda: 3)
    monkeypatch.setattr("sslbench.engine.machine._usable_cores", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    respect_cpu_quota()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    respect_cpu_quota()
    assert os.environ["OMP_NUM_THREADS"] == "5"


def _network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 4 * width, 3))


@pytest.mark.parametrize(("capability", "lanes"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4), ("NEON", 4)])
def test_channels_last_needs_channels_that_fill_a_vector(
    capability: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vector_lanes() == lanes
    assert faster_layout(_network(lanes), CPU) == torch.channels_last
    assert faster_layout(_network(lanes - 1), CPU) == torch.contiguous_format
    assert faster_layout(_network(lanes), CPU, bf16=True) == torch.contiguous_format
    assert faster_layout(_network(2 * lanes), CPU, bf16=True) == torch.channels_last


def test_layout_elsewhere() -> None:
    assert faster_layout(_network(3), torch.device("cuda")) == torch.channels_last
    assert faster_layout(nn.Linear(3, 3), CPU) == torch.contiguous_format


def test_a_given_layout_wins() -> None:
    assert choose_layout(TrainOptions(channels_last=True), CPU, _network(1)) == torch.channels_last
    assert choose_layout(TrainOptions(channels_last=False), CPU, _network(64)) == torch.contiguous_format


@pytest.mark.parametrize("amx", [True, False])
def test_cpus_compute_in_bf16_with_amx_only(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert has_fast_bf16(CPU) is amx


def test_a_torch_that_cannot_tell_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert not has_fast_bf16(CPU)
