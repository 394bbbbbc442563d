"""Accuracy on the test split, with the head that protocol linear chose on validation data."""

from __future__ import annotations

from pydantic import Field

from sslbench.evaluation.classifiers import Neighbours, percent
from sslbench.evaluation.heldout import load_head, score_head
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job, LabelledRows
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
    """How the linear head does on ``test``. It chooses nothing: run it once per model that is reported.

    Ranks share the queries of the nearest neighbours."""

    name = "test"
    version = 1
    Config = HeldOutOptions
    metrics = {"top1": "max", "top5": "max", "loss": "min", "knn_top1": "max"}  # noqa: RUF012
    primary = "top1"
    splits = frozenset({"trainval", "test"})
    after = ("linear",)

    cfg: HeldOutOptions

    def run(self, job: Job) -> dict[str, float]:
        """Score the saved head on every test image exactly once."""
        head = load_head(job, "linear")
        test = job.rows("test")
        metrics, details = score_head(job, head, test)
        if self.cfg.knn:
            metrics["knn_top1"] = self._knn(job, test)
        job.write_report("test.json", {**metrics, **details})
        return metrics

    def _knn(self, job: Job, test: LabelledRows) -> float:
        bank = job.rows("trainval")
        neighbours = Neighbours(bank.features, bank.labels, len(job.classes))
        ranks = neighbours.ranks(test.features, test.labels, (self.cfg.k,), self.cfg.temperature)
        return float(percent(ranks < 1))


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [HeldOutTest]
