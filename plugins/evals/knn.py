"""k nearest neighbours on frozen features, by cosine similarity."""

from __future__ import annotations

from pydantic import Field

from sslbench.evaluation.classifiers import Neighbours, percent
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job
from sslbench.plugin.hooks import hookimpl


class KnnConfig(EvalOptions):
    """Options of the kNN protocol."""

    k: int = Field(20, ge=1)
    """Neighbours behind `top1` and `top5`. (200 is the published number for ImageNet; with fewer than 200 images
    per class it mostly measures class sizes.)"""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Further numbers of neighbours for the report; none may exceed the bank."""
    temperature: float | None = Field(0.07, gt=0)
    """A neighbour of similarity s has weight exp(s / temperature); unset: all weigh the same."""


class Knn(EvalProtocol):
    """Weighted nearest neighbours: the bank is ``train``, the queries are ``val``. Nothing is trained.

    Ranks share the queries. A bank that is too large to be held passes through the device in chunks.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
    section 3.4.
    """

    name = "knn"
    version = 1
    Config = KnnConfig
    metrics = {"top1": "max", "top5": "max"}  # noqa: RUF012
    primary = "top1"
    splits = frozenset({"train", "val"})

    cfg: KnnConfig

    def run(self, job: Job) -> dict[str, float]:
        """Score ``val`` against ``train``; the report holds every k."""
        bank, queries = job.rows("train"), job.rows("val")
        size = len(bank.labels)
        ks = tuple(sorted({min(k, size) for k in (self.cfg.k, *self.cfg.ks)}))
        neighbours = Neighbours(bank.features, bank.labels, len(job.classes))
        ranks = neighbours.ranks(queries.features, queries.labels, ks, self.cfg.temperature)
        top1, top5 = percent(ranks < 1).tolist(), percent(ranks < 5).tolist()
        by_k = [{"k": k, "top1": a, "top5": b} for k, a, b in zip(ks, top1, top5, strict=True)]
        job.write_report("knn.json", {"bank": size, "queries": len(queries.labels), "by_k": by_k})
        chosen = by_k[ks.index(min(self.cfg.k, size))]
        return {"top1": chosen["top1"], "top5": chosen["top5"]}


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Knn]
