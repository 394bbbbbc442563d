"""What protocols that open the test split share: the head that was chosen before, and its accuracy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench.errors import CheckpointError
from sslbench.evaluation.classifiers import LinearHead, label_ranks, percent
from sslbench.plugin.api import FeatureTable, Job


def load_head(job: Job, protocol: str) -> LinearHead:
    """The head that a protocol chose on validation data.

    Raises:
        CheckpointError: there is none, or it is for another model, preprocessing, data set or other classes.
    """
    return LinearHead.from_state(load_for_classes(job, protocol, "head.pt"), job.device)


def load_for_classes(job: Job, protocol: str, name: str) -> dict[str, Any]:
    """A file of another protocol, refused if it is for other classes than the data set has."""
    state = job.load_from(protocol, name)
    if tuple(state["classes"]) != tuple(job.classes):
        raise CheckpointError(
            f"the {protocol} head was trained for other classes than '{job.dataset_key}' has",
            hint=f"sslbench eval {protocol} {job.run_dir} --dataset {job.dataset_key}",
        )
    return state


def score_head(job: Job, head: LinearHead, table: FeatureTable) -> tuple[dict[str, float], dict[str, Any]]:
    """``top1``, ``top5`` and ``loss`` of a head, and the same by class."""
    logits = head(table.features)
    ranks = label_ranks(logits, table.labels)
    metrics = {
        "top1": float(percent(ranks < 1)),
        "top5": float(percent(ranks < 5)),
        "loss": float(F.cross_entropy(logits.double(), table.labels)),
    }
    return metrics, _details(job, logits, table.labels)


def _details(job: Job, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Counts by class; rows of the confusion matrix are true classes, columns predictions."""
    count = len(job.classes)
    cells = torch.bincount(labels * count + logits.argmax(1), minlength=count * count).view(count, count)
    support = cells.sum(1)
    accuracy = (cells.diagonal() * 100.0 / support).tolist()
    per_class = {
        name: {"n": n, "top1": value if n else None}
        for name, n, value in zip(job.classes, support.tolist(), accuracy, strict=True)
    }
    return {"n": len(labels), "per_class": per_class, "confusion": cells.tolist()}
