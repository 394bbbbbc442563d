"""A method keeps its contract: its loss, what it depends on, what it leaves behind, where it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslbench.errors import ConfigError, did_you_mean
from sslbench.plugin.api import Backbone, Method
from sslbench.testing import machine_rules, step_rules, training_rules
from sslbench.testing.documented import check_options, options_of
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import Checkup, Rule, check_up
from sslbench.testing.subject import MethodSubject
from sslbench.testing.surroundings import undisturbed


def check_method(
    method: type[Method] | str | Path | PluginReference,
    *,
    options: Mapping[str, Any] | None = None,
    core: Mapping[str, Any] | None = None,
    backbone: type[Backbone] | str | Path | PluginReference | None = None,
    images: int = 128,
    batch_size: int = 32,
    world: int = 2,
    processes: bool = True,
    compiled: bool = True,
    timeout: float = 120.0,
    only: Collection[str] = (),
) -> Checkup:
    """Try every promise of a method's contract on toy images, on the CPU.

    Args:
        method: a class at the top of a module, the name of an installed plugin, or a file with one method.
        options: of the method.
        core: core options such as ``{"train": {"sync_bn": False}}``, above the method's defaults.
        backbone: another one than the tiny convolutional network, or the tiny transformer for methods that require
            tokens; with its default options, for images of 32 pixels.
        images, batch_size: of the toy runs; four batches make an epoch.
        world: how many ranks train as one.
        processes: also on several ranks, whose start takes some seconds.
        compiled: also under ``torch.compile``, whose start takes some seconds.
        timeout: seconds that ranks wait for each other.
        only: names of rules, to try those and no others.

    Raises:
        ConfigError: the options are wrong, or there is no such rule.
        PluginError: there is no such plugin, it cannot be imported, or other processes cannot find it.
    """
    subject = subject_of(
        PluginReference.of("method", method),
        options=options or {},
        core=core or {},
        backbone=None if backbone is None else PluginReference.of("backbone", backbone),
        images=images,
        batch_size=batch_size,
        world=world,
        processes=processes,
        compiled=compiled,
        timeout=timeout,
    )
    _check_names(only)
    first, *rules = (replace(rule, check=_undisturbed(rule.check)) for rule in RULES)
    rules = [rule for rule in rules if not only or rule.name in only]
    return check_up("method", subject.reference.title, subject, rules, first=first)


def subject_of(reference: PluginReference, **fields: Any) -> MethodSubject:
    """What the rules are tried on; ``fields`` are those of a subject that are not their defaults.

    Raises:
        ConfigError: the options are wrong.
        PluginError: there is no such plugin, or it cannot be imported.
    """
    cls: type[Method] = reference.load()
    return MethodSubject(reference, cls, options_of(cls, fields.get("options")), **fields)


def _check_names(only: Collection[str]) -> None:
    names = [rule.name for rule in RULES]
    for name in only:
        if name not in names:
            raise ConfigError(
                f"check_method: there is no rule '{name}'{did_you_mean(name, names)}",
                hint=f"rules: {', '.join(names)}",
            )


def _undisturbed(check: Callable[[MethodSubject], str]) -> Callable[[MethodSubject], str]:
    """One that leaves settings and generators to the next as they were."""

    def checked(subject: MethodSubject) -> str:
        with undisturbed():
            return check(subject)

    return checked


RULES: tuple[Rule[MethodSubject], ...] = (
    Rule("can be built", step_rules.can_be_built),
    Rule("options are documented and survive a round trip", lambda subject: check_options(subject.cfg)),
    Rule("the loss is a float32 scalar", step_rules.loss_is_a_float32_scalar),
    Rule("loss and gradients are finite", step_rules.loss_and_gradients_are_finite),
    Rule("every layout of views that it accepts works", step_rules.accepted_views_work),
    Rule("every trained parameter gets a gradient", step_rules.trained_parameters_get_gradients),
    Rule("target networks are frozen", step_rules.target_networks_are_frozen),
    Rule("same seed, same training", training_rules.same_seed_same_training),
    Rule("sees no labels", training_rules.sees_no_labels),
    Rule("random numbers come from the batch", training_rules.random_numbers_come_from_the_batch),
    Rule("leaves global state alone", machine_rules.leaves_global_state_alone),
    Rule("resumes to the bit", training_rules.resumes_to_the_bit),
    Rule("the loss falls", training_rules.loss_falls),
    Rule("accumulates as it says", step_rules.accumulates_as_it_says),
    Rule("right under bf16 autocast", machine_rules.right_in_bf16),
    Rule("right when compiled", machine_rules.right_when_compiled),
    Rule("several ranks train as one", machine_rules.several_ranks_train_as_one),
    Rule("cost", machine_rules.cost),
)
