"""Several processes train as one does: the same loss, gradients and state on the same global batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sslbench.plugin.api import Backbone, Method
from sslbench.testing.compare import Case
from sslbench.testing.reference import PluginReference
from sslbench.testing.report import ConformanceError, RankReport
from sslbench.testing.toys import Norm
from sslbench.testing.trial import Trial, run
from sslbench.testing.verdict import first_problem
from sslbench.testing.worlds import in_worlds

TOLERANCE = 1e-3
"""Correct methods stay below a tenth of it on the toy problem, wrong ones are above by a factor of ten."""


@dataclass(frozen=True)
class Checked:
    """A method with what it is checked with."""

    method: type[Method] | str | Path | PluginReference
    options: Mapping[str, Any] = field(default_factory=dict)
    core: Mapping[str, Any] = field(default_factory=dict)
    uneven: bool = True
    """Also with a batch that the ranks cannot share evenly."""
    title: str | None = None
    """Its name in reports; None: the method's own."""
    backbone: PluginReference | None = None
    """None: a toy."""


def check_ranks(
    method: type[Method] | str | Path | PluginReference,
    *,
    world: int = 2,
    options: Mapping[str, Any] | None = None,
    core: Mapping[str, Any] | None = None,
    backbone: type[Backbone] | str | Path | PluginReference | None = None,
    norms: Sequence[Norm] = ("batch", "group"),
    uneven: bool = True,
    images: int = 24,
    batch_size: int = 8,
    steps: int = 5,
    tolerance: float = TOLERANCE,
    timeout: float = 120.0,
) -> RankReport:
    """Prove that several ranks train as one: on a tiny network and toy images, in processes of their own.

    Compared are the loss of every step, the gradients of the first and the last one, and at the end all
    parameters, buffers (queues, memory banks, running statistics) and the state of the optimiser, as well as what
    the first ``start_epoch`` leaves behind. The ranks must agree with each other to the bit, and with one process
    to the tolerance, since sums over ranks are taken in another order. Two epochs begin within the five steps.

    Args:
        method: a class at the top of a module, the name of an installed plugin, or a file with one method.
        world: how many ranks.
        options: of the method.
        core: core options such as ``{"train": {"sync_bn": False}}``. Unless they say otherwise, the optimiser is
            SGD with momentum.
        backbone: another one than a toy; a class at the top of a module, a name or a file.
        norms: of the network: over the rows of the batch, or of each row by itself (``group``).
        uneven: also with a batch of one image less, which the ranks cannot share evenly.
        images, batch_size, steps: of the toy run.
        tolerance: largest relative difference from one process, of any tensor.
        timeout: seconds that ranks wait for each other.

    Returns:
        The largest difference of each quantity.

    Raises:
        ConformanceError: with what is wrong and how to mend it; it is an ``AssertionError`` too.
        PluginError: the method cannot be found by other processes.
    """
    network = None if backbone is None else PluginReference.of("backbone", backbone)
    checked = Checked(method, options or {}, core or {}, uneven, backbone=network)
    (report,) = check_all(
        [checked],
        world=world,
        norms=norms,
        images=images,
        batch_size=batch_size,
        steps=steps,
        tolerance=tolerance,
        timeout=timeout,
    )
    if report.error:
        raise report.error
    return report


def check_all(
    methods: Iterable[Checked],
    *,
    world: int = 2,
    norms: Sequence[Norm] = ("batch", "group"),
    images: int = 24,
    batch_size: int = 8,
    steps: int = 5,
    tolerance: float = TOLERANCE,
    timeout: float = 120.0,
) -> list[RankReport]:
    """:func:`check_ranks` of several methods in one set of processes, whose start takes longer than a check.

    Returns:
        Their reports in order, those of wrong methods with an ``error``.
    """
    wanted = [
        (checked, trial)
        for checked in methods
        for trial in _trials(
            checked,
            norms,
            Trial(PluginReference.of("method", checked.method), {}, {}, "batch", images, batch_size, steps),
        )
    ]
    together, alone = in_worlds(run, [trial for _, trial in wanted], world, timeout)
    cases: dict[int, tuple[Checked, list[Case]]] = {}
    for (checked, trial), ranks, one in zip(wanted, together, alone, strict=True):
        even = trial.batch_size % world == 0
        name = f"{trial.norm} norm, {trial.batch_size} images on {world} ranks"
        cases.setdefault(id(checked), (checked, []))[1].append(Case(name, even, ranks, one))
    return [_judged(checked, found, world, tolerance) for checked, found in cases.values()]


def _trials(checked: Checked, norms: Sequence[Norm], trial: Trial) -> list[Trial]:
    sizes = [trial.batch_size, trial.batch_size - 1] if checked.uneven else [trial.batch_size]
    return [
        replace(
            trial,
            options=checked.options,
            core=checked.core,
            norm=norm,
            batch_size=size,
            backbone=checked.backbone,
        )
        for norm in norms
        for size in sizes
    ]


def _judged(checked: Checked, cases: Sequence[Case], world: int, tolerance: float) -> RankReport:
    name = checked.title or PluginReference.of("method", checked.method).title
    report = RankReport(name, world, tolerance, cases=tuple(case.name for case in cases))
    report.add(difference for case in cases for difference in case.differences())
    report.identical = not any(True for case in cases for _ in case.between_ranks())
    problem = first_problem(cases, tolerance)
    if problem:
        report.error = ConformanceError(f"{name}: {problem.message}", hint=problem.hint, report=report)
    return report
