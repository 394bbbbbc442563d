"""A job's images: what the backbone is shown, for protocols that look at more than pooled features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evals_kit import make_job
from sslbench_plugins.evals.linear import Linear

from sslbench.errors import PluginError
from sslbench.evaluation import job as job_module


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_those_that_features_are_of(split: str, tmp_path: Path) -> None:
    job = make_job(Linear(Linear.Config()), tmp_path)
    table = job.features(split)
    images, labels, indices = (torch.cat(rows) for rows in zip(*job.images(split), strict=True))
    assert torch.equal(labels, table.labels)
    assert torch.equal(indices, table.indices)
    with torch.no_grad():
        assert torch.allclose(job.backbone()(images).pooled, table.features, atol=1e-5)


def test_ranks_share_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat([indices for _, _, indices in make_job(Linear(Linear.Config()), tmp_path).images("val")])
    shares = []
    for rank in range(3):
        monkeypatch.setattr(job_module, "rank_share", lambda total, *_, rank=rank: _third(total, rank))
        job = make_job(Linear(Linear.Config()), tmp_path)
        shares += [indices for _, _, indices in job.images("val")]
    assert torch.equal(torch.cat(shares), whole)


def _third(total: int, rank: int) -> range:
    return range(total * rank // 3, total * (rank + 1) // 3)


def test_a_split_that_is_not_declared_stays_closed(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="only the protocol 'test' may open"):
        next(make_job(Linear(Linear.Config()), tmp_path).images("test"))
