"""Two processes evaluate as one does: every image once, the same heads, one cache file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from evals_kit import make_backbone, make_job
from sslbench_plugins.evals.linear import Linear, LinearConfig
from sslbench_plugins.evals.test import HeldOutOptions, HeldOutTest

from sslbench.evaluation.job import run_protocol

WORLD = 2
OPTIONS: dict[str, Any] = {"epochs": 2, "lrs": (0.3,), "augment": "crop-flip", "train_batch": 127}


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Linear with augmentation, then test, twice: the second time the features come from the cache."""
    results = []
    for _ in range(2):
        linear, final = Linear(LinearConfig(**OPTIONS)), HeldOutTest(HeldOutOptions())
        for protocol in (linear, final):
            job = make_job(protocol, run_dir, backbone=make_backbone(), cache_dir=run_dir / "cache")
            results.append(run_protocol(protocol, job))
    return {"results": results, "table": tuple(job.features("test"))}


def on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(evaluate(folder / "two"), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    mp.spawn(on_rank, args=(tmp_path,), nprocs=WORLD)
    alone = evaluate(tmp_path / "one")
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert torch.equal(found["table"][2], alone["table"][2])
        torch.testing.assert_close(found["table"][0], alone["table"][0], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(found["results"], alone["results"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(list((tmp_path / "two" / "cache").iterdir())) == 2
