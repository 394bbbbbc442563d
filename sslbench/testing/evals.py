"""An evaluation protocol keeps its contract: it leaves the backbone alone and tells what features are worth."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from sslbench.evaluation.rules import check_split
from sslbench.plugin.api import EvalProtocol, Options
from sslbench.testing.documented import check_options, options_of
from sslbench.testing.evaluation import CLASSES, IMAGES, Arm, EvalTrial, Outcome, Task, outcome, run
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import BrokenRuleError, Checkup, NotTriedError, Rule, check_up
from sslbench.testing.worlds import in_worlds

SIGMAS = 5.0
"""Of a binomial distribution: of protocols that choose between 100 settings, one in 30,000 is above by chance."""
CLOSE = 2e-3
"""Relative difference of metrics between one process and several, which add up in another order."""
WORLD = 2
TIMEOUT = 600.0


def check_eval(
    protocol: type[EvalProtocol] | str | Path | PluginReference,
    *,
    options: Mapping[str, Any] | None = None,
    before: Mapping[str, Mapping[str, Any]] | None = None,
    processes: bool = True,
) -> Checkup:
    """Try every promise of a protocol's contract on toy images and a toy backbone.

    There are 4 classes, and 300 training, 301 validation and 303 test images of 16 pixels. Protocols that it names
    in ``after`` are run before it. Evaluations that it starts itself see the same images, whatever data sets its
    options name.

    Args:
        protocol: a class at the top of a module, the name of an installed plugin, or a file with one protocol.
        options: of the protocol; those that make it quick will do.
        before: options of the protocols it comes after, by their names.
        processes: also as two processes.

    Raises:
        ConfigError: the options are wrong.
        PluginError: there is no such plugin, or it cannot be imported.
    """
    reference = PluginReference.of("eval", protocol)
    cls: type[EvalProtocol] = reference.load()
    subject = EvalSubject(reference, cls, options_of(cls, options), options or {}, before or {})
    rules = [*RULES, Rule("two processes give the numbers of one", _ranks)] if processes else RULES
    return check_up("eval", reference.title, subject, rules, first=Rule("runs", _runs))


@dataclass
class EvalSubject:
    """Runs the protocol, each way once."""

    reference: PluginReference
    cls: type[EvalProtocol]
    cfg: Options
    options: Mapping[str, Any]
    before: Mapping[str, Mapping[str, Any]]
    _outcomes: dict[tuple[Arm, Task, int], Outcome] = field(default_factory=dict)

    @property
    def protocol(self) -> EvalProtocol:
        return self.cls(self.cfg)

    @property
    def tasks(self) -> list[Task]:
        """Kinds of labels it says it is for, and the kit has."""
        return [task for task in get_args(Task) if task in self.cls.tasks]

    def trial(self, arm: Arm, task: Task) -> EvalTrial:
        return EvalTrial(self.reference, self.options, self.before, arm, task)

    def outcome(self, arm: Arm, task: Task, noise: int = 0) -> Outcome:
        key = (arm, task, noise)
        if key not in self._outcomes:
            self._outcomes[key] = outcome(replace(self.trial(arm, task), noise=noise))
        return self._outcomes[key]

    def outcomes(self, arm: Arm = "mixed") -> Iterator[tuple[Task, Outcome]]:
        """For each kind of labels."""
        return ((task, self.outcome(arm, task)) for task in self.tasks)

    def primary(self, arm: Arm, task: Task) -> float:
        return self.outcome(arm, task).metrics[self.cls.primary]

    @property
    def scored(self) -> int:
        """Images that a score is taken over."""
        return IMAGES["test" if "test" in self.cls.splits else "val"]


def _runs(subject: EvalSubject) -> str:
    if not subject.tasks:
        raise BrokenRuleError(
            f"tasks are {', '.join(sorted(subject.cls.tasks)) or 'none'}", "classification, multilabel, or both"
        )
    found = [f"{subject.cls.primary} {_shown(result, subject)} ({task})" for task, result in subject.outcomes()]
    return ", ".join(found)


def _shown(result: Outcome, subject: EvalSubject) -> str:
    value = result.metrics.get(subject.cls.primary)
    return "missing" if value is None else f"{value:.4g}"


def _declarations(subject: EvalSubject) -> str:
    cls = subject.cls
    if isinstance(cls.version, bool) or not isinstance(cls.version, int) or cls.version < 1:
        raise BrokenRuleError(
            f"version is {cls.version!r}", "a whole number from 1 on, raised when numbers change"
        )
    wrong = {name: way for name, way in cls.metrics.items() if way not in ("max", "min")}
    if wrong or cls.primary not in cls.metrics:
        raise BrokenRuleError(
            f"metrics are {dict(cls.metrics)}, primary is {cls.primary!r}",
            "metrics tells for each name whether 'max' or 'min' is better; primary is one of them",
        )
    for split in sorted(cls.splits):
        check_split(subject.protocol, split)
    return f"version {cls.version}, splits {', '.join(sorted(cls.splits)) or 'none'}"


def _metrics(subject: EvalSubject) -> str:
    names: set[str] = set()
    for arm in get_args(Arm):
        for _, result in subject.outcomes(arm):
            _check_metrics(result.metrics, subject)
            names |= result.metrics.keys()
    return f"{len(names)} of {len(subject.cls.metrics)}, all finite"


def _check_metrics(found: Mapping[str, float], subject: EvalSubject) -> None:
    cls = subject.cls
    undeclared = sorted(found.keys() - cls.metrics.keys())
    if undeclared or cls.primary not in found:
        what = f"undeclared: {', '.join(undeclared)}" if undeclared else f"missing: {cls.primary}"
        raise BrokenRuleError(what, "return the names of metrics, the primary one among them")
    infinite = [name for name, value in found.items() if not math.isfinite(value)]
    if infinite:
        raise BrokenRuleError(
            f"not finite: {', '.join(infinite)}", "leave out what cannot be computed, or clamp it"
        )
    if _chance(subject) is not None and not 0 <= found[cls.primary] <= 100:
        raise BrokenRuleError(f"{cls.primary} is {found[cls.primary]:.4g}", "percentages are in [0, 100]")


def _chance(subject: EvalSubject) -> float | None:
    return subject.protocol.chance(CLASSES)


def _unchanged(subject: EvalSubject) -> str:
    for _, result in subject.outcomes():
        if result.changed:
            raise BrokenRuleError(
                f"changed: {', '.join(result.changed[:4])}",
                "work on copy.deepcopy(job.backbone()), in eval mode, and remove hooks when done",
            )
    return "weights, buffers, modes, hooks"


def _splits(subject: EvalSubject) -> str:
    opened: set[str] = set()
    for _, result in subject.outcomes():
        opened |= set(result.opened)
        for split in result.opened:
            check_split(subject.protocol, split)
        if result.bypassed:
            raise BrokenRuleError(
                f"opened without the job: {', '.join(result.bypassed)}",
                "use job.rows, job.features, job.images and job.batches only",
            )
    unused = sorted(subject.cls.splits - opened)
    note = f"; declared, not opened: {', '.join(unused)}" if unused else ""
    return (", ".join(sorted(opened)) or "none") + note


def _own_folder(subject: EvalSubject) -> str:
    for _, result in subject.outcomes():
        if result.strays:
            raise BrokenRuleError(
                f"written elsewhere: {', '.join(result.strays)}",
                "use job.save and job.write_report, or job.out_dir",
            )
    return "nothing else of the run"


def _repeats(subject: EvalSubject) -> str:
    for task, first in subject.outcomes("shuffled"):
        again = subject.outcome("shuffled", task, noise=1).metrics
        different = [name for name, value in first.metrics.items() if again.get(name) != value]
        if different:
            raise BrokenRuleError(
                f"other numbers the second time: {', '.join(different)}",
                "draw from job.generator('what it is for'), never from global generators; break ties by order",
            )
    return "to the bit"


def _at_chance(subject: EvalSubject) -> str:
    """Labels have nothing to do with images, so a score can only come from labels that were seen before."""
    chance = _chance(subject)
    if chance is None:
        raise NotTriedError("it tells no chance level (chance())")
    bound = chance + SIGMAS * math.sqrt(chance * (100 - chance) / subject.scored)
    found = [subject.primary("shuffled", task) for task in subject.tasks]
    if max(found) > bound:
        raise BrokenRuleError(
            f"{subject.cls.primary} is {max(found):.1f} on shuffled labels, chance is {chance:.1f} and at most "
            f"{bound:.1f} in {subject.scored} images",
            "it scores what it trained on, or sees labels of what it scores; another chance level is for chance()",
        )
    return f"{max(found):.1f}, chance is {chance:.1f}, at most {bound:.1f}"


def _tells_good_features(subject: EvalSubject) -> str:
    """Features that reveal the class are worth more than features that have nothing to do with it."""
    primary, chance = subject.cls.primary, _chance(subject)
    sign = 1 if subject.cls.metrics[primary] == "max" else -1
    for task in subject.tasks:
        good, poor = subject.primary("revealing", task), subject.primary("shuffled", task)
        if sign * good <= sign * poor or (chance is not None and good < (100 + chance) / 2):
            raise BrokenRuleError(
                f"{primary} is {good:.4g} for features that reveal the class, and {poor:.4g} for shuffled labels "
                f"({task})",
                "percentages are in [0, 100]; does it use job.rows(...).features, with labels in the same order?",
            )
    return f"{good:.4g}, {poor:.4g} on shuffled labels"


def _ranks(subject: EvalSubject) -> str:
    with tempfile.TemporaryDirectory() as name:
        trials = [
            replace(subject.trial("mixed", task), folder=Path(name).resolve() / task) for task in subject.tasks
        ]
        together, alone = in_worlds(run, trials, WORLD, TIMEOUT)
    for ranks, expected in zip(together, alone, strict=True):
        _check_agreement(ranks, subject)
        _check_close(ranks[0], expected, subject)
    return f"{WORLD} ranks, unevenly many images"


def _check_agreement(ranks: list[dict[str, float]], subject: EvalSubject) -> None:
    if any(rank != ranks[0] for rank in ranks):
        values = ", ".join(f"{rank.get(subject.cls.primary, math.nan):.4g}" for rank in ranks)
        raise BrokenRuleError(
            f"ranks return different numbers ({subject.cls.primary}: {values})",
            "job.images and job.batches give a rank's share: comm.gather scores, or comm.all_sum counts",
        )


def _check_close(found: Mapping[str, float], expected: Mapping[str, float], subject: EvalSubject) -> None:
    for name, value in expected.items():
        # Two images whose scores tie may count the other way.
        slack = max(CLOSE * abs(value), 200 / subject.scored if abs(value) > 1 else CLOSE)
        if abs(found.get(name, math.inf) - value) > slack:
            raise BrokenRuleError(
                f"{name} is {found.get(name, math.nan):.4g} in {WORLD} processes and {value:.4g} in one",
                "sum counts over ranks before dividing (comm.all_sum), and take each image once",
            )


RULES: tuple[Rule[EvalSubject], ...] = (
    Rule("options are documented and survive a round trip", lambda subject: check_options(subject.cfg)),
    Rule("its declarations are consistent", _declarations),
    Rule("returns the metrics it declares", _metrics),
    Rule("leaves the backbone unchanged", _unchanged),
    Rule("opens only the splits it declares", _splits),
    Rule("writes into its own folder", _own_folder),
    Rule("same job, same numbers", _repeats),
    Rule("is at chance on shuffled labels", _at_chance),
    Rule("tells good features from others", _tells_good_features),
)
