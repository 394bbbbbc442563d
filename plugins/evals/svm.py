"""Linear support vector machines on frozen features of images with several labels: VOC07 mAP."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sslbench import comm
from sslbench.data.loader import rank_share
from sslbench.errors import DataError
from sslbench.evaluation.classifiers import FeatureScaling, LinearHead
from sslbench.evaluation.convex import fit_svms
from sslbench.evaluation.heldout import load_head
from sslbench.evaluation.multilabel import average_precision, class_precisions, shares_of, signs_of, unit_inputs
from sslbench.plugin.api import EvalOptions, EvalProtocol, FeatureRows, Job, LabelledRows
from sslbench.plugin.hooks import hookimpl

logger = logging.getLogger(__name__)

COSTS = (*(2.0**p for p in range(-19, -3)), *(10.0**p for p in range(-7, 3)))
"""Goyal et al., appendix: C in 2^[-19,-4] and 10^[-7,2]."""
Difficult = Literal["ignore", "absent"]
HELD = 1 << 26
"""Weights of images, one per machine, that are held at once: 256 MB."""


class SvmConfig(EvalOptions):
    """Options of the svm protocol."""

    costs: tuple[float, ...] = Field(COSTS, min_length=1)
    """Costs C to choose from, class by class. One cost alone needs no cross-validation: 0.5 is what the programs
    of PCL and of Revisiting Contrastive Methods take."""
    folds: int = Field(3, ge=2)
    """Parts of the training images; the cost with the best average precision over them is taken."""
    difficult: Difficult = "ignore"
    """Images whose object is marked difficult count as `absent`, or are left out, when results are computed. They
    are always trained on as absent."""
    tolerance: float = Field(1e-4, gt=0)
    """A machine is trained when its gradient's norm has fallen to this share of that at zero weights."""
    max_steps: int = Field(2000, ge=1)
    """Steps of L-BFGS after which a machine is taken as it is."""


