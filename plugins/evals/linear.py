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
from torch.nn import functional as F

from sslbench import comm
from sslbench.config.schema import OptimOptions
from sslbench.data.loader import rank_share
from sslbench.engine.schedule import learning_rate
from sslbench.errors import DivergedError
from sslbench.evaluation.classifiers import FeatureScaling, Labelled, LinearHead, Normalize, label_ranks, percent
from sslbench.plugin.api import EvalOptions, EvalProtocol, FeatureRows, Job, LabelledRows, ViewSpec
from sslbench.plugin.hooks import hookimpl

logger = logging.getLogger(__name__)

EpochBatches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From an epoch to batches of inputs ``[B,D+1]`` (:func:`with_ones`) and labels ``[B]``, equal on all ranks."""

CURVE_POINTS = 20
GATHERED = 1 << 18
"""Values that are fetched from the table at once: 1 MB, which stays in a core's cache until it is used."""
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
    """Step: fractions of the training; with `advance: epoch`, rounded down to whole epochs, at least one."""
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
        """``[C,G,D+1]``; the last column is the bias. Classes come first because a softmax over the first
        dimension runs four times as fast on a CPU as one over a short last dimension."""
        self.velocity = torch.zeros_like(self.weight)
        """Running sum of updates; of Adam, the running mean of gradients."""
        self.power = torch.zeros_like(self.weight) if cfg.optimizer == "adam" else None
        """Adam's running mean of squared gradients."""
        self.steps = 0
        self._minus_one = torch.full((1, 1, 1), -1.0, device=lrs.device)

    def logits(self, inputs: Tensor) -> Tensor:
        """``[N,D+1]`` inputs, see :func:`with_ones`, to ``[C,G,N]``."""
        flat = self.weight.flatten(0, 1) @ inputs.T
        return flat.view(*self.weight.shape[:2], len(inputs))

    def of_all_ranks(self, lrs: Tensor) -> Heads:
        """The trained classifiers of all ranks, whose rates together are ``lrs`` ``[G]``."""
        self.lrs, self.weight = (
            lrs,
            comm.gather(self.weight.transpose(0, 1).contiguous()).transpose(0, 1).contiguous(),
        )
        return self

    def head(self, g: int, scaling: FeatureScaling) -> LinearHead:
        """One of the classifiers, for features that are scaled like the training inputs."""
        weight = self.weight[:, g].clone()
        return LinearHead(weight[:, :-1].contiguous(), weight[:, -1].contiguous(), scaling)

    def step(self, inputs: Tensor, labels: Tensor, factor: float, losses: Tensor | None = None) -> None:
        """One step of momentum SGD on the mean cross-entropy at ``factor`` times each head's learning rate.

        Args:
            inputs: ``[B,D+1]``.
            labels: int64 ``[B]``.
            losses: ``[G]``, to which the losses before the step are added.
        """
        logits = self.logits(inputs)
        if losses is not None:
            losses += _cross_entropy(logits.log_softmax(0), labels).mean(1)
        slope = logits.flatten(1).softmax(0).view_as(logits)
        wanted = labels.expand(1, *logits.shape[1:])
        slope.scatter_add_(0, wanted, self._minus_one.expand_as(wanted))
        nothing = slope.new_empty(1)
        mean = torch.addmm(nothing, slope.flatten(0, 1), inputs, beta=0, alpha=1 / len(labels))
        self._descend(mean.view_as(self.weight), factor)

    def _descend(self, gradient: Tensor, factor: float) -> None:
        if self.cfg.weight_decay:
            gradient.add_(self.weight, alpha=self.cfg.weight_decay)
        step = self._with_momentum(gradient) if self.power is None else self._normalized(gradient, self.power)
        self.weight.addcmul_(step, self.lrs[:, None], value=-factor)

    def _with_momentum(self, update: Tensor) -> Tensor:
        if self.cfg.optimizer == "lars":
            update = self._adapted(update)
        torch.add(update, self.velocity, alpha=self.cfg.momentum, out=self.velocity)
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

        parts = [(self.weight[..., side], update[..., side]) for side in (slice(0, -1), slice(-1, None))]
        return torch.cat([change * ratio(weight, change) for weight, change in parts], dim=2)


