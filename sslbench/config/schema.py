"""Typed options of the core: run, train, optim, data, probe, checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sslbench.config.options import Options, cosmetic


class RunOptions(Options):
    """Who and where."""

    seed: int = Field(1, ge=0)
    """Seed of initialisation, data order, views and everything else that is random."""
    name: str | None = cosmetic(None)
    """Name of the run; unset: method-dataset-backbone-sSEED and a time stamp."""
    experiment: str | None = cosmetic(None)
    """MLflow experiment; unset: the name of the pretraining data set."""
    tracking_uri: str | None = cosmetic(None)
    """MLflow store; unset: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory."""
    evals: tuple[str, ...] = cosmetic(("linear", "knn", "test"))
    """Evaluations that run after pretraining, in this order; empty: none. Options go under `evals.NAME`."""
    note: str | None = cosmetic(None)
    """Free text shown with the run."""

    @field_validator("name", "experiment")
    @classmethod
    def _fits_everywhere(cls, value: str | None) -> str | None:
        """Names become folders, links and words on the command line."""
        if value is not None and not re.fullmatch(r"\w[\w .:+-]{0,99}", value):
            raise ValueError(
                "must be 1 to 100 letters, digits and any of _ . : + - or space, and start with a letter"
            )
        if value == "last":
            raise ValueError("'last' stands for the newest run")
        return value


class TrainOptions(Options):
    """The length and the machinery of training."""

    epochs: int = Field(20, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(128, ge=2)
    """Images in the global batch, over all devices. The last partial batch of an epoch is dropped."""
    limit: int | None = cosmetic(None, ge=1)
    """Stop after this many steps; the run is stamped as limited and kept out of reports."""
    device: Literal["auto", "cpu", "cuda"] = cosmetic("auto")
    """`auto`: CUDA if torch sees a device, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast where the hardware multiplies it (CUDA devices since Ampere, CPUs with AMX), fp32
    elsewhere. `fp16`: autocast for GPUs before Ampere, with a loss scale that adapts; steps whose gradients
    overflow are skipped, and each step waits for the device to know."""
    compile: bool = False
    """Compile the method's backbones with torch.compile."""
    parallel: Literal["ddp", "fsdp"] = cosmetic("ddp")
    """On several devices: each keeps the whole model (`ddp`), or its share of the parameters, gradients and
    optimiser states of all backbones (`fsdp`: FSDP2), which come together block by block while they compute. For
    backbones that do not fit; slower otherwise. The results are those of `ddp` but for rounding."""
    checkpoint_activations: bool = cosmetic(False)
    """Keep only the inputs of a backbone's blocks for the backward pass and compute the rest again: a fraction of
    the memory, a third more time, the same results."""
    accumulate: int = Field(1, ge=1)
    """Compute each step's gradient from so many parts of the global batch in turn, for methods whose loss is a
    mean over images that do not see each other. The views are those of the whole batch, and loss and gradient are
    exactly the averages over the parts. Batch normalisation sees one part at a time, so with it the result is
    that of smaller statistics; without it, that of the whole batch but for rounding."""
    channels_last: bool | None = None
    """Memory layout of images and weights; unset: channels-last on CUDA, and on CPUs for networks whose narrowest
    convolution fills a vector."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest norm of the gradient; a longer one is scaled down to it."""
    clip_by: Literal["all", "tensor"] = "all"
    """What `clip_grad` limits: the norm of `all` gradients together, or that of each parameter `tensor` by itself
    (DINO)."""
    deterministic: bool = True
    """Ask torch for deterministic kernels."""
    sync_bn: bool | int = True
    """With several processes, batch normalisation sees the rows of all of them, as in one process; a number: of
    groups of so many neighbouring processes; false: each sees its own, and results depend on their number."""
    log_every: int = cosmetic(10, ge=1)
    """Steps between two lines of metrics."""
    rollback: int = cosmetic(0, ge=0)
    """When the loss is no number any more: go back to the last checkpoint and on with a lower learning rate, so
    many times at most. Such a run has a row of its own in `compare`."""
    rollback_factor: float = cosmetic(0.5, gt=0, lt=1)
    """What the learning rate is multiplied by each time."""

    @field_validator("sync_bn")
    @classmethod
    def _shared_by_several(cls, value: bool | int) -> bool | int:
        if not isinstance(value, bool) and value < 2:
            raise ValueError(f"must be true, false or a number of processes from 2 on, got {value}")
        return value

    @model_validator(mode="after")
    def _compiles_alone(self) -> TrainOptions:
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compile and parallel 'fsdp' exclude each other: shards are fetched between blocks")
        if self.compile and self.checkpoint_activations:
            raise ValueError(
                "compile and checkpoint_activations exclude each other: a compiled backbone decides by itself "
                "what it computes again"
            )
        if self.rollback and self.parallel == "fsdp":
            raise ValueError("rollback and parallel 'fsdp' exclude each other: weights in shards do not go back")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must not exceed batch_size {self.batch_size}")
        return self


