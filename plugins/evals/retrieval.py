"""Image retrieval with frozen features: does an image find others of its class by cosine similarity?"""

from __future__ import annotations

from pydantic import Field, PositiveInt

from sslbench.evaluation.ranking import Gallery
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job, LabelledRows
from sslbench.plugin.hooks import hookimpl


class RetrievalConfig(EvalOptions):
    """Options of the retrieval protocols."""

    ks: tuple[PositiveInt, ...] = Field((1, 2, 4, 5, 8, 10, 20, 50, 100), min_length=1)
    """Numbers of nearest images for recall and precision in the report; none may exceed the gallery."""


class Retrieval(EvalProtocol):
    """Images of ``val`` retrieve those of ``train``. Nothing is trained or chosen. Ranks share the queries.

    Recall at k is the share of queries with an image of their class among the k nearest (Jegou et al., TPAMI 2011;
    usual in metric learning), mean average precision is over the whole ranked gallery. Patacchiola & Storkey,
    "Self-supervised relational reasoning" (NeurIPS 2020), retrieve with frozen features too, but neither their
    metric nor their code is public: numbers of this protocol are comparable among themselves alone.
    """

    name = "retrieval"
    version = 1
    Config = RetrievalConfig
    metrics = {"map": "max", "recall1": "max", "recall5": "max", "recall10": "max"}  # noqa: RUF012
    primary = "map"
    splits = frozenset({"train", "val"})

    cfg: RetrievalConfig

    def run(self, job: Job) -> dict[str, float]:
        """Recall, precision and mean average precision of queries from ``val``."""
        return self._retrieve(job, job.rows("train"), job.rows("val"))

    def _retrieve(self, job: Job, gallery: LabelledRows, queries: LabelledRows) -> dict[str, float]:
        size = len(gallery.labels)
        ks = tuple(sorted({min(k, size) for k in (*self.cfg.ks, 1, 5, 10)}))
        found = Gallery(gallery.features, gallery.labels).retrieve(queries.features, queries.labels, ks)
        recall, precision, mean = found.mean()
        by_k = [{"k": k, "recall": r, "precision": p} for k, r, p in zip(ks, recall, precision, strict=True)]
        report = {"gallery": size, "queries": len(queries.labels), "map": mean, "by_k": by_k}
        job.write_report(f"{self.name}.json", report)
        at = dict(zip(ks, recall, strict=True))
        return {"map": mean, **{f"recall{k}": at[min(k, size)] for k in (1, 5, 10)}}


class RetrievalTest(Retrieval):
    """Images of ``test`` retrieve those of ``train`` and ``val``. It chooses nothing."""

    name = "test_retrieval"
    splits = frozenset({"trainval", "test"})

    def run(self, job: Job) -> dict[str, float]:
        """Recall, precision and mean average precision of queries from ``test``."""
        return self._retrieve(job, job.rows("trainval"), job.rows("test"))


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Retrieval, RetrievalTest]
