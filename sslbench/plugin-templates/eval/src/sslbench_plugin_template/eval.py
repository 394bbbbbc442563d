"""plugin-template: a linear classifier on a chosen layer of the frozen backbone: pooled, map or stem.

Replace it by your own protocol. The first line above is what `sslbench list evals` shows.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.evaluation.classifiers import FeatureScaling, LinearHead
from sslbench.evaluation.convex import fit_logistic
from sslbench.evaluation.heldout import load_for_classes, score_head
from sslbench.plugin.api import EvalOptions, EvalProtocol, Features, FeatureTable, Job
from sslbench.plugin.hooks import hookimpl
from torch import Tensor
from torch.nn import functional as F

API_VERSION = "1.0"

Layer = Literal["pooled", "map", "stem"]


class PluginTemplateOptions(EvalOptions):
    """Options of `plugin-template`; the text below each is shown by `sslbench info`."""

    layer: Layer = "map"
    """`pooled`: the vector that other protocols see; `map`: the last feature map; `stem`: the map after the first
    convolution, which not every backbone gives."""
    grid: int = Field(2, ge=1)
    """Maps are averaged to so many cells per side; the classifier sees all of them."""
    strengths: tuple[float, ...] = Field((1e-5, 1e-4, 1e-3, 1e-2, 1e-1), min_length=1)
    """L2 strengths of the logistic regression, of which the best on `val` is taken."""


class PluginTemplate(EvalProtocol):
    """Logistic regression on standardised features of one layer, its L2 strength chosen on ``val``.

    The classifier that is kept, for protocol ``test_plugin-template``, is trained again on ``train`` and ``val``.
    """

    name = "plugin-template"
    version = 1
    Config = PluginTemplateOptions
    metrics: ClassVar[dict[str, Literal["max", "min"]]] = {
        "val_top1": "max",
        "val_loss": "min",
        "strength": "min",
    }
    primary = "val_top1"
    splits = frozenset({"train", "val"})
    cfg: PluginTemplateOptions

    def run(self, job: Job) -> dict[str, float]:
        """Choose a strength, keep a classifier, return how the chosen strength did on ``val``."""
        train, val = (table_of(job, split, self.cfg.layer, self.cfg.grid) for split in ("train", "val"))
        heads = fit(job, train, self.cfg.strengths)
        found = [score_head(job, head, val)[0] for head in heads]
        best = min(range(len(found)), key=lambda g: (-found[g]["top1"], found[g]["loss"]))
        strength = self.cfg.strengths[best]
        (kept,) = fit(job, joined(train, val), (strength,))
        layer: dict[str, Any] = {"layer": self.cfg.layer, "grid": self.cfg.grid}
        job.save("head.pt", {**kept.state(), **layer, "classes": list(job.classes)})
        return {"val_top1": found[best]["top1"], "val_loss": found[best]["loss"], "strength": strength}


class PluginTemplateTest(EvalProtocol):
    """How the classifier of ``plugin-template`` does on ``test``. It chooses nothing."""

    name = "test_plugin-template"
    version = 1
    Config = EvalOptions
    metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"top1": "max", "top5": "max", "loss": "min"}
    primary = "top1"
    splits = frozenset({"test"})
    after = ("plugin-template",)

    def run(self, job: Job) -> dict[str, float]:
        """Score the kept classifier on every test image exactly once."""
        kept = load_for_classes(job, "plugin-template", "head.pt")
        test = table_of(job, "test", kept["layer"], kept["grid"])
        return score_head(job, LinearHead.from_state(kept, job.device), test)[0]


def table_of(job: Job, split: str, layer: Layer, grid: int) -> FeatureTable:
    """Features of one layer of a whole split, the same on all processes."""
    if layer == "pooled":
        return job.features(split)  # kept from other protocols
    backbone, parts = job.backbone(), []
    for images, labels, indices in job.images(split):
        with torch.no_grad():
            parts.append((cells(backbone(images), layer, grid), labels, indices))
    return FeatureTable(*(comm.gather(torch.cat(rows)) for rows in zip(*parts, strict=True)))


def cells(features: Features, layer: Layer, grid: int) -> Tensor:
    """``[B,D,h,w]`` of a layer to ``[B,D*grid*grid]``."""
    chosen = features.map if layer == "map" else features.stem
    if chosen is None:
        raise ConfigError("this backbone gives no stem", hint="layer=map or layer=pooled")
    return F.adaptive_avg_pool2d(chosen.float(), grid).flatten(1)


def fit(job: Job, table: FeatureTable, strengths: tuple[float, ...]) -> list[LinearHead]:
    """One classifier for each strength."""
    scaling = FeatureScaling.fit("standardize", table.features)
    inputs = F.pad(scaling(table.features), (0, 1), value=1.0)
    wanted = torch.tensor(strengths, device=job.device)
    fitted = fit_logistic(inputs, table.labels, len(job.classes), wanted, tolerance=1e-4, max_steps=500)
    return [LinearHead(weight[:, :-1].contiguous(), weight[:, -1].contiguous(), scaling) for weight in fitted]


def joined(first: FeatureTable, second: FeatureTable) -> FeatureTable:
    """Rows of both."""
    return FeatureTable(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [PluginTemplate, PluginTemplateTest]