class OptimOptions(Options):
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "lars", "adamw", "adam"] = "adamw"
    """Which optimiser; `lars` is momentum SGD with layer-wise rates."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate per `lr_per` images of the global batch; the effective value is logged too."""
    lr_per: int | None = Field(None, ge=1)
    """Images that `lr` is meant for: it is scaled to the global batch by `lr_rule`; unset: lr is used as it is."""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """`linear`: effective lr = lr * batch_size / lr_per, the rule for SGD (Goyal et al., 2017) and LARS; `sqrt`:
    lr * sqrt(batch_size / lr_per), which adaptive optimisers follow (Krizhevsky, 2014; SimCLR, appendix B.1)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """sgd and lars."""
    nesterov: bool = False
    """sgd and lars: Nesterov's momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adam and adamw."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of all parameters that `exclude` does not name."""
    final_weight_decay: float | None = Field(None, ge=0)
    """Where the weight decay ends, along half a cosine over the whole run (DINO); unset: it stays as it is."""
    exclude: Literal["1d", "bn-bias-names", "none"] = "1d"
    """Parameters without weight decay and LARS scaling: `1d`: all vectors (biases and normalisation);
    `bn-bias-names`: names containing "bn" or "bias", the rule the SCRL code shipped, which misses some scales."""
    excluded_lr: Literal["lr", "lr-squared"] = "lr"
    """Step size of excluded parameters under LARS; `lr-squared` reproduces the shipped SCRL code."""
    trust: float = Field(1e-3, gt=0)
    """LARS trust coefficient (eta)."""
    lars_norm: Literal["joint", "separate"] = "joint"
    """LARS denominator: `joint`: |g + wd*w| (BYOL authors); `separate`: |g| + wd*|w| (torchlars, SCRL)."""
    lars_clip: bool = False
    """Take LARS' ratio of norms for the layer's rate itself, at most `lr` (LARC), instead of a factor on `lr`."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """What happens to the learning rate after the warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up."""
    warmup_from: float = Field(0.0, ge=0)
    """Where the warm-up starts, as a fraction of the peak."""
    advance: Literal["begun", "elapsed", "epoch"] = "begun"
    """How time is counted: in steps `begun` (the first step is 1/steps of the run; SCRL, BYOL), in steps
    `elapsed` (the first step is 0, the last one of the warm-up is at the peak; SwAV), or in whole epochs elapsed
    (MoCo)."""
    final_lr: float = Field(0.0, ge=0)
    """Cosine: last value, as a fraction of the peak."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Step: fractions of the run after which the rate is multiplied by `gamma`; with `advance: epoch`, rounded
    down to whole epochs, at least one."""
    gamma: float = Field(0.1, gt=0)
    """Step: the factor at each milestone."""

    @model_validator(mode="after")
    def _known_combinations(self) -> OptimOptions:
        if self.excluded_lr == "lr-squared" and self.name != "lars":
            raise ValueError("excluded_lr 'lr-squared' exists for name 'lars' only")
        if self.lars_clip and self.name != "lars":
            raise ValueError("lars_clip exists for name 'lars' only")
        if self.lr_rule != "linear" and self.lr_per is None:
            raise ValueError(f"lr_rule '{self.lr_rule}' scales by lr_per, which is not set")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class DataOptions(Options):
    """How pixels reach the device."""

    resident: Literal["auto", "device", "host", "mmap", "off"] = cosmetic("auto")
    """Where decoded images of one size live: in the memory of the training device (`device`) or the host (`host`),
    in a file in the cache that is mapped into memory once for all processes (`mmap`), nowhere, so that worker
    processes decode them again in each epoch (`off`), or by size and free memory (`auto`)."""
    resident_limit_mb: int | None = cosmetic(None, ge=1)
    """`auto` keeps images in memory up to this size; unset: up to a quarter of an accelerator's free memory and
    half of the host's."""
    cache: bool = cosmetic(True)
    """Keep decoded images of one size on disk for later runs, from 16 MiB on."""
    cache_dir: Path | None = cosmetic(None)
    """The folder for it, which can be deleted at any time; unset: `$XDG_CACHE_HOME/sslbench` or
    `~/.cache/sslbench`."""
    packed_size: int | None = Field(None, ge=16)
    """Pretrain on smaller copies of the images, of this short side in pixels, which are made once, as JPEGs in one
    file in the cache; unset: on the original images. Evaluations always see the original images."""
    packed_quality: int = Field(95, ge=50, le=100)
    """Quality of these JPEGs."""
    workers: int | None = cosmetic(None, ge=0)
    """Decoding processes when images are not resident; unset: one per core, 8 at most."""
    colors: Literal["exact", "fused"] = "exact"
    """`exact`: jitter as torchvision has it; `fused`: jitter and greyscale of an image are one affine map, faster
    by a third on a CPU, with a linear turn of the hue and one clamp at the end. SimCLR's jitter then differs from
    torchvision's by 4.8 of 255 levels on CIFAR images and 7.8 on photographs, on average (`exact`: 1.2)."""
    max_unreadable: int = Field(0, ge=0)
    """How many unreadable images are skipped (and named in the log) before the run ends with an error."""
    features: Literal["auto", "device", "host", "mmap"] = cosmetic("auto")
    """Where evaluations keep the features of all images: in the memory of the device, of the host, or in the
    files of the feature cache, mapped into memory. `auto`: on an accelerator if they take at most half of its
    free memory, then on the host by the same rule, else mapped; on a CPU always mapped. Results do not depend on
    it."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of `train` that evaluations carve off as `val`, class by class, when a data set has none."""

    @field_validator("resident", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML reads a bare ``off`` as false."""
        return "off" if value is False else value


class ProbeOptions(Options):
    """Online probes: cheap evaluations during pretraining. They never change training."""

    every: int = cosmetic(1, ge=0)
    """Epochs between two probes; 0: none."""
    images: int = cosmetic(2000, ge=10)
    """How many training images feed a probe; at most half as many validation images."""
    linear: bool = cosmetic(True)
    """Classify by ridge regression in closed form."""
    knn: bool = cosmetic(True)
    """Classify by 20 nearest neighbours."""


class CheckpointOptions(Options):
    """When state is saved and what is kept."""

    every: int = cosmetic(1, ge=0)
    """Epochs between two checkpoints; 0: only at the end."""
    every_steps: int | None = cosmetic(None, ge=1)
    """Also save every so many steps."""
    keep: int = cosmetic(2, ge=1)
    """How many of the newest checkpoints stay (the last one of a run always does)."""
    keep_epochs: int | None = cosmetic(None, ge=1)
    """Also keep every checkpoint whose epoch is a multiple of this."""
    background: bool = cosmetic(True)
    """Copy the state to host memory and write it while training goes on; off: training waits for the disk."""


class CoreOptions(Options):
    """All sections that belong to the core."""

    run: RunOptions = RunOptions()
    train: TrainOptions = TrainOptions()
    optim: OptimOptions = OptimOptions()
    data: DataOptions = DataOptions()
    probe: ProbeOptions = ProbeOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
