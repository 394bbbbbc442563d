"""Small real models and jobs that the evaluation tests share."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from sslbench_plugins.backbones.conv4 import Conv4
from sslbench_plugins.datasets.digits import Digits

from sslbench.config.options import Options
from sslbench.config.schema import DataOptions
from sslbench.evaluation.job import EvaluationJob
from sslbench.plugin.api import Backbone, Dataset, EvalProtocol

CPU = torch.device("cpu")


def make_backbone(seed: int = 0) -> Backbone:
    """A conv4 with random weights and BatchNorm statistics that are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Conv4(Options(), image_size=16)
        backbone.train()
        for _ in range(20):
            backbone(torch.rand(64, 3, 16, 16))
    return backbone


@lru_cache(maxsize=1)
def make_dataset() -> Dataset:
    """The 1,797 digits of scikit-learn."""
    return Digits(Digits.Config())


def make_job(protocol: EvalProtocol, run_dir: Path, **changes: Any) -> EvaluationJob:
    """A job on digits with 16-pixel inputs."""
    parts: dict[str, Any] = {
        "image_size": 16,
        "data": DataOptions(),
        "seed": 1,
        "device": CPU,
        "run_dir": run_dir,
        **changes,
    }
    backbone = parts.pop("backbone", None) or make_backbone()
    dataset = parts.pop("dataset", None) or make_dataset()
    return EvaluationJob(protocol, backbone, dataset, **parts)
