"""Nearest class centre, with all of what API 1.0 lets a protocol do with features."""

import torch
from pydantic import Field
from torch.nn import functional as F

from sslbench.plugin.api import EvalOptions, EvalProtocol, FeatureTable, Job, LabelledRows
from sslbench.plugin.hooks import hookimpl

API_VERSION = "1.0"


class CentreConfig(EvalOptions):
    """Options of `api10_centre`."""

    sharpness: float = Field(1.0, gt=0)
    """Scale of the similarities in the report."""


class Centre(EvalProtocol):
    name = "api10_centre"
    version = 1
    Config = CentreConfig
    metrics = {"top1": "max", "loss": "min"}
    primary = "top1"
    splits = frozenset({"train", "val"})

    cfg: CentreConfig

    def run(self, job: Job) -> dict[str, float]:
        train: FeatureTable = job.features("train")
        val: LabelledRows = job.rows("val")
        classes = len(job.classes)
        member = F.one_hot(train.labels, classes).to(train.features)
        centres = F.normalize(member.T @ train.features, dim=1)
        scores = F.normalize(val.features.whole, dim=1) @ centres.T * self.cfg.sharpness
        top1 = 100.0 * (scores.argmax(1) == val.labels).float().mean().item()
        loss = F.cross_entropy(scores, val.labels).item()
        draw = torch.randperm(len(val.labels), generator=job.generator("examples"))[:3]
        job.log(0, {"loss": loss})
        job.save("centres.pt", {"centres": centres})
        job.write_report("centre.json", {"examples": val.indices[draw.to(val.indices.device)].tolist()})
        return {"top1": top1, "loss": loss}


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Centre]
