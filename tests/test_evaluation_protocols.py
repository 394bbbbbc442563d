"""Logistic, low-shot, retrieval and SVM protocols: what they choose on, what they report, who opens ``test``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_kit import make_dataset, make_job
from sklearn.metrics import average_precision_score
from sslbench_plugins.datasets.digits import Digits
from sslbench_plugins.evals.logistic import Logistic, LogisticConfig, LogisticTest
from sslbench_plugins.evals.lowshot import Amount, LowShot, LowShotConfig, LowShotTest, draw
from sslbench_plugins.evals.retrieval import Retrieval, RetrievalConfig, RetrievalTest
from sslbench_plugins.evals.svm import COSTS, Svm, SvmConfig, SvmTest, stratified_folds
from torch.nn import functional as F

from sslbench.config.options import Options
from sslbench.data.sources import ArraySource
from sslbench.errors import CheckpointError, ConfigError, DataError, DivergedError, PluginError
from sslbench.evaluation.job import run_protocol
from sslbench.evaluation.ranking import Gallery
from sslbench.plugin.api import Dataset, DatasetInfo, EvalOptions, EvalProtocol, Job

FEW = LowShotConfig(shots=(1, 4), percents=(10,), draws=3, strengths=(1e-3, 1e-1))


def run(protocol: EvalProtocol, folder: Path, **changes: Any) -> tuple[dict[str, float], Any]:
    """Metrics and the content of the report."""
    job = make_job(protocol, folder, **changes)
    metrics = run_protocol(protocol, job)
    return metrics, json.loads((job.out_dir / f"{protocol.name}.json").read_text())


def test_logistic_regression_chooses_on_val_and_its_head_is_tested(tmp_path: Path) -> None:
    strengths = (1e-4, 1e-2, 100.0)
    chosen, report = run(Logistic(LogisticConfig(strengths=strengths)), tmp_path)
    tested, details = run(LogisticTest(EvalOptions()), tmp_path)
    best = max(report["by_strength"], key=lambda row: row["val_top1"])
    assert chosen["val_top1"] == best["val_top1"] > 80
    assert chosen["strength"] in strengths[:2]
    head = torch.load(tmp_path / "evals" / "digits" / "logistic" / "head.pt", weights_only=True)
    assert head["trained_on"] == "trainval"
    assert details["n"] == 359
    assert 80 < tested["top1"] == sum(details["confusion"][c][c] for c in range(10)) / 3.59


def test_a_report_on_test_needs_what_was_chosen_before(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'head\.pt' of protocol 'logistic'") as raised:
        run(LogisticTest(EvalOptions()), tmp_path)
    assert raised.value.hint == f"sslbench eval logistic {tmp_path} --dataset digits"


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_reports_on_test_cannot_choose(tmp_path: Path, split: str) -> None:
    class Choosing(EvalProtocol):
        name = "test_mine"
        version = 1
        metrics: Mapping[str, Any] = {"top1": "max"}
        primary = "top1"
        splits = frozenset({"test", split})

        def run(self, job: Job) -> dict[str, float]:
            return {"top1": float(len(job.features(split).labels))}

    protocol = Choosing(Options())
    with pytest.raises(PluginError, match="chooses nothing"):
        run_protocol(protocol, make_job(protocol, tmp_path))


def test_low_shot_accuracy_rises_with_images_and_draws_differ(tmp_path: Path) -> None:
    found, report = run(LowShot(FEW), tmp_path)
    tested, _ = run(LowShotTest(EvalOptions()), tmp_path)
    for metrics in (found, tested):
        assert metrics["top1_1shot"] < metrics["top1_4shot"] < metrics["top1_10pct"]
        three = [metrics[f"top1_{name}"] for name in ("1shot", "4shot", "10pct")]
        assert metrics["mean_top1"] == pytest.approx(sum(three) / 3)
    values = torch.tensor(report["val_top1"]["1shot"])
    assert len(values.unique()) > 1
    assert found["std_1shot"] == pytest.approx(values.std().item(), rel=1e-4)
    assert set(report["strengths"]) == {"1shot", "4shot", "10pct"}


def test_draws_hold_so_many_of_each_class_and_follow_the_generator() -> None:
    labels = make_dataset().split("train").targets
    assert labels is not None
    rows = [draw(labels, 10, Amount("4shot", shots=4), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.bincount(labels[rows[0]]).tolist() == [4] * 10
    assert len(rows[0].unique()) == 40
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    share = draw(labels, 10, Amount("10pct", percent=10), torch.Generator())
    assert torch.bincount(labels[share]).tolist() == [math.ceil(n / 10) for n in torch.bincount(labels).tolist()]


def test_too_few_images_for_a_number_of_shots_is_said(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(DataError, match="class 1 has 1 training images, 2 are wanted"):
        draw(labels, 2, Amount("2shot", shots=2), torch.Generator())


@pytest.mark.parametrize("budget", [1 << 24, 100])
def test_retrieval_equals_ranking_one_query_at_a_time(budget: int) -> None:
    job = make_job(Retrieval(RetrievalConfig()), Path("unused"))
    gallery, queries = job.features("train"), job.features("val")
    few = slice(0, 40)
    ks = (1, 3, 50)
    found = Gallery(gallery.features, gallery.labels, budget).retrieve(
        queries.features[few], queries.labels[few], ks
    )
    for n, (query, label) in enumerate(zip(queries.features[few], queries.labels[few], strict=True)):
        similarity = F.normalize(query, dim=0) @ F.normalize(gallery.features, dim=1).T
        relevant = gallery.labels == label
        ranked = relevant[similarity.argsort(descending=True)]
        assert found.hits[n].tolist() == [bool(ranked[:k].any()) for k in ks]
        assert found.precision[n].tolist() == pytest.approx([float(ranked[:k].float().mean()) for k in ks])
        assert found.average[n].item() == pytest.approx(average_precision_score(relevant, similarity), abs=1e-3)


def test_queries_without_an_answer_are_not_counted() -> None:
    features = torch.eye(3)
    found = Gallery(features, torch.tensor([0, 1, 1])).retrieve(features[:2], torch.tensor([0, 7]), (1,))
    assert found.mean() == ([100.0], [100.0], 100.0)


def test_a_collapsed_backbone_finds_nothing() -> None:
    features, labels = torch.ones(40, 3), torch.arange(40) % 4
    recall, precision, _ = Gallery(features, labels).retrieve(features, labels, (1, 5, 40)).mean()
    assert recall == [0, 0, 100]
    assert precision == [0, 0, 25]


def test_features_that_are_no_numbers_are_not_ranked() -> None:
    broken = torch.full((4, 3), torch.nan)
    with pytest.raises(DivergedError, match="not finite"):
        Gallery(broken, torch.arange(4)).retrieve(broken, torch.arange(4), (1,))


def test_a_test_remembers_the_options_of_what_it_tests(tmp_path: Path) -> None:
    def built_on(strength: float) -> dict[str, str]:
        run(Logistic(LogisticConfig(strengths=(strength,))), tmp_path)
        job = make_job(LogisticTest(EvalOptions()), tmp_path)
        run_protocol(LogisticTest(EvalOptions()), job)
        return dict(job.built_on)

    first, same, other = built_on(1e-2), built_on(1e-2), built_on(1e-1)
    assert first == same
    assert first.keys() == other.keys() == {"logistic"}
    assert first != other


def test_retrieval_on_val_and_on_test(tmp_path: Path) -> None:
    metrics, report = run(Retrieval(RetrievalConfig(ks=(1, 10**6))), tmp_path)
    tested, of_test = run(RetrievalTest(RetrievalConfig()), tmp_path)
    assert [row["k"] for row in report["by_k"]] == [1, 5, 10, report["gallery"]]
    assert report["by_k"][-1]["recall"] == 100
    assert metrics["recall1"] <= metrics["recall5"] <= metrics["recall10"]
    assert of_test["queries"] == 359
    assert of_test["gallery"] == report["gallery"] + report["queries"]
    assert 10 < tested["map"] < 100


class Properties(Dataset):
    """Digits with three properties each; a few images are difficult in the first."""

    name = "properties"

    @property
    def info(self) -> DatasetInfo:
        base = Digits(Digits.Config()).info
        classes = ("even", "above five", "prime")
        return DatasetInfo(classes, base.size, base.mean, base.std, ("train", "val", "test"), task="multilabel")

    def split(self, name: str) -> ArraySource:
        source = Digits(Digits.Config()).split("test" if name == "test" else "train")
        digit = source.targets
        assert digit is not None
        targets = torch.stack([digit % 2 == 0, digit > 5, torch.isin(digit, torch.tensor([2, 3, 5, 7]))], 1).long()
        targets[::29, 0] = -1
        rows = slice(None) if name == "test" else slice(0, 1000) if name == "train" else slice(1000, None)
        return ArraySource(source.pixels()[rows], targets[rows])

    def fingerprint(self) -> str:
        return "properties"


@pytest.mark.parametrize("costs", [(0.5,), (1e-6, 1.0)])
def test_machines_are_judged_by_mean_average_precision(tmp_path: Path, costs: tuple[float, ...]) -> None:
    dataset = Properties(Options())
    found, report = run(Svm(SvmConfig(costs=costs)), tmp_path, dataset=dataset)
    tested, of_test = run(SvmTest(EvalOptions()), tmp_path, dataset=dataset)
    rows = report["per_class"]
    assert found["val_map"] == pytest.approx(sum(row["val_ap"] for row in rows) / 3)
    assert {row["final_cost"] for row in rows} == {costs[-1]}
    assert tested["map"] == pytest.approx(sum(of_test["per_class"].values()) / 3)
    shares = [50, 40, 40]  # of images with the property: what chance would give
    assert all(row["val_ap"] > share + 20 for row, share in zip(rows, shares, strict=True))


def test_machines_are_for_several_labels_per_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes several labels per image"):
        make_job(Svm(SvmConfig()), tmp_path)


def test_costs_are_the_published_ones() -> None:
    assert len(COSTS) == 26
    assert min(COSTS) == 1e-7
    assert max(COSTS) == 100
    assert 2.0**-19 in COSTS
    assert 2.0**-4 in COSTS


def test_folds_hold_their_share_of_both_kinds() -> None:
    sign = torch.where(torch.arange(100) % 10 == 0, 1.0, -1.0)
    fold = stratified_folds(sign, 3)
    counts = [(int((fold == n).sum()), int((sign[fold == n] > 0).sum())) for n in range(3)]
    assert sorted(counts) == [(33, 3), (33, 3), (34, 4)]
    with pytest.raises(DataError, match="cannot be cross-validated"):
        stratified_folds(torch.tensor([1.0, 1.0, -1.0, -1.0]), 3)


def test_one_pass_serves_train_val_and_trainval_of_a_data_set_with_its_own_val(tmp_path: Path) -> None:
    job = make_job(Svm(SvmConfig()), tmp_path, dataset=Properties(Options()), cache_dir=tmp_path / "cache")
    train, val, both = (job.features(split) for split in ("train", "val", "trainval"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert torch.equal(torch.cat([train.features, val.features]), both.features)
    assert torch.equal(torch.cat([train.labels, val.labels]), both.labels)
    assert val.indices.tolist() == list(range(len(val.labels)))
    assert val.features.data_ptr() == both.features[1000:].data_ptr()  # a view: the table is held once
