"""The evaluation job: allowed splits, frozen backbone, feature cache, exact test counts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_kit import make_backbone, make_dataset, make_job
from sklearn.metrics import confusion_matrix
from sslbench_plugins.datasets.mnist5k import Mnist5k
from sslbench_plugins.evals.linear import Linear, LinearConfig
from sslbench_plugins.evals.test import HeldOutOptions, HeldOutTest

from sslbench.config.options import Options
from sslbench.errors import CheckpointError, DivergedError, PluginError
from sslbench.evaluation.features import state_digests
from sslbench.evaluation.job import evaluation_dir, run_protocol
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job

QUICK = LinearConfig(epochs=3, lrs=(0.3,))


class Nosy(EvalProtocol):
    """Opens what its test tells it to."""

    name = "nosy"
    version = 1
    metrics = {"top1": "max"}  # noqa: RUF012
    primary = "top1"
    splits = frozenset({"val"})
    wanted = "val"
    result: dict[str, float] = {"top1": 1.0}  # noqa: RUF012

    def run(self, job: Job) -> dict[str, float]:
        job.features(self.wanted)
        return self.result


class WellBehaved(Nosy):
    """Options with a size."""

    Config = EvalOptions


def nosy(**changes: Any) -> Nosy:
    return type("Changed", (Nosy,), changes)(Options())


def test_declared_splits_are_disjoint_labelled_and_in_order(tmp_path: Path) -> None:
    job = make_job(Linear(QUICK), tmp_path)
    train, val, both = (job.features(split) for split in ("train", "val", "trainval"))
    assert not set(train.indices.tolist()) & set(val.indices.tolist())
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == both.indices.tolist()
    targets = make_dataset().split("train").targets
    assert targets is not None
    assert torch.equal(val.labels, targets[val.indices])
    assert torch.equal(both.features[val.indices], val.features)


def test_an_undeclared_split_is_refused(tmp_path: Path) -> None:
    protocol = nosy(wanted="train")
    with pytest.raises(PluginError, match="'nosy' opens the split 'train' without declaring it"):
        run_protocol(protocol, make_job(protocol, tmp_path))


@pytest.mark.parametrize("splits", [frozenset({"val"}), frozenset({"val", "test"})])
def test_only_the_protocol_named_test_opens_test(tmp_path: Path, splits: frozenset[str]) -> None:
    protocol = nosy(wanted="test", splits=splits)
    with pytest.raises(PluginError, match="only the protocol 'test' may open"):
        run_protocol(protocol, make_job(protocol, tmp_path))


def test_the_backbone_is_frozen_and_unchanged_bit_for_bit(tmp_path: Path) -> None:
    backbone = make_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    protocol = Linear(LinearConfig(epochs=2, augment="crop-flip"))
    run_protocol(protocol, make_job(protocol, tmp_path, backbone=backbone))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


def test_a_protocol_that_changes_the_backbone_is_caught_by_tensor_name(tmp_path: Path) -> None:
    class Meddling(Nosy):
        def run(self, job: Job) -> dict[str, float]:
            job.backbone().train()(torch.rand(4, 3, 16, 16))
            return {"top1": 1.0}

    protocol = Meddling(Options())
    with pytest.raises(PluginError, match=r"changed the frozen backbone: .*block1\.bn\.running_mean"):
        run_protocol(protocol, make_job(protocol, tmp_path))


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ({"top1": 1.0, "top2": 2.0}, PluginError, "undeclared metrics: top2"),
        ({}, PluginError, "primary metric 'top1'"),
        ({"top1": float("nan")}, DivergedError, "top1 = nan"),
    ],
)
def test_metrics_are_checked(tmp_path: Path, result: Any, error: type[Exception], message: str) -> None:
    protocol = nosy(result=result)
    with pytest.raises(error, match=message):
        run_protocol(protocol, make_job(protocol, tmp_path))


def test_cached_features_equal_computed_ones_and_follow_everything_they_depend_on(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def features(files: int, **changes: Any) -> torch.Tensor:
        options = changes.pop("options", EvalOptions())
        table = make_job(WellBehaved(options), tmp_path, cache_dir=cache, **changes).features("val").features
        assert len(list(cache.iterdir())) == files
        return table

    fresh = features(1)
    assert torch.equal(features(1), fresh)
    assert torch.equal(features(1, options=EvalOptions(batch_size=100)), fresh)
    assert not torch.equal(features(2, backbone=make_backbone(seed=5)), fresh)
    larger = features(3, options=EvalOptions(size=24))
    assert not torch.equal(larger, fresh)
    assert not torch.equal(features(4, options=EvalOptions(center=0.5)), fresh)
    assert not torch.equal(features(5, options=EvalOptions(size=24, interpolation="bilinear")), larger)
    assert features(6, dataset=Mnist5k(Mnist5k.Config())).shape == (400, 64)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_file_is_said_so_and_recomputed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def features() -> torch.Tensor:
        return make_job(WellBehaved(EvalOptions()), tmp_path, cache_dir=tmp_path).features("val").features

    fresh = features()
    (path,) = tmp_path.glob("*/rows-*")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    path.write_bytes({"cut": bytes(content[:middle]), "flip": bytes(content), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(features(), fresh)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert torch.equal(features(), fresh)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    table = make_job(WellBehaved(EvalOptions()), tmp_path, cache_dir=tmp_path / "file").features("val")
    assert "not cached" in caplog.text
    assert torch.equal(table.features, make_job(WellBehaved(EvalOptions()), tmp_path).features("val").features)


def test_test_without_a_head_says_what_to_type(tmp_path: Path) -> None:
    protocol = HeldOutTest(HeldOutOptions())
    with pytest.raises(
        CheckpointError, match=r"no 'head\.pt' of protocol 'linear' on data set 'digits'"
    ) as raised:
        run_protocol(protocol, make_job(protocol, tmp_path))
    assert raised.value.hint == f"sslbench eval linear {tmp_path} --dataset digits"


@pytest.mark.parametrize(
    ("changes", "options", "what"),
    [
        ({"backbone": 5}, HeldOutOptions(), "model"),
        ({"dataset": Mnist5k(Mnist5k.Config()), "dataset_key": "digits"}, HeldOutOptions(), "data set"),
        ({}, HeldOutOptions(size=24), "preprocessing"),
    ],
)
def test_a_head_made_for_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: HeldOutOptions, what: str
) -> None:
    linear, final = Linear(QUICK), HeldOutTest(options)
    run_protocol(linear, make_job(linear, tmp_path))
    if "backbone" in changes:
        changes = {"backbone": make_backbone(seed=5)}
    with pytest.raises(CheckpointError, match=f"made for another {what}"):
        run_protocol(final, make_job(final, tmp_path, **changes))


def test_a_damaged_head_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = evaluation_dir(tmp_path, "linear", "digits") / "head.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK nonsense")
    final = HeldOutTest(HeldOutOptions())
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_protocol(final, make_job(final, tmp_path))


def test_test_counts_every_image_once_as_scikit_learn_does(tmp_path: Path) -> None:
    linear, final = Linear(QUICK), HeldOutTest(HeldOutOptions())
    run_protocol(linear, make_job(linear, tmp_path))
    job = make_job(final, tmp_path)
    metrics = run_protocol(final, job)
    report = json.loads((job.out_dir / "test.json").read_text())
    targets = make_dataset().split("test").targets
    assert targets is not None
    head = torch.load(evaluation_dir(tmp_path, "linear", "digits") / "head.pt", weights_only=True)
    table = job.features("test")
    inputs = (table.features - head["mean"]) / head["std"]
    predicted = (inputs @ head["weight"].T + head["bias"]).argmax(1)
    assert report["confusion"] == confusion_matrix(targets, predicted).tolist()
    assert report["n"] == len(targets) == sum(row["n"] for row in report["per_class"].values())
    hits = sum(report["confusion"][c][c] for c in range(10))
    assert metrics["top1"] == pytest.approx(100 * hits / len(targets), abs=1e-9)
    assert metrics["top1"] > 80
    assert metrics["knn_top1"] > 80


def test_digests_name_each_tensor_and_see_its_shape() -> None:
    module = torch.nn.BatchNorm1d(4)
    before = state_digests(module)
    module.running_mean += 1
    changed = [name for name, digest in state_digests(module).items() if before[name] != digest]
    assert changed == ["running_mean"]
