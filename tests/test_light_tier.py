"""Errors, and the promise that the light modules load neither torch nor mlflow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sslbench import errors
from sslbench.errors import ExitCode, SslbenchError, did_you_mean

HEAVY = ("torch", "torchvision", "mlflow", "numpy", "sklearn")
#: Each of them takes longer to import than the rest of a listing.
SLOW = (*HEAVY, "pydantic", "rich", "yaml", "pluggy")
KINDS = [
    (errors.ConfigError, 2),
    (errors.PluginError, 3),
    (errors.DataError, 4),
    (errors.CheckpointError, 5),
    (errors.LaunchError, 6),
    (errors.DivergedError, 7),
    (errors.PreemptedError, 75),
]


@pytest.mark.parametrize(
    "module",
    [
        "sslbench",
        "sslbench.errors",
        "sslbench.plugin.hooks",
        "sslbench.plugin.viewspec",
        "sslbench.plugin.catalog",
        "sslbench.config.options",
        "sslbench.config.schema",
        "sslbench.engine.schedule",
        "sslbench.tracking",
        "sslbench.tracking.process",
    ],
)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "pretrain --help",
        "check --help",
        "list",
        "list methods",
        "list --json",
        "list runs",
        "--runs x list runs",
    ],
)
def test_looking_at_what_there_is_imports_nothing_that_takes_its_time(command, workdir):
    code = (
        f"import sys; from sslbench.cli import run; code = run({command.split()!r});"
        f"print(code, *sorted(set({SLOW!r}) & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.splitlines()[-1], run.stderr) == ("0", "")


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_exit_codes_are_part_of_the_interface(kind, code):
    error = kind("what happened", hint="what to type")
    assert isinstance(error, SslbenchError)
    assert (int(error.exit_code), error.message, error.hint) == (code, "what happened", "what to type")
    assert str(error) == "what happened"
    assert error.title != SslbenchError.title


def test_exit_codes_and_titles_are_distinct():
    assert len({kind.exit_code for kind, _ in KINDS}) == len(KINDS)
    assert len({kind.title for kind, _ in KINDS}) == len(KINDS)
    assert SslbenchError("x").exit_code == ExitCode.UNEXPECTED == 1
    assert SslbenchError("x").hint is None
    assert (ExitCode.OK, ExitCode.INTERRUPTED) == (0, 130)


@pytest.mark.parametrize(
    ("word", "advice"),
    [("simclrr", "; did you mean 'simclr'?"), ("bylo", "; did you mean 'byol'?"), ("zzz", ""), ("", "")],
)
def test_did_you_mean(word, advice):
    assert did_you_mean(word, iter(["byol", "simclr", "scrl"])) == advice