class Svm(EvalProtocol):
    """One linear SVM per class on features of unit length; its cost is chosen by cross-validation.

    Squared hinge loss, images of the class weigh twice, costs are chosen within ``train``; ``val`` tells how the
    machines do. Those that are kept (``head.pt``, for protocol ``test_svm``) are trained on ``train`` and ``val``
    with costs chosen on both, as published (trainval).

    Source: Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning", ICCV 2019,
    section 6.1 and appendix. The machines are those of scikit-learn's ``LinearSVC``, solved by L-BFGS: all costs
    and folds of a class at once. Ranks share the classes. Memory beyond the features, per rank: some copies of
    ``4 * max(2^26, costs * folds * N)`` bytes, the weights of a group of machines.
    """

    name = "svm"
    version = 1
    Config = SvmConfig
    metrics = {"val_map": "max"}  # noqa: RUF012
    primary = "val_map"
    splits = frozenset({"train", "val", "trainval"})
    tasks = frozenset({"multilabel"})

    cfg: SvmConfig

    def run(self, job: Job) -> dict[str, float]:
        """Train on ``train``, judge on ``val``, and save machines trained on both."""
        head, costs = self._fit(job, job.rows("train"))
        val = job.rows("val")
        precisions = class_precisions(head.scores(val), val.labels, self.cfg.difficult == "ignore")
        head, final = self._fit(job, job.rows("trainval"))
        rows = zip(job.classes, precisions, costs, final, strict=True)
        report = [{"class": name, "val_ap": 100 * ap, "cost": c, "final_cost": f} for name, ap, c, f in rows]
        job.write_report("svm.json", {"per_class": report})
        job.save("head.pt", {**head.state(), "classes": list(job.classes), "difficult": self.cfg.difficult})
        return {"val_map": mean_percent(precisions, job)}

    def _fit(self, job: Job, table: LabelledRows) -> tuple[LinearHead, list[float]]:
        """Machines of all classes and the costs that were chosen for them."""
        rows, signs = table.features, signs_of(table.labels)
        if len(self.cfg.costs) > 1:
            check_folds(signs, self.cfg.folds)
        # All ranks agree that there are enough images; from here on each has its own classes.
        own = rank_share(len(signs), comm.rank(), comm.world())
        inputs, signs = unit_inputs(rows.whole) if rows.held else rows, signs[own.start : own.stop]
        weight, costs = map(comm.gather, comm.patiently(lambda: self._solve(job, inputs, signs)))
        scaling = FeatureScaling.fit("l2", rows)
        return LinearHead(weight[:, :-1].contiguous(), weight[:, -1].contiguous(), scaling), costs.tolist()

    def _solve(self, job: Job, inputs: Tensor | FeatureRows, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Machines ``[C,D+1]`` and costs ``[C]`` of classes with signs ``[C,N]``."""
        chosen = torch.tensor(self._choose(job, inputs, signs), dtype=torch.float64, device=job.device)
        return self._train(inputs, signs, shares_of(signs), chosen.float()), chosen

    def _choose(self, job: Job, inputs: Tensor | FeatureRows, signs: Tensor) -> list[float]:
        """The cost of each class, ``[C]``: that of the best mean average precision over the folds."""
        if len(self.cfg.costs) == 1 or not len(signs):
            return [self.cfg.costs[0]] * len(signs)
        machines = self.cfg.folds * len(self.cfg.costs) * signs.shape[1]
        groups = torch.split(signs, max(1, HELD // machines))
        return [cost for group in groups for cost in self._choose_for(job, inputs, group)]

    def _choose_for(self, job: Job, inputs: Tensor | FeatureRows, signs: Tensor) -> list[float]:
        """The costs of some classes; their machines for all folds and costs are one computation."""
        folds, grid = self.cfg.folds, torch.tensor(self.cfg.costs, device=job.device)
        fold = torch.stack([stratified_folds(sign, folds) for sign in signs])
        unseen = fold[:, None] == torch.arange(folds, device=job.device)[:, None]
        shares = (shares_of(signs)[:, None] * ~unseen).flatten(0, 1).repeat_interleave(len(grid), 0)
        repeated = signs.repeat_interleave(folds * len(grid), 0)
        weight = self._train(inputs, repeated, shares, grid.repeat(len(shares) // len(grid)))
        precision = torch.zeros(len(signs), folds, len(grid))
        for c, f in torch.cartesian_prod(torch.arange(len(signs)), torch.arange(folds)).tolist():
            machines = weight.view(*precision.shape, -1)[c, f]
            judged = unseen[c, f].nonzero().flatten()
            scores, positive = _scores(machines, inputs, judged), signs[c, judged] > 0
            found = [average_precision(column, positive, monotone=False) for column in scores]
            precision[c, f] = torch.tensor(found)
        return [self.cfg.costs[best] for best in precision.mean(1).argmax(1).tolist()]

    def _train(self, inputs: Tensor | FeatureRows, signs: Tensor, shares: Tensor, costs: Tensor) -> Tensor:
        return fit_svms(inputs, signs, shares, costs, tolerance=self.cfg.tolerance, max_steps=self.cfg.max_steps)


def _scores(machines: Tensor, inputs: Tensor | FeatureRows, rows: Tensor) -> Tensor:
    """``[G,n]`` of machines ``[G,D+1]`` on some images."""
    if isinstance(inputs, Tensor):
        return machines @ inputs[rows].T
    picks = torch.split(rows.cpu(), inputs.chunk)
    return torch.cat([machines @ unit_inputs(features).T for features in inputs.batches(picks)], 1)


def check_folds(signs: Tensor, folds: int) -> None:
    """Refuse to cross-validate classes that are too small.

    Args:
        signs: ``[C,N]``.

    Raises:
        DataError: there are fewer images of a kind than folds.
    """
    present = (signs > 0).sum(1)
    if int(torch.minimum(present, signs.shape[1] - present).min()) < folds:
        raise DataError(
            f"a class with fewer than {folds} images cannot be cross-validated in {folds} folds",
            hint="give one cost: costs=[0.5] (with pretrain: evals.svm.costs=[0.5])",
        )


def stratified_folds(sign: Tensor, folds: int) -> Tensor:
    """int64 ``[N]``: the fold of each image, scikit-learn's for classifiers: in order, each with its share of
    both kinds.

    Raises:
        DataError: there are fewer images of a kind than folds.
    """
    from sklearn.model_selection import StratifiedKFold

    check_folds(sign[None], folds)
    kinds = (sign > 0).long().cpu()
    fold = torch.empty(len(sign), dtype=torch.int64)
    for number, (_, rows) in enumerate(StratifiedKFold(folds).split(kinds, kinds)):
        fold[torch.from_numpy(rows)] = number
    return fold.to(sign.device)


def mean_percent(precisions: list[float], job: Job) -> float:
    """Mean average precision in percent.

    Raises:
        DataError: a class has no image in the split.
    """
    missing = [name for name, ap in zip(job.classes, precisions, strict=True) if math.isnan(ap)]
    if missing:
        raise DataError(f"no image of the split shows {', '.join(missing)}: there is no average precision")
    return 100 * sum(precisions) / len(precisions)


class SvmTest(EvalProtocol):
    """How the machines of ``svm`` do on ``test``: the published VOC07 number. It chooses nothing."""

    name = "test_svm"
    version = 1
    Config = EvalOptions
    metrics = {"map": "max"}  # noqa: RUF012
    primary = "map"
    splits = frozenset({"test"})
    after = ("svm",)
    tasks = frozenset({"multilabel"})

    def run(self, job: Job) -> dict[str, float]:
        """Average precision of every class on the test images."""
        head, test = load_head(job, "svm"), job.rows("test")
        difficult: Any = job.load_from("svm", "head.pt")["difficult"]
        precisions = class_precisions(head.scores(test), test.labels, difficult == "ignore")
        per_class = {name: 100 * ap for name, ap in zip(job.classes, precisions, strict=True)}
        job.write_report("test_svm.json", {"n": len(test.labels), "per_class": per_class})
        return {"map": mean_percent(precisions, job)}


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Svm, SvmTest]
