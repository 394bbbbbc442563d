"""What protocols that open the test split share: the head that was chosen before, and its accuracy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench.errors import CheckpointError
from sslbench.evaluation.classifiers import Labelled, LinearHead, label_ranks, percent
from sslbench.plugin.api import FeatureRows, Job


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


def score_head(job: Job, head: LinearHead, table: Labelled) -> tuple[dict[str, float], dict[str, Any]]:
    """``top1``, ``top5`` and ``loss`` of a head, and the same by class."""
    rows, classes = FeatureRows.of(table.features), len(job.classes)
    size = max(1, len(rows)) if rows.held else rows.chunk
    ranks, loss, predicted = [], torch.zeros((), dtype=torch.float64, device=job.device), []
    for chunk, labels in zip(rows.chunks(size), torch.split(table.labels, size), strict=True):
        logits = head(chunk)
        ranks.append(label_ranks(logits, labels))
        loss += F.cross_entropy(logits.double(), labels) * (len(labels) / len(rows))
        predicted.append(logits.argmax(1))
    places = torch.cat(ranks)
    metrics = {"top1": float(percent(places < 1)), "top5": float(percent(places < 5)), "loss": float(loss)}
    cells = torch.bincount(table.labels * classes + torch.cat(predicted), minlength=classes * classes)
    return metrics, _details(job, cells.view(classes, classes))


def _details(job: Job, cells: Tensor) -> dict[str, Any]:
    """Counts by class; rows of the confusion matrix are true classes, columns predictions."""
    support = cells.sum(1)
    accuracy = (cells.diagonal() * 100.0 / support).tolist()
    per_class = {
        name: {"n": n, "top1": value if n else None}
        for name, n, value in zip(job.classes, support.tolist(), accuracy, strict=True)
    }
    return {"n": int(support.sum()), "per_class": per_class, "confusion": cells.tolist()}
