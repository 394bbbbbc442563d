"""``sslbench check``: a table of verdicts, what to mend, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sslbench.cli import run
from sslbench.errors import ExitCode
from sslbench.report.checkup import print_checkups
from sslbench.testing.rules import Checkup, Verdict

UNUSED = '''
"""Predicts nothing."""
from torch import nn
from pydantic import Field
from sslbench import comm
from sslbench.plugin.api import Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl

class Config(MethodConfig):
    views: tuple[ViewSpec, ...] = (ViewSpec(),)
    width: int = Field(4, ge=1)
    """Of the head."""

class Unused(Method):
    name = "unused"
    Config = Config

    def __init__(self, cfg, build):
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.head = nn.Linear(self.backbone.dim, cfg.width)

    def forward(self, batch):
        return {"loss": comm.global_mean(self.backbone(batch.views[0].images).pooled.float().square().mean(1))}

@hookimpl
def sslbench_methods():
    return [Unused]
'''


@pytest.fixture
def plugin(workdir: Path) -> str:
    (workdir / "unused.py").write_text(UNUSED)
    return "unused.py"


def test_a_broken_rule_is_told_with_its_cure(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "method", "unused", "-p", plugin, "--quick", "width=3"]) == ExitCode.PLUGIN
    told = capsys.readouterr().out
    assert (
        "every trained parameter gets a gradient\n  found: trainable parameters without gradient: head.weight"
        in told
    )
    assert "  mend:  use them in the loss" in told
    assert "1,635 numbers" in told  # those of a head of width 3
    assert told.count("left out on request") == 2
    assert told.rstrip().splitlines()[-1].startswith("method 'unused': 14 held, 1 broken, 3 not tried")


def test_a_right_plugin_is_exit_code_0_and_plain_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "backbone", "conv4", "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["name"], told["passed"]) == ("backbone", "conv4", True)
    assert set(told["verdicts"][0]) == {"rule", "outcome", "detail", "hint", "seconds"}


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["metod", "simclr"], ExitCode.CONFIG, "did you mean 'method'?", "one of: method"),
        (["method"], ExitCode.CONFIG, "which method?", "sslbench list methods"),
        (["method", "width=3"], ExitCode.CONFIG, "which method?", "or --all"),
        (["method", "simclr", "--all"], ExitCode.CONFIG, "'simclr' and --all exclude", "drop one"),
        (["method", "simclrr"], ExitCode.PLUGIN, "did you mean 'simclr'?", "sslbench list methods"),
        (["method", "simclr", "temprature=1"], ExitCode.CONFIG, "temprature", ""),
        (["backbone", "conv4", "--backbone", "conv4"], ExitCode.CONFIG, "--backbone is for methods", "drop it"),
    ],
)
def test_what_is_typed_wrongly(words, code, message, hint, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", *words]) == code
    told = capsys.readouterr()
    assert message in told.err
    assert hint in told.err
    assert told.out == ""


@pytest.mark.slow
def test_all_of_a_kind_are_checked_and_one_that_fails_to_load_keeps_none_from_it(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "clash.py").write_text(UNUSED.replace("Method)", "object)").replace("unused", "clash"))
    assert run(["check", "method", "--all", "--quick", "--json", "-p", "clash.py"]) == ExitCode.PLUGIN
    told = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert {name for name, each in told.items() if not each["passed"]} == {"clash:clash"}
    assert "must be a subclass" in told["clash:clash"]["verdicts"][0]["detail"]
    assert "simclr" in told


def test_several_plugins_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    right = Checkup("eval", "one", (Verdict("a", "held", "found"), Verdict("b", "not tried", "why")))
    wrong = Checkup("eval", "two", (Verdict("a", "broken", "what", "how", 2.0),))
    print_checkups([right, wrong], False, several=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:5]] == [
        ["one", "held", "1", "held,", "1", "not", "tried", "0.0"],
        ["two", "broken", "1", "broken", "2.0"],
    ]
    assert lines[-3:] == ["two: a", "  found: what", "  mend:  how"]
