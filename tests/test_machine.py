"""Memory, threads and layout that a process settles on."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sslbench.config.schema import TrainOptions
from sslbench.cores import cpu_quota
from sslbench.engine.layout import faster_layout, has_fast_bf16, vector_lanes
from sslbench.engine.machine import respect_cpu_quota, wait_passively
from sslbench.engine.setup import choose_layout

CPU = torch.device("cpu")

_HEAP = """
import ctypes, sys
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "prepared":
    from sslbench.engine.machine import prepare_process
    prepare_process()
    assert "torch" not in sys.modules
before = libc.mallinfo2()
block = libc.malloc(ctypes.c_size_t(200 << 20))
during = libc.mallinfo2()
libc.free(block)
print(during.hblks - before.hblks, (libc.mallinfo2().arena - before.arena) >> 20)
"""


def _large_block(mode: str) -> list[int]:
    """Mappings of its own that a block of 200 MiB takes, and the MiB that the heap keeps after it is freed."""
    run = subprocess.run([sys.executable, "-c", _HEAP, mode], capture_output=True, text=True, check=True)
    return [int(word) for word in run.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc >= 2.33")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    assert _large_block("plain") == [1, 0]
    own, kept = _large_block("prepared")
    assert own == 0
    assert kept >= 199


def test_threads_still_get_large_blocks() -> None:
    """Their heaps are of limited size: larger blocks need mappings after all."""
    code = """
from sslbench.engine.machine import prepare_process
prepare_process()
import threading, torch
sums = []
threads = [threading.Thread(target=lambda: sums.append(float(torch.ones(50 << 20).sum()))) for _ in range(2)]
[t.start() for t in threads]; [t.join() for t in threads]
assert sums == [50 << 20] * 2, sums
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert cpu_quota(tmp_path, tmp_path / "none") == cores


def test_no_control_group_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "none") is None


def test_a_quota_below_the_cores_limits_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslbench.engine.machine.cpu_quota", lambda: 3)
    monkeypatch.setattr("sslbench.engine.machine.allowed_cores", lambda: 64)
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
    assert faster_layout(_network(lanes), CPU, half=True) == torch.contiguous_format
    assert faster_layout(_network(2 * lanes), CPU, half=True) == torch.channels_last


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
