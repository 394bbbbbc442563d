"""Accuracy on the test split, with the head that protocol linear chose on validation data."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sslbench.errors import CheckpointError
from sslbench.evaluation.classifiers import LinearHead, Neighbours, label_ranks, percent
from sslbench.plugin.api import EvalOptions, EvalProtocol, FeatureTable, Job
from sslbench.plugin.hooks import hookimpl


class HeldOutOptions(EvalOptions):
    """Options of the test protocol."""

    knn: bool = True
    """Also classify by nearest neighbours, with all training images as the bank."""
    k: int = Field(20, ge=1)
    """Neighbours for `knn_top1`."""
    temperature: float | None = Field(0.07, gt=0)
    """A neighbour of similarity s has weight exp(s / temperature); unset: all weigh the same."""


class HeldOutTest(EvalProtocol):
    """The only protocol that opens ``test``. It chooses nothing: run it once per model that is reported."""

    name = "test"
    version = 1
    Config = HeldOutOptions
    metrics = {"top1": "max", "top5": "max", "loss": "min", "knn_top1": "max"}  # noqa: RUF012
    primary = "top1"
    splits = frozenset({"trainval", "test"})

    cfg: HeldOutOptions

    def run(self, job: Job) -> dict[str, float]:
        """Score the saved head on every test image exactly once."""
        head = _load_head(job)
        test = job.features("test")
        logits = head(test.features)
        ranks = label_ranks(logits, test.labels)
        metrics = {
            "top1": float(percent(ranks < 1)),
            "top5": float(percent(ranks < 5)),
            "loss": float(F.cross_entropy(logits.double(), test.labels)),
        }
        if self.cfg.knn:
            metrics["knn_top1"] = self._knn(job, test)
        job.write_report("test.json", {**metrics, **_details(job, logits, test.labels)})
        return metrics

    def _knn(self, job: Job, test: FeatureTable) -> float:
        bank = job.features("trainval")
        neighbours = Neighbours(bank.features, bank.labels, len(job.classes))
        ranks = neighbours.ranks(test.features, test.labels, (self.cfg.k,), self.cfg.temperature)
        return float(percent(ranks < 1))


def _load_head(job: Job) -> LinearHead:
    state = job.load_from("linear", "head.pt")
    if tuple(state["classes"]) != tuple(job.classes):
        raise CheckpointError(
            f"the linear head was trained for other classes than '{job.dataset_key}' has",
            hint=f"sslbench eval linear {job.run_dir} --dataset {job.dataset_key}",
        )
    return LinearHead.from_state(state, job.device)


def _details(job: Job, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Counts by class; rows of the confusion matrix are true classes, columns predictions."""
    count = len(job.classes)
    cells = torch.bincount(labels * count + logits.argmax(1), minlength=count * count).view(count, count)
    support = cells.sum(1)
    accuracy = (cells.diagonal() * 100.0 / support).tolist()
    per_class = {
        name: {"n": n, "top1": value if n else None}
        for name, n, value in zip(job.classes, support.tolist(), accuracy, strict=True)
    }
    return {"n": len(labels), "per_class": per_class, "confusion": cells.tolist()}


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [HeldOutTest]
