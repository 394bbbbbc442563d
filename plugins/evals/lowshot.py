"""Classifiers on frozen features of few labelled images: 1, 2, 4, ... per class, or 1 and 10 percent of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from sslbench import comm
from sslbench.data.loader import rank_share
from sslbench.errors import DataError
from sslbench.evaluation.classifiers import FeatureScaling, LinearHead, Normalize
from sslbench.evaluation.convex import fit_logistic
from sslbench.evaluation.heldout import load_for_classes
from sslbench.plugin.api import EvalOptions, EvalProtocol, Job, LabelledRows
from sslbench.plugin.hooks import hookimpl

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
PERCENTS = (1, 10)
METRICS: dict[str, Literal["max", "min"]] = {
    "mean_top1": "max",
    **{f"top1_{k}shot": "max" for k in SHOTS},
    **{f"std_{k}shot": "min" for k in SHOTS},
    **{f"top1_{p}pct": "max" for p in PERCENTS},
    **{f"std_{p}pct": "min" for p in PERCENTS},
}


class LowShotConfig(EvalOptions):
    """Options of the lowshot protocol."""

    shots: tuple[Literal[1, 2, 4, 8, 16, 32, 64, 96], ...] = (1, 2, 4, 8, 16)
    """Labelled images per class."""
    percents: tuple[Literal[1, 10], ...] = (1, 10)
    """Shares of each class, rounded up."""
    draws: int = Field(5, ge=2)
    """How often images are drawn; results are means and standard deviations over draws."""
    strengths: tuple[float, ...] = Field((1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1)
    """L2 strengths of the logistic regressions, see protocol `logistic`. One is chosen for each number of images,
    by the mean over draws on `val`."""
    normalize: Normalize = "standardize"
    """What happens to features first. Mean and standard deviation are those of all images of `train`, which needs
    no labels."""
    tolerance: float = Field(1e-3, gt=0)
    """A problem is solved when its gradient's norm has fallen to this share of that at zero weights."""
    max_steps: int = Field(1000, ge=1)
    """Steps of L-BFGS after which a classifier is taken as it is."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> LowShotConfig:
        if not self.shots and not self.percents:
            raise ValueError("shots or percents must name at least one number of images")
        return self


@dataclass(frozen=True)
class Amount:
    """So many labelled images."""

    name: str
    shots: int | None = None
    percent: int | None = None

    def of(self, size: int) -> int:
        """How many of a class of ``size`` images."""
        return self.shots if self.shots is not None else math.ceil(size * (self.percent or 0) / 100)


def amounts(cfg: LowShotConfig) -> list[Amount]:
    """What the options ask for, fewest images first."""
    by_number = [Amount(f"{k}shot", shots=k) for k in sorted(cfg.shots)]
    return by_number + [Amount(f"{p}pct", percent=p) for p in sorted(cfg.percents)]


def check_enough(labels: Tensor, classes: int, amount: Amount) -> None:
    """Refuse amounts that a class does not have.

    Raises:
        DataError: naming the class.
    """
    for label, size in enumerate(torch.bincount(labels, minlength=classes).tolist()):
        wanted = amount.of(size)
        if wanted > size or wanted == 0:
            raise DataError(
                f"class {label} has {size} training images, {wanted or 1} are wanted",
                hint="shots=[1,2,4] (with pretrain: evals.lowshot.shots=[1,2,4])",
            )


def draw(labels: Tensor, classes: int, amount: Amount, generator: torch.Generator) -> Tensor:
    """Rows of labelled images ``[N]``, so many of each class, at random.

    Raises:
        DataError: a class has too few images.
    """
    check_enough(labels, classes, amount)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    members = (order[shuffled == label] for label in range(classes))
    return torch.cat([own[: amount.of(len(own))] for own in members]).to(labels.device)


class LowShot(EvalProtocol):
    """Logistic regression on few labelled images of ``train``, judged on ``val``.

    For each number of images the L2 strength with the best mean over draws is taken. All draws' classifiers at it
    are kept (``heads.pt``, for protocol ``test_lowshot``). The headline is the mean over all numbers of images.
    Ranks share the draws; the labelled images of one draw are on the device together.

    Source: numbers of images and five draws as in Goyal et al., "Scaling and Benchmarking Self-Supervised Visual
    Representation Learning", ICCV 2019, section 6.2, who train SVMs and give the best cost on the test images; 1 %
    and 10 % as in SimCLR and SwAV, which fine-tune the backbone with them. Numbers are comparable with neither.
    """

    name = "lowshot"
    version = 1
    Config = LowShotConfig
    metrics = METRICS
    primary = "mean_top1"
    splits = frozenset({"train", "val"})

    cfg: LowShotConfig

    def run(self, job: Job) -> dict[str, float]:
        """Means and standard deviations over draws on ``val``."""
        train, val = job.rows("train"), job.rows("val")
        scaling = FeatureScaling.fit(self.cfg.normalize, train.features)
        heads: dict[str, Tensor] = {}
        by_amount: dict[str, list[float]] = {}
        chosen: dict[str, float] = {}
        for amount in amounts(self.cfg):
            check_enough(train.labels, len(job.classes), amount)
            weights, top1 = map(comm.gather, comm.patiently(partial(self._own, job, train, val, scaling, amount)))
            best = int(top1.mean(0).argmax())
            heads[amount.name], by_amount[amount.name] = weights[:, best].clone().cpu(), top1[:, best].tolist()
            chosen[amount.name] = self.cfg.strengths[best]
        job.save("heads.pt", {"heads": heads, "classes": list(job.classes), **_scaling_state(scaling)})
        job.write_report("lowshot.json", {"strengths": chosen, "val_top1": by_amount})
        return summary(by_amount)

    def _own(
        self, job: Job, train: LabelledRows, val: LabelledRows, scaling: FeatureScaling, amount: Amount
    ) -> tuple[Tensor, Tensor]:
        """For this rank's draws the classifiers of all strengths, ``[n,G,C,D+1]``, and accuracies ``[n,G]``."""
        fits = list(self._fits(job, train, scaling, amount))
        scores = [[_head(w, scaling).top1(val) for w in draws] for draws in fits]
        shape = (len(self.cfg.strengths), len(job.classes), train.features.dim + 1)
        weights = torch.stack(fits) if fits else torch.empty(0, *shape, device=job.device)
        return weights, torch.tensor(scores).view(-1, len(self.cfg.strengths))

    def _fits(self, job: Job, table: LabelledRows, scaling: FeatureScaling, amount: Amount) -> Iterator[Tensor]:
        """For each of this rank's draws the classifiers of all strengths, ``[G,C,D+1]``."""
        for number in rank_share(self.cfg.draws, comm.rank(), comm.world()):
            generator = job.generator(f"{amount.name}/{number}")
            rows = draw(table.labels, len(job.classes), amount, generator)
            yield fit_logistic(
                F.pad(scaling(table.features.take(rows.cpu())), (0, 1), value=1.0),
                table.labels[rows],
                len(job.classes),
                torch.tensor(self.cfg.strengths, device=job.device),
                tolerance=self.cfg.tolerance,
                max_steps=self.cfg.max_steps,
            )