def _initial(cfg: LinearConfig, dim: int, classes: int, generator: torch.Generator) -> Tensor:
    """``[C,1,D+1]``"""
    if cfg.init == "uniform":
        drawn = (torch.rand(dim + 1, classes, generator=generator) * 2 - 1) / math.sqrt(dim)
    else:
        weight = torch.randn(dim, classes, generator=generator) * 0.01
        drawn = torch.cat([weight, torch.zeros(1, classes)])
    return drawn.T[:, None].contiguous()


def with_ones(features: Tensor) -> Tensor:
    """``[N,D]`` to ``[N,D+1]``: a last column of ones, which the bias is the weight of."""
    return F.pad(features, (0, 1), value=1.0)


@dataclass(frozen=True)
class Score:
    """How each of G heads does on a table."""

    top1: Tensor
    """float64 ``[G]``, percent."""
    top5: Tensor
    loss: Tensor
    """float64 ``[G]``; infinite for a head that diverged."""

    def of_all_ranks(self) -> Score:
        """With the heads of the other ranks."""
        return Score(comm.gather(self.top1), comm.gather(self.top5), comm.gather(self.loss))

    def best(self) -> int:
        """The head of the highest top-1; of equals, the one of the lowest loss."""
        order = [(-float(t), float(loss), g) for g, (t, loss) in enumerate(zip(self.top1, self.loss, strict=True))]
        return min(order)[2]


def _cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """Of log-probabilities ``[C,G,N]``: ``[G,N]``."""
    return -log_p.gather(0, labels.expand(1, *log_p.shape[1:])).squeeze(0)


def score(heads: Heads, scaling: FeatureScaling, table: Labelled, chunk: int = 2048) -> Score:
    """Evaluate all heads on a split."""
    labels = table.labels
    ranks, losses = [], []
    chunks = FeatureRows.of(table.features).chunks(chunk)
    for rows, wanted in zip(chunks, torch.split(labels, chunk), strict=True):
        log_p = heads.logits(with_ones(scaling(rows))).log_softmax(0)
        ranks.append(label_ranks(log_p.permute(2, 1, 0).contiguous(), wanted))
        losses.append(_cross_entropy(log_p, wanted).double().sum(1))
    places = torch.cat(ranks)
    loss = (torch.stack(losses).sum(0) / len(labels)).nan_to_num(nan=torch.inf)
    alive = loss.isfinite()
    return Score(percent(places < 1) * alive, percent(places < 5) * alive, loss)


AfterEpoch = Callable[[int, Tensor, Heads], None]
"""Gets the zero-based epoch, its mean losses ``[G]`` and the heads."""


