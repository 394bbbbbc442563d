"""Word order and messages between the shell and the commands."""

from __future__ import annotations

import pytest

from sslbench.errors import ConfigError
from sslbench.terminal import hoisted, report


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pretrain -p my.py --method mine a.b=1", "-p my.py pretrain --method mine a.b=1"),
        ("eval knn last --runs=r", "--runs=r eval knn last"),
        ("-p a.py list -p no:byol", "-p a.py -p no:byol list"),
        ("compare", "compare"),
        ("list -p", "-p list"),
    ],
)
def test_global_options_may_stand_anywhere(words: str, expected: str) -> None:
    assert hoisted(words.split()) == expected.split()


def test_a_report_shows_message_and_hint_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report(ConfigError("lists are written [a, b]", hint="train.epochs=3"))
    assert capsys.readouterr().err == "Config error: lists are written [a, b]\n  Next: train.epochs=3\n"
