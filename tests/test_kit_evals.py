"""The kit passes every built-in protocol, and names each defect that is put into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from sslbench import comm
from sslbench.evaluation.classifiers import Neighbours, percent
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job, Options
from sslbench.plugin.catalog import Catalog
from sslbench.testing import check_eval
from sslbench.testing.evals import RULES, EvalSubject, _ranks, _runs
from sslbench.testing.evaluation import CLASSES, ToyDataset, toy_backbone
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import Rule, check_up

FEW: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 10, "lrs": [0.03, 0.1, 0.3]},
    "logistic": {"strengths": [1e-3, 1e-2]},
    "lowshot": {"shots": [4], "percents": [10], "draws": 3, "strengths": [1e-2, 1e-1]},
    "svm": {"costs": [0.1, 1.0], "folds": 2, "tolerance": 1e-6},
}
"""Options with which the longer ones are quick."""
BUILTIN: dict[str, dict[str, Any]] = {
    "knn": {},
    "linear": FEW["linear"],
    "test": {},
    "logistic": FEW["logistic"],
    "test_logistic": {},
    "lowshot": FEW["lowshot"],
    "test_lowshot": {},
    "retrieval": {},
    "test_retrieval": {},
    "svm": FEW["svm"],
    "test_svm": {},
    "transfer": {"datasets": ["one", "two"], "options": {"linear": FEW["linear"]}},
}


@pytest.mark.parametrize("name", ["knn", *(pytest.param(name, marks=pytest.mark.slow) for name in BUILTIN)])
def test_built_in_protocols_pass(name: str, request: pytest.FixtureRequest) -> None:
    slow = any(mark.name == "slow" for mark in request.node.iter_markers())
    checkup = check_eval(name, options=BUILTIN[name], before=FEW, processes=slow)
    checkup.raise_if_broken()
    assert all(verdict.outcome == "held" for verdict in checkup.verdicts)


def test_no_protocol_is_left_out() -> None:
    installed = {entry.name for entry in Catalog().entries("eval") if entry.distribution == "sslbench"}
    assert installed == BUILTIN.keys()


# --- a correct one of our own, and what can be wrong with it


class Good(EvalProtocol):
    """Nearest neighbour."""

    name = "good"
    version = 1
    Config = EvalOptions
    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {"top1": "max"}
    primary = "top1"
    splits = frozenset({"train", "val"})

    def run(self, job: Job) -> dict[str, float]:
        return {"top1": self.score(job, "train", "val")}

    def score(self, job: Job, train: str, val: str) -> float:
        bank, queries = job.features(train), job.features(val)
        neighbours = Neighbours(bank.features, bank.labels, len(job.classes))
        return float(percent(neighbours.ranks(queries.features, queries.labels, (1,), None)[:, 0] < 1))


class ScoresTraining(Good):
    name = "scores_training"

    def run(self, job: Job) -> dict[str, float]:
        return {"top1": self.score(job, "train", "train")}


class LearnsValidation(Good):
    """Ridge regression on what it is scored on."""

    name = "learns_validation"

    def run(self, job: Job) -> dict[str, float]:
        table = job.features("val")
        inputs = table.features - table.features.mean(0)
        wanted = nn.functional.one_hot(table.labels).float()
        weight = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
        return {"top1": float(percent((inputs @ weight).argmax(1) == table.labels))}


class SeesLabels(Good):
    name = "sees_labels"

    def run(self, job: Job) -> dict[str, float]:
        labels = job.features("val").labels
        return {"top1": float(percent(labels == labels))}


class IgnoresFeatures(Good):
    """Always the same answer."""

    name = "ignores_features"

    def run(self, job: Job) -> dict[str, float]:
        return {"top1": float(percent(job.features("val").labels == 0))}


class Fractions(Good):
    name = "fractions"

    def run(self, job: Job) -> dict[str, float]:
        return {"top1": super().run(job)["top1"] / 100}


class Undeclared(Good):
    name = "undeclared"

    def run(self, job: Job) -> dict[str, float]:
        return {**super().run(job), "top5": 100.0}


class NotFinite(Good):
    name = "not_finite"
    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {"top1": "max", "loss": "min"}

    def run(self, job: Job) -> dict[str, float]:
        return {**super().run(job), "loss": float("inf")}


class Trains(Good):
    """Fine-tunes the backbone it was lent."""

    name = "trains"

    def run(self, job: Job) -> dict[str, float]:
        with torch.no_grad():
            next(job.backbone().parameters()).mul_(1.01)
        return super().run(job)


class LeavesTrainMode(Good):
    name = "leaves_train_mode"

    def run(self, job: Job) -> dict[str, float]:
        found = super().run(job)
        job.backbone().train()
        return found


class LeavesHook(Good):
    name = "leaves_hook"

    def run(self, job: Job) -> dict[str, float]:
        job.backbone().register_forward_hook(lambda *_: None)
        return super().run(job)


class OpensTest(Good):
    name = "opens_test"

    def run(self, job: Job) -> dict[str, float]:
        return {"top1": self.score(job, "train", "test")}


class OpensUndeclared(Good):
    name = "opens_undeclared"

    def run(self, job: Job) -> dict[str, float]:
        return {"top1": self.score(job, "trainval", "val")}


class Bypasses(Good):
    """Reads test images without asking the job."""

    name = "bypasses"

    def run(self, job: Any) -> dict[str, float]:
        job._dataset.split("test")
        return super().run(job)


class DeclaresTest(Good):
    name = "declares_test"
    splits = frozenset({"train", "val", "test"})


class Global(Good):
    """Looks at a random half."""

    name = "global"

    def run(self, job: Job) -> dict[str, float]:
        bank, queries = job.features("train"), job.features("val")
        rows = torch.randperm(len(bank.labels))[:150]
        neighbours = Neighbours(bank.features[rows], bank.labels[rows], len(job.classes))
        return {"top1": float(percent(neighbours.ranks(queries.features, queries.labels, (1,), None)[:, 0] < 1))}


class Strays(Good):
    name = "strays"

    def run(self, job: Job) -> dict[str, float]:
        (job.run_dir / "notes.txt").write_text("mine")
        return super().run(job)


class OddVersion(Good):
    name = "odd_version"
    version: ClassVar[Any] = "1.0"


class NoPrimary(Good):
    name = "no_primary"
    primary = "accuracy"

    def run(self, job: Job) -> dict[str, float]:
        return {"accuracy": super().run(job)["top1"]}


class Undocumented(Good):
    name = "undocumented"

    class Config(EvalOptions):
        k: int = 1


class Crashes(Good):
    name = "crashes"

    def run(self, job: Job) -> dict[str, float]:
        raise ValueError("no")


class OwnShare(Good):
    """Each rank scores its share of the images, and returns that."""

    name = "own_share"

    def run(self, job: Job) -> dict[str, float]:
        bank = job.features("train")
        features, labels = self.shares(job)
        nearest = torch.cdist(features, bank.features).argmin(1)
        return {"top1": float(percent(bank.labels[nearest] == labels))}

    def shares(self, job: Job) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = [(job.backbone()(images).pooled, labels) for images, labels, _ in job.images("val")]
        return torch.cat([rows for rows, _ in found]), torch.cat([labels for _, labels in found])


class FirstShare(OwnShare):
    """All ranks return what the first one found."""

    name = "first_share"

    def run(self, job: Job) -> dict[str, float]:
        mine = torch.tensor(super().run(job)["top1"])
        return {"top1": float(comm.broadcast(mine))}


class Gathered(OwnShare):
    """As it should be."""

    name = "gathered"

    def shares(self, job: Job) -> tuple[Tensor, Tensor]:
        features, labels = super().shares(job)
        return comm.gather(features), comm.gather(labels)


class Saves(Good):
    name = "saves"

    def run(self, job: Job) -> dict[str, float]:
        found = super().run(job)
        job.save("state.pt", {"top1": found["top1"]})
        return found


class TestSaved(Good):
    """Comes after another one of its module."""

    __test__ = False
    name = "test_saved"
    splits = frozenset({"test", "trainval"})
    after = ("saves",)

    def run(self, job: Job) -> dict[str, float]:
        job.load_from("saves", "state.pt")
        return {"top1": self.score(job, "trainval", "test")}


class ForgetsAfter(TestSaved):
    __test__ = False
    name = "test_forgets"
    after = ()


class Spread(Good):
    """A score of which chance is not known."""

    name = "spread"
    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {"wrong": "min"}
    primary = "wrong"

    def chance(self, classes: int) -> float | None:
        return None

    def run(self, job: Job) -> dict[str, float]:
        return {"wrong": 1 - self.score(job, "train", "val") / 100}


DEFECTS: dict[type[EvalProtocol], tuple[str, str]] = {
    ScoresTraining: ("is at chance on shuffled labels", "scores what it trained on"),
    LearnsValidation: ("is at chance on shuffled labels", "scores what it trained on"),
    SeesLabels: ("is at chance on shuffled labels", "sees labels"),
    IgnoresFeatures: ("tells good features from others", "job.rows"),
    Fractions: ("tells good features from others", "[0, 100]"),
    Undeclared: ("returns the metrics it declares", "names of metrics"),
    NotFinite: ("returns the metrics it declares", "leave out"),
    Trains: ("leaves the backbone unchanged", "deepcopy"),
    LeavesTrainMode: ("leaves the backbone unchanged", "eval mode"),
    LeavesHook: ("leaves the backbone unchanged", "hooks"),
    OpensTest: ("opens only the splits it declares", "val"),
    OpensUndeclared: ("opens only the splits it declares", "add 'trainval'"),
    Bypasses: ("opens only the splits it declares", "job.rows"),
    DeclaresTest: ("its declarations are consistent", "val"),
    Global: ("same job, same numbers", "job.generator"),
    Strays: ("writes into its own folder", "job.save"),
    OddVersion: ("its declarations are consistent", "whole number"),
    NoPrimary: ("its declarations are consistent", "primary"),
    Undocumented: ("options are documented and survive a round trip", "string under each field"),
    Crashes: ("runs", "line"),
    ForgetsAfter: ("runs", "sslbench eval saves"),
}


def verdicts_of(cls: type[EvalProtocol], *rules: Rule[EvalSubject]) -> Any:
    subject = EvalSubject(PluginReference.of("eval", cls), cls, cls.Config(), {}, {})
    return check_up("eval", cls.name, subject, rules)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda cls: cls.__name__)
def test_each_defect_is_found_and_named(defect: type[EvalProtocol]) -> None:
    name, hint = DEFECTS[defect]
    rule = next(rule for rule in (Rule("runs", _runs), *RULES) if rule.name == name)
    (verdict,) = verdicts_of(defect, rule).broken
    assert hint in verdict.hint
    assert verdict.detail


@pytest.mark.parametrize("cls", [Gathered, TestSaved, Spread])
def test_what_is_right_passes(cls: type[EvalProtocol]) -> None:
    checkup = check_eval(cls, processes=False)
    checkup.raise_if_broken()
    untried = [verdict.rule for verdict in checkup.verdicts if verdict.outcome == "not tried"]
    assert untried == (["is at chance on shuffled labels"] if cls is Spread else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "hint"), [(OwnShare, "comm.gather"), (FirstShare, "comm.all_sum"), (Gathered, None)]
)
def test_shares_of_ranks_must_be_put_together(cls: type[EvalProtocol], hint: str | None) -> None:
    broken = verdicts_of(cls, Rule("ranks", _ranks)).broken
    assert [hint in verdict.hint for verdict in broken] == ([True] if hint else [])


def test_one_that_does_not_run_is_told_once() -> None:
    checkup = check_eval(Crashes)
    assert [verdict.rule for verdict in checkup.broken] == ["runs"]
    assert {verdict.outcome for verdict in checkup.verdicts[1:]} == {"not tried"}


def test_toy_labels_are_as_frequent_in_every_arm() -> None:
    counts = {
        (arm, split): tuple(ToyDataset(arm, "classification").split(split).targets.bincount().tolist())
        for arm in ("revealing", "shuffled", "mixed")
        for split in ("train", "val", "test")
    }
    assert len(set(counts.values())) == 3
    assert all(len(found) == CLASSES for found in counts.values())


def test_the_toy_backbone_is_always_the_same() -> None:
    one, other = toy_backbone().state_dict(), toy_backbone().state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert issubclass(EvalOptions, Options)
