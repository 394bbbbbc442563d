"""Every protocol on tiny data, as tests of large tables and several ranks run them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_kit import make_backbone, make_dataset, make_job
from sslbench_plugins.datasets.digits import Digits
from sslbench_plugins.evals.knn import Knn, KnnConfig
from sslbench_plugins.evals.linear import Linear, LinearConfig
from sslbench_plugins.evals.logistic import Logistic, LogisticConfig, LogisticTest
from sslbench_plugins.evals.lowshot import LowShot, LowShotConfig, LowShotTest
from sslbench_plugins.evals.retrieval import Retrieval, RetrievalConfig, RetrievalTest
from sslbench_plugins.evals.svm import Svm, SvmConfig, SvmTest
from sslbench_plugins.evals.test import HeldOutOptions, HeldOutTest
from torch import Tensor

from sslbench import comm
from sslbench.config.options import Options
from sslbench.data.sources import ArraySource
from sslbench.evaluation import shards
from sslbench.evaluation.job import run_protocol
from sslbench.plugin import rows
from sslbench.plugin.api import Dataset, DatasetInfo, EvalOptions, EvalProtocol

LRS = (0.03, 0.1, 0.3)


class Properties(Dataset):
    """Digits that are even, large or prime, with a ``val`` of its own."""

    name = "properties"
    Config = Options

    @property
    def info(self) -> DatasetInfo:
        base = Digits(Digits.Config()).info
        names = ("even", "large", "prime")
        return DatasetInfo(names, base.size, base.mean, base.std, ("train", "val", "test"), task="multilabel")

    def split(self, name: str) -> ArraySource:
        source = make_dataset().split("test" if name == "test" else "train")
        assert isinstance(source, ArraySource)
        digit = source.targets
        assert digit is not None
        primes = torch.isin(digit, torch.tensor([2, 3, 5, 7]))
        targets = torch.stack([digit % 2 == 0, digit > 5, primes], 1).long()
        part = slice(None) if name == "test" else slice(0, 600) if name == "train" else slice(600, 800)
        return ArraySource(source.pixels()[part], targets[part])

    def fingerprint(self) -> str:
        return "properties"


def protocols() -> list[tuple[EvalProtocol, Dataset]]:
    """Each with a data set, in an order in which what reports on ``test`` finds what was chosen."""
    single: list[EvalProtocol] = [
        Knn(KnnConfig(ks=(1, 7))),
        Linear(LinearConfig(epochs=1, lrs=LRS)),
        HeldOutTest(HeldOutOptions()),
        Logistic(LogisticConfig(strengths=(1e-3, 1e-2))),
        LogisticTest(EvalOptions()),
        LowShot(LowShotConfig(shots=(4,), percents=(10,), draws=3, strengths=(1e-2, 1e-1))),
        LowShotTest(EvalOptions()),
        Retrieval(RetrievalConfig()),
        RetrievalTest(RetrievalConfig()),
    ]
    several: list[EvalProtocol] = [
        Svm(SvmConfig(costs=(1e-3, 0.1), folds=2, tolerance=1e-6)),
        SvmTest(EvalOptions()),
    ]
    return [(p, make_dataset()) for p in single] + [(p, Properties(Options())) for p in several]


def divided() -> list[tuple[EvalProtocol, Dataset]]:
    """Protocols whose classes or draws ranks share: three of them."""
    return [pair for pair in protocols() if pair[0].name in ("svm", "lowshot")]


def evaluate(
    folder: Path, cache: Path | None, wanted: Sequence[tuple[EvalProtocol, Dataset]] = (), **options: Any
) -> dict[str, Any]:
    """Metrics, reports and saved tensors of some protocols (all, unless told), by name."""
    results: dict[str, Any] = {}
    for protocol, dataset in wanted or protocols():
        job = make_job(protocol, folder, backbone=make_backbone(), dataset=dataset, cache_dir=cache, **options)
        results[protocol.name] = run_protocol(protocol, job)
        comm.barrier()  # the first rank writes reports
        for file in sorted(job.out_dir.iterdir()):
            loaded = json.loads(file.read_text()) if file.suffix == ".json" else _tensors(file)
            results[f"{protocol.name}/{file.name}"] = loaded
    return results


def _tensors(file: Path) -> dict[str, Tensor]:
    content = torch.load(file, weights_only=True)
    found = {**content, **content.get("heads", {})}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def same_bits(one: Any, other: Any) -> bool:
    """Whether two results of :func:`evaluate` are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@contextmanager
def small_device() -> Iterator[None]:
    """Tables of digits are too large to be held, chunks have 50 rows and shards 256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "HELD", 1000)
        patch.setattr(rows, "STREAMED", 50 * 64)
        patch.setattr(shards, "SHARD_ROWS", 256)
        yield