@dataclass(frozen=True)
class Observer:
    """Looks at the heads after some of the epochs."""

    every: int
    """In epochs; it also sees the last one."""
    look: AfterEpoch

    def wants(self, epoch: int, epochs: int) -> bool:
        """Whether it looks after a zero-based epoch."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs


def train(
    heads: Heads, epoch_batches: EpochBatches, steps_per_epoch: int, observer: Observer | None = None
) -> None:
    """Train for ``cfg.epochs`` epochs. Losses are computed in the epochs that the observer looks at.

    Ranks that train other heads wait for each other after each epoch, so that none runs into a time limit.
    """
    cfg = heads.cfg
    rates = _rates(cfg, steps_per_epoch)
    for epoch in range(cfg.epochs):
        observed = observer is not None and observer.wants(epoch, cfg.epochs)
        losses = torch.zeros_like(heads.lrs) if observed else None
        factors = rates[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        for factor, (inputs, labels) in zip(factors, epoch_batches(epoch), strict=True):
            heads.step(inputs, labels, factor, losses)
        comm.barrier()
        if observer is not None and losses is not None:
            observer.look(epoch, losses / steps_per_epoch, heads)


def _rates(cfg: LinearConfig, steps_per_epoch: int) -> list[float]:
    """What learning rates are multiplied by in each step."""
    schedule = OptimOptions(
        schedule=cfg.schedule,
        advance="epoch" if cfg.advance == "epoch" else "begun",
        warmup_epochs=cfg.warmup_epochs,
        milestones=cfg.milestones,
        gamma=cfg.gamma,
    )
    steps = cfg.epochs * steps_per_epoch
    return [
        learning_rate(schedule, peak=1.0, step=step, steps=steps, steps_per_epoch=steps_per_epoch)
        for step in range(steps)
    ]


class Linear(EvalProtocol):
    """The linear evaluation of a frozen backbone.

    A grid of classifiers with different learning rates is trained on ``train``; the best on ``val`` is chosen.
    With ``refit`` the head that is kept (``head.pt``, for protocol ``test``) is trained again on both. Ranks share
    the grid: each trains its rates on all features, as they come from where the table is. A single head is trained
    by all of them.
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
        train_table, val = job.rows("train"), job.rows("val")
        scaling = FeatureScaling.fit(self.cfg.normalize, train_table.features)
        heads = self._fit(job, "train", train_table, scaling, self.cfg.lrs, self._curves(job, scaling, val))
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
            "train_top1": heads.head(g, scaling).top1(train_table),
            "lr": lr,
        }

    def _curves(self, job: Job, scaling: FeatureScaling, val: LabelledRows) -> Observer:
        """Log the best head of the moment, about ``CURVE_POINTS`` times."""

        def log(epoch: int, losses: Tensor, heads: Heads) -> None:
            now, losses = score(heads, scaling, val).of_all_ranks(), comm.gather(losses)
            g = now.best()
            point = {"val_top1": now.top1[g], "val_loss": now.loss[g], "train_loss": losses[g]}
            job.log(epoch + 1, {key: float(value) for key, value in point.items()} | {"lr": self.cfg.lrs[g]})

        return Observer(math.ceil(self.cfg.epochs / CURVE_POINTS), log)

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
            table = job.rows("trainval")
            scaling = FeatureScaling.fit(self.cfg.normalize, table.features)
            heads, g = self._fit(job, "trainval", table, scaling, (lr,)), 0
        origin = {"classes": list(job.classes), "lr": lr, "trained_on": "trainval" if self.cfg.refit else "train"}
        job.save("head.pt", {**heads.head(g, scaling).state(), **origin})

    def _fit(
        self,
        job: Job,
        split: str,
        table: LabelledRows,
        scaling: FeatureScaling,
        lrs: tuple[float, ...],
        observer: Observer | None = None,
    ) -> Heads:
        batch = min(self.cfg.train_batch, len(table.labels))
        scale = batch / self.cfg.lr_per if self.cfg.lr_per else 1.0
        effective = torch.tensor(lrs, device=job.device) * scale
        mine = rank_share(len(lrs), comm.rank(), comm.world()) if len(lrs) > 1 else range(1)
        own = effective[mine.start : mine.stop]
        heads = Heads(self.cfg, own, table.features.dim, len(job.classes), job.generator("init"))
        if self.cfg.augment == "none":
            batches, steps = resident_batches(job, table, scaling, batch), math.ceil(len(table.labels) / batch)
        else:
            view = ViewSpec(scale=(0.08, 1.0), flip=0.5, interpolation=self.cfg.interpolation)
            batches, steps = _streamed_batches(job, split, scaling, batch, view), len(table.labels) // batch
        train(heads, batches, steps, observer)
        return heads.of_all_ranks(effective) if len(lrs) > 1 else heads


def epoch_order(job: Job, rows: int, epoch: int) -> Tensor:
    """int64 ``[rows]``: the order in which an epoch goes through a table."""
    return torch.randperm(rows, generator=job.generator(f"order/{epoch}"))


def resident_batches(job: Job, table: Labelled, scaling: FeatureScaling, batch: int) -> EpochBatches:
    """Shuffled batches of the cached features, read ahead where they are not on the device; the last one may be
    smaller. Of a table that is held a scaled copy is made, 256 MB at most."""
    features = FeatureRows.of(table.features)
    block = batch * max(1, GATHERED // (batch * features.dim))
    scaled = with_ones(scaling(features.whole)) if features.held else None

    def fetched(picks: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if scaled is not None:
            return (torch.index_select(scaled, 0, rows.to(job.device)) for rows in picks)
        return (with_ones(scaling(rows)) for rows in features.batches(picks))

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        picks = torch.split(epoch_order(job, len(features), epoch), block)
        for rows, inputs in zip(picks, fetched(picks), strict=True):
            labels = torch.index_select(table.labels, 0, rows.to(job.device))
            yield from zip(torch.split(inputs, batch), torch.split(labels, batch), strict=True)

    return epoch_batches


def _streamed_batches(job: Job, split: str, scaling: FeatureScaling, batch: int, view: ViewSpec) -> EpochBatches:
    """Features of augmented images. Ranks share the forward passes and then see the whole batch."""

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for augmented, labels in job.batches(split, [view], batch, epoch):
            with torch.no_grad():
                features = job.backbone()(augmented.views[0].images).pooled.float()
            yield with_ones(scaling(comm.gather(features))), comm.gather(labels)

    return epoch_batches


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Linear]
