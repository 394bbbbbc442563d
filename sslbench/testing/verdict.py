"""From differences between records to what a method does wrong, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from sslbench.testing.compare import Case, relative_difference
from sslbench.testing.report import Difference

_CLEARLY = 0.02
"""Relative difference below which two candidates for one explanation count as the same number."""

_ROWS_ALIKE = "was it averaged with comm.global_mean? It weighs every row of the global batch alike"


class Problem(NamedTuple):
    """What is wrong and how to mend it."""

    message: str
    hint: str


Symptom = Callable[[Sequence[Case], float], Iterator[Problem]]


def first_problem(cases: Sequence[Case], tolerance: float) -> Problem | None:
    """The first thing that goes wrong, since what comes after it is its consequence."""
    symptoms = (_start, _random, _local_mean, _loss, _gradients, _ranks_apart, _state)
    return next((problem for symptom in symptoms for problem in symptom(cases, tolerance)), None)


def _start(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    """Before the first step."""
    for case in cases:
        for quantity, name in case.between_ranks():
            if quantity == "start":
                yield Problem(
                    f"{name} differs between ranks before the first step ({case.name})",
                    "in start_epoch, compute from comm.gather-ed rows or comm.broadcast the result of one rank",
                )
        for found in case.differences():
            if found.quantity == "start" and found.relative > tolerance:
                yield Problem(
                    f"{found.tensor} after start_epoch is not that of one process, by {found.relative:.1e} "
                    f"({case.name})",
                    "images.clean() and images.augmented() give this rank's share: gather what they give "
                    "(comm.gather) and order it by sample number",
                )


def _random(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    for case in cases:
        if case.alone["facts"]["draws"] and _first_losses_differ(case, tolerance):
            yield Problem(
                "the loss depends on torch's own generator, whose state differs between ranks",
                "draw with batch.uniform(...): the same numbers for the same images, whatever the number of ranks",
            )


def _local_mean(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    """Losses of the ranks whose mean is right."""
    hint = "average the losses of single rows with comm.global_mean(losses)"
    for case in cases:
        losses, expected = torch.stack(case.loss()).double(), case.alone["loss"]["step 1"].double()
        if bool((losses == losses[0]).all()):
            continue
        rows = torch.tensor(case.rows(), dtype=torch.float64)
        if relative_difference((losses * rows).sum() / rows.sum(), expected) <= tolerance:
            yield Problem(f"loss differs between ranks: each has the mean over its own rows ({case.name})", hint)


def _loss(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    """Of the first step, when all ranks still have the same weights."""
    wrong = [case for case in cases if _first_losses_differ(case, tolerance)]
    if not wrong:
        return
    found = max(relative_difference(loss, wrong[0].alone["loss"]["step 1"]) for loss in wrong[0].loss())
    message = f"loss differs from that of one process by {found:.1e} ({wrong[0].name})"
    unshared = wrong[0].ranks[0]["facts"]["unshared"]
    if unshared:
        yield Problem(
            f"{message}: batch normalisation sees the rows of one rank only, in {_listed(unshared)}",
            "leave train.sync_bn on (core={'train': {'sync_bn': True}}, or the method's defaults)",
        )
    if not any(case.even for case in wrong) and any(case.even for case in cases):
        yield Problem(
            f"{message}, and only where ranks have different numbers of rows",
            _ROWS_ALIKE,
        )
    yield Problem(
        message,
        "was it averaged with comm.global_mean? Take other ranks' rows from comm.gather, statistics over the "
        "batch from comm.all_sum, leave nothing to comm.rank(), and normalise with torch.nn.BatchNorm1d or 2d",
    )


def _gradients(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    """Of the first step, with the right loss."""
    for case in cases:
        ratio = _gradient_ratio(case)
        world = len(case.ranks)
        if abs(ratio * world - 1) < _CLEARLY:
            yield Problem(
                f"the loss is right, but its gradients are 1/{world} of those of one process ({case.name})",
                "a plain all_reduce does not bring gradients back to other ranks: use comm.all_sum, "
                "comm.global_mean or comm.gather",
            )
        if abs(ratio / world - 1) < _CLEARLY:
            yield Problem(
                f"the loss is right, but its gradients are {world} times those of one process ({case.name})",
                "gradients are averaged over ranks: the loss of each rank must be that of the global batch",
            )
        found = case.worst("gradients", "step 1")
        if found and found.relative > tolerance:
            yield _wrong_gradient(case, cases, found, tolerance)


def _wrong_gradient(case: Case, cases: Sequence[Case], found: Difference, tolerance: float) -> Problem:
    message = f"the gradient of {found.tensor}, differs by {found.relative:.1e} ({case.name})"
    evenly = [other.worst("gradients", "step 1") for other in cases if other.even]
    if not case.even and any(other and other.relative <= tolerance for other in evenly):
        return Problem(f"{message}, and only where ranks have different numbers of rows", _ROWS_ALIKE)
    return Problem(
        message,
        "something of other ranks enters without gradient: comm.gather, comm.all_sum and comm.global_mean have "
        "exact ones",
    )


def _ranks_apart(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    """State that is not the same on all ranks, to the bit."""
    for case in cases:
        apart = dict.fromkeys(case.between_ranks())
        if any(quantity == "buffers" for quantity, _ in apart):
            names = [name for quantity, name in apart if quantity == "buffers"]
            yield Problem(
                f"{_listed(names)} differs between ranks after {_steps(case)} steps ({case.name})", _kept(names)
            )
        for quantity, name in apart:
            yield Problem(
                f"{quantity}: {name} differs between ranks ({case.name})",
                "compute it from what all ranks have: comm.gather, comm.all_sum or comm.broadcast",
            )


def _kept(names: Sequence[str]) -> str:
    if all("running_" in name or "num_batches" in name for name in names):
        return "the statistics of batch normalisation: leave train.sync_bn on, or broadcast them in after_step"
    return "gather before enqueueing or storing: self.queue.push(keys=comm.gather(keys))"


def _state(cases: Sequence[Case], tolerance: float) -> Iterator[Problem]:
    """After all steps."""
    for case in cases:
        found = {each.quantity: each for each in case.differences() if each.relative > tolerance}
        for quantity in ("buffers", "parameters", "optimiser", "loss", "gradients"):
            if quantity in found:
                worst = found[quantity]
                yield Problem(
                    f"{quantity}: {worst.tensor} after {_steps(case)} steps is not that of one process, by "
                    f"{worst.relative:.1e} ({case.name})",
                    "what before_step and after_step compute must not depend on which rows are this rank's: "
                    "gather them in rank order (comm.gather)",
                )


def _first_losses_differ(case: Case, tolerance: float) -> bool:
    expected = case.alone["loss"]["step 1"]
    return any(relative_difference(loss, expected) > tolerance for loss in case.loss())


def _gradient_ratio(case: Case) -> float:
    """Along the expected gradients of the first step: 1 if they are right."""
    pairs = [
        (case.ranks[0]["gradients"].get(name), value)
        for name, value in case.alone["gradients"].items()
        if name.endswith("step 1")
    ]
    if not pairs or any(found is None for found, _ in pairs):
        return 1.0
    along = sum(float((found.double() * value).sum()) for found, value in pairs)
    return along / sum(float(value.double().square().sum()) for _, value in pairs)


def _steps(case: Case) -> int:
    return len(case.alone["loss"])


def _listed(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