def summary(by_amount: dict[str, list[float]]) -> dict[str, float]:
    """Mean and standard deviation over draws for each number of images, and the mean of all means."""
    metrics: dict[str, float] = {}
    for name, top1 in by_amount.items():
        values = torch.tensor(top1, dtype=torch.float64)
        metrics |= {f"top1_{name}": float(values.mean()), f"std_{name}": float(values.std())}
    means = [value for key, value in metrics.items() if key.startswith("top1_")]
    return {"mean_top1": sum(means) / len(means), **metrics}


def _head(weight: Tensor, scaling: FeatureScaling) -> LinearHead:
    """From ``[C,D+1]``."""
    return LinearHead(weight[:, :-1], weight[:, -1], scaling)


def _scaling_state(scaling: FeatureScaling) -> dict[str, Any]:
    return {"normalize": scaling.kind, "mean": scaling.mean, "std": scaling.std}


class LowShotTest(EvalProtocol):
    """How the classifiers of ``lowshot`` do on ``test``. It chooses nothing."""

    name = "test_lowshot"
    version = 1
    Config = EvalOptions
    metrics = METRICS
    primary = "mean_top1"
    splits = frozenset({"test"})
    after = ("lowshot",)

    def run(self, job: Job) -> dict[str, float]:
        """Means and standard deviations over draws on ``test``."""
        state = load_for_classes(job, "lowshot", "heads.pt")
        scaling = FeatureScaling(state["normalize"], state["mean"].to(job.device), state["std"].to(job.device))
        test = job.rows("test")
        by_amount = {
            name: [_head(weight, scaling).top1(test) for weight in draws.to(job.device)]
            for name, draws in state["heads"].items()
        }
        job.write_report("test_lowshot.json", {"top1": by_amount})
        return summary(by_amount)


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [LowShot, LowShotTest]
