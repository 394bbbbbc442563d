"""Evaluations within less memory than the table of features takes; the kernel enforces the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memory_kit import ALLOWED, DIM, IMAGES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits private memory as Linux does"),
]


def evaluate(cache: Path, place: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "memory_kit.py", str(cache), place]
    returned = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed counts no longer
    folder = Path(__file__).parent
    return subprocess.run(
        line, cwd=folder, env={**os.environ, **returned}, capture_output=True, text=True, timeout=900
    )


def test_a_mapped_table_may_be_several_times_larger_than_memory(tmp_path: Path) -> None:
    assert 4 * IMAGES * DIM > 4 * ALLOWED
    done = evaluate(tmp_path, "mmap")
    assert done.returncode == 0, done.stderr[-3000:]
    knn, linear = json.loads(done.stdout)
    assert knn["top1"] > 40  # of four classes
    assert linear["val_top1"] > 60
    held = evaluate(tmp_path, "host")
    assert held.returncode == 1
    assert "can't allocate memory" in held.stderr
