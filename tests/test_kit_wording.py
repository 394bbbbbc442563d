"""What the kit and a run say of the mistakes of a first method."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kit_defects import Right

from sslbench.cli import run
from sslbench.errors import ExitCode
from sslbench.plugin.api import Batch, Build, MethodConfig
from sslbench.testing import check_method


class Forgetful(Right):
    """Has options, and does not say so."""

    Config = MethodConfig  # type: ignore[assignment]

    def __init__(self, cfg: Any, build: Build) -> None:
        super().__init__(cfg, build)
        self.width = cfg.out_dim  # here


class Misspelt(Right):
    def forward(self, batch: Batch) -> dict[str, Any]:
        loss = super().forward(batch)["loss"]
        return {"los": loss, "extra": loss}


class Bare(Right):
    def forward(self, batch: Batch) -> Any:
        return super().forward(batch)["loss"]


class Mistaken(Right):
    def forward(self, batch: Batch) -> Any:
        return torch.zeros(2, 3) @ torch.zeros(2, 3)  # there


class FromLibrary(Right):
    def forward(self, batch: Batch) -> Any:
        return self.head(torch.zeros(2, 3))  # deep


def line_of(mark: str) -> int:
    source = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(source, 1) if line.endswith(f"  # {mark}"))


@pytest.mark.parametrize(
    ("method", "cure", "mark"),
    [
        (Forgetful, "set Config = ... on the plugin's class", "here"),
        (Mistaken, "", "there"),
        (FromLibrary, "", "deep"),
    ],
)
def test_the_line_is_the_plugins_own(method: type[Right], cure: str, mark: str) -> None:
    (verdict,) = check_method(method, processes=False, compiled=False).broken
    assert verdict.hint.startswith(cure)
    assert verdict.hint.endswith(f"raised in {inspect.getfile(method)}, line {line_of(mark)}")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Misspelt, "forward returned a dictionary with los, extra, without 'loss'"),
        (Bare, "forward returned a tensor [] instead of a dictionary with 'loss'"),
    ],
)
def test_what_was_returned_is_told_once_and_without_warnings(
    method: type[Right], told: str, recwarn: pytest.WarningsRecorder
) -> None:
    torch.set_warn_always(True)
    try:
        (verdict,) = check_method(method, processes=False, compiled=False).broken
    finally:
        torch.set_warn_always(False)
    assert verdict.detail == told
    assert [str(warning.message) for warning in recwarn if "indexing" in str(warning.message)] == []


def test_a_run_says_it_in_the_same_words(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (Path(__file__).parent / "broken_plugins" / "unused_parameter.py").read_text()
    source, changed = re.subn(r'return \{"loss":', 'return {"los":', source)
    assert changed
    Path("misspelt.py").write_text(source)
    short = ["--dataset", "digits", "--backbone", "conv4", "--limit", "1", "--no-evals", "probe.every=0"]
    assert run(["-p", "misspelt.py", "pretrain", "--method", "unused-parameter", *short]) == ExitCode.PLUGIN
    told = " ".join(capsys.readouterr().err.split())
    assert "forward returned a dictionary with los, without 'loss'" in told
