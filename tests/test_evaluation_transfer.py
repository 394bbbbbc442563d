"""Transfer: real child evaluations, failures reported at the end, options checked first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from evals_kit import make_backbone, make_job
from pydantic import ValidationError
from sslbench_plugins.datasets.digits import Digits
from sslbench_plugins.datasets.mnist5k import Mnist5k
from sslbench_plugins.evals.knn import Knn
from sslbench_plugins.evals.linear import Linear
from sslbench_plugins.evals.test import HeldOutTest
from sslbench_plugins.evals.transfer import Transfer, TransferConfig

from sslbench.errors import DataError, PluginError
from sslbench.evaluation.job import run_protocol
from sslbench.plugin.api import Dataset, EvalProtocol

PROTOCOLS: dict[str, type[EvalProtocol]] = {"linear": Linear, "test": HeldOutTest, "knn": Knn}
DATASETS: dict[str, type[Dataset]] = {"digits": Digits, "mnist5k": Mnist5k}
QUICK: dict[str, Any] = {"linear": {"epochs": 3, "lrs": (0.3,)}}


def transfer(tmp_path: Path, options: dict[str, Any]) -> tuple[dict[str, float] | Exception, dict[str, Any]]:
    """Run it with real children; what it returned or raised, and its report."""

    def run_child(
        protocol: str, dataset: str, dataset_options: Mapping[str, Any], child_options: Mapping[str, Any]
    ) -> dict[str, float]:
        if dataset not in DATASETS:
            raise DataError(f"no data set '{dataset}'", hint="sslbench list datasets")
        opened = DATASETS[dataset](DATASETS[dataset].Config(**dataset_options))
        child = PROTOCOLS[protocol](PROTOCOLS[protocol].Config(**child_options))
        return run_protocol(child, make_job(child, tmp_path, dataset=opened, backbone=make_backbone()))

    protocol = Transfer(TransferConfig.model_validate(options))
    job = make_job(protocol, tmp_path, run_child=run_child)
    try:
        outcome: dict[str, float] | Exception = run_protocol(protocol, job)
    except (DataError, PluginError) as error:
        outcome = error
    return outcome, json.loads((job.out_dir / "transfer.json").read_text())


def test_the_mean_of_the_test_accuracies_is_returned(tmp_path: Path) -> None:
    targets = ["digits", {"name": "mnist5k"}, {"name": "digits", "options": {"size": 8}}]
    metrics, report = transfer(tmp_path, {"datasets": targets, "options": QUICK})
    assert isinstance(metrics, dict)
    top1 = [result["test"]["top1"] for result in report["results"].values()]
    assert list(report["results"]) == ["digits", "mnist5k", "digits#2"]
    assert metrics["mean_top1"] == pytest.approx(sum(top1) / 3)
    assert min(top1) > 40
    assert not report["failures"]


def test_a_failing_data_set_is_an_error_after_the_others_are_done(tmp_path: Path) -> None:
    outcome, report = transfer(
        tmp_path, {"datasets": ["nowhere", "digits"], "protocols": ["knn"], "options": {"knn": {"k": 5}}}
    )
    assert isinstance(outcome, DataError)
    assert "1 of 2 data sets failed" in str(outcome)
    assert "nowhere: no data set 'nowhere'" in str(outcome)
    assert outcome.hint == "sslbench list datasets"
    assert report["results"]["digits"]["knn"]["top1"] > 80
    assert report["mean_top1"] == report["results"]["digits"]["knn"]["top1"]


def test_a_last_protocol_without_top1_is_said_so(tmp_path: Path) -> None:
    outcome, _ = transfer(tmp_path, {"datasets": ["digits"], "protocols": ["linear"], "options": QUICK})
    assert "'linear' returns no 'top1'" in str(outcome)


def test_options_for_a_protocol_that_does_not_run_are_refused() -> None:
    with pytest.raises(ValidationError, match="options for knn, which protocols does not list"):
        TransferConfig.model_validate({"datasets": ["digits"], "options": {"knn": {}}})
