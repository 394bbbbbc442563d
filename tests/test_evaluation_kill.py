"""An extraction that is killed goes on where it was: the finished shards are kept and give the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evals_kit import make_backbone, make_dataset, make_job
from sslbench_plugins.evals.knn import Knn, KnnConfig
from torch import Tensor

from sslbench.evaluation import shards
from sslbench.plugin.api import Backbone, Features

SHARD = 64
LIMIT_S = 120


class Slow(torch.nn.Module):
    """Counts the images that a backbone sees, and takes its time."""

    def __init__(self, inner: Backbone, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds, self.seen = inner, seconds, 0
        self.name, self.cfg, self.dim = inner.name, inner.cfg, inner.dim

    def forward(self, images: Tensor) -> Features:
        time.sleep(self.seconds)
        self.seen += len(images)
        found: Features = self.inner(images)
        return found


def features(cache: Path, seconds: float = 0.0) -> tuple[Tensor, int]:
    """The training images' features, and how many images were looked at for them."""
    shards.SHARD_ROWS = SHARD
    backbone = Slow(make_backbone(), seconds)
    job = make_job(Knn(KnnConfig(batch_size=32)), cache.parent, backbone=backbone, cache_dir=cache)
    return job.features("train").features.clone(), backbone.seen


def finished(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/rows-*"))


@pytest.fixture
def usual_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)


@pytest.mark.slow
def test_killed_extractions_lose_no_finished_shard(tmp_path: Path, usual_shards: None) -> None:
    cache, total = tmp_path / "cache", len(make_dataset().split("train"))
    kept = 0
    for _ in range(3):
        code = f"from test_evaluation_kill import *; features(Path({str(cache)!r}), 0.05)"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
        deadline = time.monotonic() + LIMIT_S
        while len(finished(cache)) < kept + 3:
            assert process.poll() is None, "it should still be at work"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(finished(cache)) >= kept + 3
        kept = len(finished(cache))
    resumed, seen = features(cache)
    assert 0 < seen == total - kept * SHARD
    fresh, all_seen = features(tmp_path / "other")
    assert all_seen == total
    assert torch.equal(resumed, fresh)
    assert not list(cache.glob("*/.*"))
    assert features(cache)[1] == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "footer"])
def test_only_a_damaged_shard_is_computed_again(tmp_path: Path, usual_shards: None, damage: str) -> None:
    cache = tmp_path / "cache"
    fresh, _ = features(cache)
    path = finished(cache)[5]
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    path.write_bytes({"cut": content[:100], "flip": flipped, "empty": b"", "footer": content[:-1]}[damage])
    again, seen = features(cache)
    assert seen == SHARD
    assert torch.equal(again, fresh)
    assert features(cache)[1] == 0


def test_unfinished_files_are_never_taken_for_whole_ones(tmp_path: Path, usual_shards: None) -> None:
    cache = tmp_path / "cache"
    fresh, _ = features(cache)
    path = finished(cache)[2]
    partial = path.with_name(f".{path.name}.abc.partial")
    path.rename(partial)
    again, seen = features(cache)
    assert seen == SHARD
    assert torch.equal(again, fresh)
    assert not partial.exists()


def test_a_disk_that_fills_up_costs_the_cache_and_not_the_features(
    tmp_path: Path, usual_shards: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    expected, _ = features(tmp_path / "other")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # about.json fits, a shard of 16 KB does not
    try:
        found, _ = features(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert torch.equal(found, expected)
    assert "features are not cached" in caplog.text
    assert not finished(tmp_path / "cache")
