"""Linear classifier on frozen features, learning rate chosen on the validation split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslbench import comm
from sslbench.config.schema import OptimOptions
from sslbench.engine.schedule import learning_rate
from sslbench.errors import DivergedError
from sslbench.evaluation.classifiers import FeatureScaling, LinearHead, Normalize, label_ranks, percent
from sslbench.plugin.api import EvalOptions, EvalProtocol, FeatureTable, Job, ViewSpec
from sslbench.plugin.hooks import hookimpl

logger = logging.getLogger(__name__)

EpochBatches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From an epoch to its batches of scaled features ``[B,D]`` and labels ``[B]``, equal on all ranks."""

CURVE_POINTS = 20
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


class LinearConfig(EvalOptions):
    """Options of the linear protocol."""

    lrs: tuple[float, ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), min_length=1)
    """Learning rates to choose from, each per `lr_per` images of the batch."""
    lr_per: int | None = Field(256, ge=1)
    """Linear scaling: effective lr = lr * train_batch / lr_per; unset: rates are used as they are."""
    optimizer: Literal["sgd", "lars", "adam"] = "sgd"
    """`lars`: weight and bias of each head are scaled by their trust ratios, as in the SCRL evaluation; `adam`: as
    in relational reasoning's, which uses a rate of 0.001 as it is."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Of weights and biases alike."""
    trust: float = Field(1e-3, gt=0)
    """LARS trust coefficient."""
    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    train_batch: int = Field(256, ge=1)
    """Images in a training batch of the classifiers, over all devices."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """What happens to the rates after the warm-up: they fall to zero, stay, or are multiplied by `gamma` after
    each of the `milestones`."""
    advance: Literal["step", "epoch"] = "step"
    """When rates change: with every step, or with every epoch (SwAV's evaluation)."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """Step: fractions of the training."""
    gamma: float = Field(0.1, gt=0)
    """Step: the factor at each milestone."""
    init: Literal["uniform", "normal"] = "uniform"
    """How heads start: `uniform` in +-1/sqrt(D), as `nn.Linear`; `normal`: weights of standard deviation 0.01 and
    biases of 0 (SwAV's and MoCo's evaluations)."""
    augment: Literal["none", "crop-flip"] = "none"
    """`none`: features are computed once; `crop-flip`: every epoch sees new random resized crops (8 to 100 % of
    the area) and flips, as published for ImageNet."""
    normalize: Normalize = "standardize"
    """What happens to features first: nothing, mean 0 and standard deviation 1, or unit length. Published ImageNet
    numbers use `none`. On the features of an untrained conv4, top-1 on `val` was 80 (none), 97 (standardize) and
    87 (l2) for digits, and 71, 93 and 78 for mnist5k: without it, a method is judged by its features' scale."""
    refit: bool = True
    """Train the head that is kept again with the chosen rate on `train` and `val` together."""


class Heads:
    """Linear classifiers that differ in their learning rate alone, trained side by side.

    All heads see the same batches, so one matrix product serves the whole grid. They start from the same values.

    Args:
        lrs: ``[G]`` effective learning rates.
        dim: features D.
        classes: classes C.
    """

    def __init__(self, cfg: LinearConfig, lrs: Tensor, dim: int, classes: int, generator: torch.Generator) -> None:
        self.cfg = cfg
        self.lrs = lrs
        self.weight = _initial(cfg, dim, classes, generator).to(lrs.device).repeat(1, len(lrs), 1)
        """``[D+1,G,C]``; the last row is the bias."""
        self.velocity = torch.zeros_like(self.weight)
        """Running sum of updates; of Adam, the running mean of gradients."""
        self.power = torch.zeros_like(self.weight) if cfg.optimizer == "adam" else None
        """Adam's running mean of squared gradients."""
        self.steps = 0

    def logits(self, inputs: Tensor) -> Tensor:
        """``[N,D]`` to ``[N,G,C]``."""
        flat = torch.addmm(self.weight[-1].flatten(), inputs, self.weight[:-1].flatten(1))
        return flat.view(len(inputs), *self.weight.shape[1:])

    def step(self, inputs: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One step of momentum SGD on the mean cross-entropy at ``factor`` times each head's learning rate.

        Args:
            inputs: ``[B,D]``.
            labels: int64 ``[B]``.

        Returns:
            ``[G]``, the losses before the step.
        """
        log_p = self.logits(inputs).log_softmax(-1)
        loss = _cross_entropy(log_p, labels)
        slope = log_p.exp()
        slope[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        slope = slope.flatten(1) / len(labels)
        gradient = torch.cat([inputs.T @ slope, slope.sum(0, keepdim=True)]).view_as(self.weight)
        self._descend(gradient, factor)
        return loss

    def _descend(self, gradient: Tensor, factor: float) -> None:
        update = gradient.add_(self.weight, alpha=self.cfg.weight_decay)
        step = self._with_momentum(update) if self.power is None else self._normalized(update, self.power)
        self.weight -= factor * self.lrs[:, None] * step

    def _with_momentum(self, update: Tensor) -> Tensor:
        if self.cfg.optimizer == "lars":
            update = self._adapted(update)
        self.velocity.mul_(self.cfg.momentum).add_(update)
        return update + self.cfg.momentum * self.velocity if self.cfg.nesterov else self.velocity

    def _normalized(self, update: Tensor, power: Tensor) -> Tensor:
        """Kingma & Ba, "Adam" (ICLR 2015), algorithm 1, with the authors' constants."""
        self.steps += 1
        beta, slow = ADAM_BETAS
        self.velocity.lerp_(update, 1 - beta)
        power.lerp_(update.square(), 1 - slow)
        root = (power / (1 - slow**self.steps)).sqrt_().add_(ADAM_EPSILON)
        return self.velocity / (1 - beta**self.steps) / root

    def _adapted(self, update: Tensor) -> Tensor:
        """Scale each head's weight and bias by trust * |w| / |g + wd * w| (1 where a norm is zero)."""

        def ratio(weight: Tensor, change: Tensor) -> Tensor:
            own, other = weight.norm(dim=(0, 2)), change.norm(dim=(0, 2))
            scale = self.cfg.trust * own / other
            return torch.where((own > 0) & (other > 0), scale, torch.ones_like(scale))[:, None]

        parts = [(self.weight[:-1], update[:-1]), (self.weight[-1:], update[-1:])]
        return torch.cat([change * ratio(weight, change) for weight, change in parts])


def _initial(cfg: LinearConfig, dim: int, classes: int, generator: torch.Generator) -> Tensor:
    """``[D+1,1,C]``"""
    if cfg.init == "uniform":
        return (torch.rand(dim + 1, 1, classes, generator=generator) * 2 - 1) / math.sqrt(dim)
    weight = torch.randn(dim, 1, classes, generator=generator) * 0.01
    return torch.cat([weight, torch.zeros(1, 1, classes)])


AfterEpoch = Callable[[int, Tensor, Heads], None]
"""Gets the zero-based epoch, its mean losses ``[G]`` and the heads."""


@dataclass(frozen=True)
class Score:
    """How each of G heads does on a table."""

    top1: Tensor
    """float64 ``[G]``, percent."""
    top5: Tensor
    loss: Tensor
    """float64 ``[G]``; infinite for a head that diverged."""

    def best(self) -> int:
        """The head of the highest top-1; of equals, the one of the lowest loss."""
        order = [(-float(t), float(loss), g) for g, (t, loss) in enumerate(zip(self.top1, self.loss, strict=True))]
        return min(order)[2]


def _cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of ``[N,G,C]`` log-probabilities: ``[G]``."""
    wanted = labels[:, None, None].expand(-1, log_p.shape[1], 1)
    return -log_p.gather(2, wanted).squeeze(2).mean(0)


def score(heads: Heads, scaling: FeatureScaling, table: FeatureTable, chunk: int = 2048) -> Score:
    """Evaluate all heads on a split."""
    labels = table.labels
    ranks, losses = [], []
    for rows, wanted in zip(torch.split(table.features, chunk), torch.split(labels, chunk), strict=True):
        log_p = heads.logits(scaling(rows)).log_softmax(-1)
        ranks.append(label_ranks(log_p, wanted))
        losses.append(_cross_entropy(log_p, wanted).double() * len(rows))
    places = torch.cat(ranks)
    loss = (torch.stack(losses).sum(0) / len(labels)).nan_to_num(nan=torch.inf)
    alive = loss.isfinite()
    return Score(percent(places < 1) * alive, percent(places < 5) * alive, loss)


def train(heads: Heads, epoch_batches: EpochBatches, steps_per_epoch: int, after_epoch: AfterEpoch) -> None:
    """Train for ``cfg.epochs`` epochs."""
    cfg = heads.cfg
    schedule = OptimOptions(
        schedule=cfg.schedule,
        advance="epoch" if cfg.advance == "epoch" else "begun",
        warmup_epochs=cfg.warmup_epochs,
        milestones=cfg.milestones,
        gamma=cfg.gamma,
    )
    steps = cfg.epochs * steps_per_epoch
    for epoch in range(cfg.epochs):
        total = torch.zeros_like(heads.lrs)
        for number, (inputs, labels) in enumerate(epoch_batches(epoch)):
            step = epoch * steps_per_epoch + number
            factor = learning_rate(schedule, peak=1.0, step=step, steps=steps, steps_per_epoch=steps_per_epoch)
            total += heads.step(inputs, labels, factor)
        after_epoch(epoch, total / steps_per_epoch, heads)


class Linear(EvalProtocol):
    """The linear evaluation of a frozen backbone.

    A grid of classifiers with different learning rates is trained on ``train``; the best on ``val`` is chosen.
    With ``refit`` the head that is kept (``head.pt``, for protocol ``test``) is trained again on both. Every rank
    trains the same heads on the gathered features.
    """

    name = "linear"
    version = 1
    Config = LinearConfig
    metrics = {  # noqa: RUF012
        "val_top1": "max",
        "val_top5": "max",
        "val_loss": "min",
        "train_top1": "max",
        "lr": "max",
    }
    primary = "val_top1"
    splits = frozenset({"train", "val", "trainval"})

    cfg: LinearConfig

    def run(self, job: Job) -> dict[str, float]:
        """Choose a learning rate, save the head, return how the chosen one did on ``val``."""
        train_table, val = job.features("train"), job.features("val")
        scaling = FeatureScaling.fit(self.cfg.normalize, train_table.features)
        curves = self._curves(job, scaling, val)
        heads = self._fit(job, "train", train_table, scaling, self.cfg.lrs, curves)
        found = score(heads, scaling, val)
        g = found.best()
        if not math.isfinite(found.loss[g]):
            raise DivergedError("every learning rate of protocol 'linear' diverged", hint="try smaller lrs")
        lr = self.cfg.lrs[g]
        self._report_grid(job, found, lr)
        self._save(job, heads, g, scaling)
        return {
            "val_top1": float(found.top1[g]),
            "val_top5": float(found.top5[g]),
            "val_loss": float(found.loss[g]),
            "train_top1": float(score(heads, scaling, train_table).top1[g]),
            "lr": lr,
        }

    def _curves(self, job: Job, scaling: FeatureScaling, val: FeatureTable) -> AfterEpoch:
        """Log the best head of the moment, about ``CURVE_POINTS`` times."""
        every = math.ceil(self.cfg.epochs / CURVE_POINTS)

        def log(epoch: int, losses: Tensor, heads: Heads) -> None:
            if (epoch + 1) % every and epoch + 1 < self.cfg.epochs:
                return
            now = score(heads, scaling, val)
            g = now.best()
            point = {"val_top1": now.top1[g], "val_loss": now.loss[g], "train_loss": losses[g]}
            job.log(epoch + 1, {key: float(value) for key, value in point.items()} | {"lr": self.cfg.lrs[g]})

        return log

    def _report_grid(self, job: Job, found: Score, lr: float) -> None:
        by_lr = [
            {"lr": rate, "val_top1": float(top1), "val_loss": float(loss) if loss.isfinite() else None}
            for rate, top1, loss in zip(self.cfg.lrs, found.top1, found.loss, strict=True)
        ]
        at_edge = len(self.cfg.lrs) > 2 and lr in (min(self.cfg.lrs), max(self.cfg.lrs))
        job.write_report("linear.json", {"lr": lr, "at_edge_of_grid": at_edge, "by_lr": by_lr})
        if at_edge:
            logger.warning("the best learning rate, %g, is at the edge of the grid: widen evals.linear.lrs", lr)

    def _save(self, job: Job, heads: Heads, g: int, scaling: FeatureScaling) -> None:
        lr = self.cfg.lrs[g]
        if self.cfg.refit:
            table = job.features("trainval")
            scaling = FeatureScaling.fit(self.cfg.normalize, table.features)
            heads, g = self._fit(job, "trainval", table, scaling, (lr,), lambda *_: None), 0
        weight = heads.weight[:, g].T
        head = LinearHead(weight[:, :-1].contiguous(), weight[:, -1].contiguous(), scaling)
        origin = {"classes": list(job.classes), "lr": lr, "trained_on": "trainval" if self.cfg.refit else "train"}
        job.save("head.pt", {**head.state(), **origin})

    def _fit(
        self,
        job: Job,
        split: str,
        table: FeatureTable,
        scaling: FeatureScaling,
        lrs: tuple[float, ...],
        after_epoch: AfterEpoch,
    ) -> Heads:
        batch = min(self.cfg.train_batch, len(table.labels))
        scale = batch / self.cfg.lr_per if self.cfg.lr_per else 1.0
        effective = torch.tensor(lrs, device=job.device) * scale
        heads = Heads(self.cfg, effective, table.features.shape[1], len(job.classes), job.generator("init"))
        if self.cfg.augment == "none":
            batches, steps = _resident_batches(job, table, scaling, batch), math.ceil(len(table.labels) / batch)
        else:
            view = ViewSpec(scale=(0.08, 1.0), flip=0.5, interpolation=self.cfg.interpolation)
            batches, steps = _streamed_batches(job, split, scaling, batch, view), len(table.labels) // batch
        train(heads, batches, steps, after_epoch)
        return heads


def _resident_batches(job: Job, table: FeatureTable, scaling: FeatureScaling, batch: int) -> EpochBatches:
    """Shuffled batches of the cached features; the last one may be smaller."""

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(table.labels), generator=job.generator(f"order/{epoch}")).to(job.device)
        for rows in torch.split(order, batch):
            yield scaling(table.features[rows]), table.labels[rows]

    return epoch_batches


def _streamed_batches(job: Job, split: str, scaling: FeatureScaling, batch: int, view: ViewSpec) -> EpochBatches:
    """Features of augmented images. Ranks share the forward passes and then see the whole batch."""

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for augmented, labels in job.batches(split, [view], batch, epoch):
            with torch.no_grad():
                features = job.backbone()(augmented.views[0].images).pooled.float()
            yield scaling(comm.gather(features)), comm.gather(labels)

    return epoch_batches


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Linear]
