"""The kit of methods passes what is right and finds each kind of mistake, with the rule it breaks and its cure."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from kit_defects import DEFECTS, Right, WithTarget

from sslbench.errors import ConfigError
from sslbench.plugin.api import Method
from sslbench.plugin.catalog import Catalog
from sslbench.testing import Checkup, ConformanceError, check_method
from sslbench.testing.machine_rules import accepts, in_small_steps, rank_run
from sslbench.testing.methods import RULES, subject_of
from sslbench.testing.ranks import Checked, check_all
from sslbench.testing.reference import PluginReference
from sslbench.testing.surroundings import settings

COMPILED, RANKS = "right when compiled", "several ranks train as one"
QUICK = "simclr"
NAMES = Catalog().names("method")


def check(method: type[Method] | str, *rules: str) -> Checkup:
    return check_method(method, processes=RANKS in rules, compiled=COMPILED in rules, only=rules)


def broken(checkup: Checkup) -> dict[str, str]:
    return {verdict.rule: verdict.detail for verdict in checkup.broken}


def assert_found(checkup: Checkup, method: type[Method]) -> None:
    rule, words, cure = DEFECTS[method]
    (verdict,) = checkup.broken
    assert verdict.rule == rule
    assert words in verdict.detail
    assert cure in verdict.hint


@pytest.mark.parametrize("method", [d for d, (rule, *_) in DEFECTS.items() if rule not in (COMPILED, RANKS)])
def test_each_defect_is_named_with_its_cure(method: type[Method]) -> None:
    assert_found(check(method, DEFECTS[method][0]), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [d for d, (rule, *_) in DEFECTS.items() if rule in (COMPILED, RANKS)])
def test_each_defect_of_the_surroundings_is_named_with_its_cure(method: type[Method]) -> None:
    assert_found(check(method, DEFECTS[method][0]), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", DEFECTS)
def test_a_defect_breaks_no_other_rule(method: type[Method]) -> None:
    assert set(broken(check_method(method, processes=False, compiled=False))) <= {DEFECTS[method][0]}


def test_every_rule_has_a_defect() -> None:
    assert {rule for rule, *_ in DEFECTS.values()} == {rule.name for rule in RULES} - {"cost"}


@pytest.mark.parametrize("method", [Right, pytest.param(WithTarget, marks=pytest.mark.slow)])
def test_what_is_right_passes(method: type[Method]) -> None:
    checkup = check_method(method, processes=False, compiled=False)
    checkup.raise_if_broken()
    assert {v.rule for v in checkup.verdicts if v.outcome == "not tried"} == {
        "accumulates as it says", COMPILED, RANKS
    }  # fmt: skip
    (cost,) = (verdict.detail for verdict in checkup.verdicts if verdict.rule == "cost")
    assert "numbers train, 1,584 of them in the backbone" in cost


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != QUICK)) for n in NAMES])
def test_built_in_methods_pass(name: str) -> None:
    check_method(name, processes=False, compiled=False).raise_if_broken()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_built_in_methods_pass_when_compiled(name: str) -> None:
    check(name, COMPILED).raise_if_broken()


@pytest.mark.slow
def test_a_right_method_passes_on_several_ranks() -> None:
    check(Right, RANKS).raise_if_broken()


@pytest.mark.slow
def test_built_in_methods_pass_on_several_ranks() -> None:
    """As the rule tries them, in one set of processes for each size of run."""
    subjects = [subject_of(PluginReference.of("method", name)) for name in NAMES]
    runs: dict[tuple[int, ...], list[Checked]] = {}
    for subject in subjects:
        if subject.cls.trains:
            run = rank_run(subject)
            uneven = accepts(subject, run["images"], run["batch_size"] - 1)
            checked = Checked(subject.reference, core=in_small_steps(subject), uneven=uneven)
            runs.setdefault(tuple(run.values()), []).append(checked)
    for (images, batch_size, steps), methods in runs.items():
        reports = check_all(methods, images=images, batch_size=batch_size, steps=steps, timeout=600)
        assert [str(report.error) for report in reports if report.error] == []


def test_a_method_that_trains_nothing_is_not_tried() -> None:
    checkup = check("random")
    assert not checkup.broken
    assert {v.detail for v in checkup.verdicts if v.outcome == "not tried"} == {"it trains nothing"}


def test_the_error_names_every_broken_rule(capsys) -> None:
    method = next(method for method in DEFECTS if method.__name__ == "UnusedParameter")
    with pytest.raises(
        ConformanceError, match=r"method 'right': every trained parameter gets a gradient: "
    ) as info:
        check(method, "every trained parameter gets a gradient", "cost").raise_if_broken()
    assert "Mend: use them in the loss" in str(info.value)


def test_wrong_options_are_the_callers() -> None:
    with pytest.raises(ConfigError, match="temprature"):
        check_method(Right, options={"temprature": 1.0})
    with pytest.raises(ConfigError, match="no rule 'the loss fals'; did you mean 'the loss falls'"):
        check_method(Right, only=["the loss fals"])


def test_a_check_leaves_the_process_as_it_was() -> None:
    before = settings(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for method in DEFECTS:
        if "ForAll" in method.__name__:
            check(method, "leaves global state alone", "same seed, same training")
    after = settings(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
