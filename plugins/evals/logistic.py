"""Logistic regression on frozen features, solved to its minimum by L-BFGS; nothing depends on a learning rate."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sslbench.evaluation.classifiers import FeatureScaling, LinearHead, Normalize
from sslbench.evaluation.convex import Inputs, solve_logistic
from sslbench.evaluation.heldout import load_head, score_head
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job, LabelledRows
from sslbench.plugin.hooks import hookimpl

logger = logging.getLogger(__name__)


class LogisticConfig(EvalOptions):
    """Options of the logistic protocol."""

    strengths: tuple[float, ...] = Field((1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1), min_length=1)
    """L2 strengths to choose from: mean cross-entropy + strength / 2 * |weights|^2. In scikit-learn's terms
    C = 1 / (images * strength)."""
    normalize: Normalize = "standardize"
    """What happens to features first: nothing, mean 0 and standard deviation 1, or unit length. With `none` the
    same strength regularises features of another scale differently."""
    tolerance: float = Field(1e-4, gt=0)
    """A problem is solved when its gradient's norm has fallen to this share of that at zero weights."""
    max_steps: int = Field(1000, ge=1)
    """Steps of L-BFGS after which a classifier is taken as it is."""
    refit: bool = True
    """Train the head that is kept again with the chosen strength on `train` and `val` together."""


class Logistic(EvalProtocol):
    """Multinomial logistic regression by L-BFGS, its L2 strength chosen on ``val``.

    All strengths are solved side by side; ranks share the rows of the table and add up what they find. With
    ``refit`` the head that is kept (``head.pt``, for protocol ``test_logistic``) is trained again on ``train`` and
    ``val``.

    Source: Kornblith et al., "Do Better ImageNet Models Transfer Better?", CVPR 2019, section 3 and appendix A.1,
    who search 45 strengths from 1e-6 to 1e5 of a sum over images; also Chen et al., SimCLR, ICML 2020, B.8.
    """

    name = "logistic"
    version = 1
    Config = LogisticConfig
    metrics = {"val_top1": "max", "val_top5": "max", "val_loss": "min", "strength": "min"}  # noqa: RUF012
    primary = "val_top1"
    splits = frozenset({"train", "val", "trainval"})

    cfg: LogisticConfig

    def run(self, job: Job) -> dict[str, float]:
        """Choose a strength, save the head, return how the chosen one did on ``val``."""
        heads = self._fit(job, job.rows("train"), self.cfg.strengths)
        found = [score_head(job, head, job.rows("val"))[0] for head in heads]
        # Of equally accurate heads the one that is surest of what is right.
        g = min(range(len(found)), key=lambda i: (-found[i]["top1"], found[i]["loss"]))
        chosen = self.cfg.strengths[g]
        self._report(job, found, chosen)
        head = self._fit(job, job.rows("trainval"), (chosen,))[0] if self.cfg.refit else heads[g]
        origin: dict[str, Any] = {"classes": list(job.classes), "strength": chosen}
        job.save("head.pt", {**head.state(), **origin, "trained_on": "trainval" if self.cfg.refit else "train"})
        return {"strength": chosen, **{f"val_{key}": value for key, value in found[g].items()}}

    def _fit(self, job: Job, table: LabelledRows, strengths: tuple[float, ...]) -> list[LinearHead]:
        scaling = FeatureScaling.fit(self.cfg.normalize, table.features)
        fitted = solve_logistic(
            Inputs(table, scaling),
            len(job.classes),
            torch.tensor(strengths, device=job.device),
            tolerance=self.cfg.tolerance,
            max_steps=self.cfg.max_steps,
        )
        return [_head(weight, scaling) for weight in fitted]

    def _report(self, job: Job, found: list[dict[str, float]], chosen: float) -> None:
        rows = [
            {"strength": strength, "val_top1": scores["top1"], "val_loss": scores["loss"]}
            for strength, scores in zip(self.cfg.strengths, found, strict=True)
        ]
        edge = len(rows) > 2 and chosen in (min(self.cfg.strengths), max(self.cfg.strengths))
        report = {"strength": chosen, "at_edge_of_grid": edge, "by_strength": rows}
        job.write_report("logistic.json", report)
        if edge:
            logger.warning("the best strength, %g, is at the edge of the grid: widen strengths", chosen)


def _head(weight: Tensor, scaling: FeatureScaling) -> LinearHead:
    """From ``[C,D+1]``."""
    return LinearHead(weight[:, :-1].contiguous(), weight[:, -1].contiguous(), scaling)


class LogisticTest(EvalProtocol):
    """How the head of ``logistic`` does on ``test``. It chooses nothing."""

    name = "test_logistic"
    version = 1
    Config = EvalOptions
    metrics = {"top1": "max", "top5": "max", "loss": "min"}  # noqa: RUF012
    primary = "top1"
    splits = frozenset({"test"})
    after = ("logistic",)

    def run(self, job: Job) -> dict[str, float]:
        """Score the saved head on every test image exactly once."""
        metrics, details = score_head(job, load_head(job, "logistic"), job.rows("test"))
        job.write_report("test_logistic.json", {**metrics, **details})
        return metrics


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Logistic, LogisticTest]
