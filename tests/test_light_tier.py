"""Errors, and the promise that the light modules load neither torch nor mlflow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sslbench import errors
from sslbench.errors import ExitCode, SslbenchError, did_you_mean

HEAVY = ("torch", "torchvision", "mlflow", "numpy", "sklearn")
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
    ],
)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


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
