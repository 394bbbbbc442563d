"""What a plugin prints while it is imported is no part of what a command gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installed_kit import install

from sslbench.cli import run

SOURCE = """
from sslbench.plugin.api import Method
from sslbench.plugin.hooks import hookimpl
print("hello from", "{name}")

class Printer(Method):
    name = "{name}"
    def forward(self, batch):
        return {{}}

@hookimpl
def sslbench_methods():
    return [Printer]
"""


def test_json_stays_json(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("local_printer.py").write_text(SOURCE.format(name="local-printer"))
    site = workdir / "site"
    source = {"talkative.py": SOURCE.format(name="talkative")}
    install(site, "talkative", source, {"methods": {"talkative": "talkative"}})
    monkeypatch.syspath_prepend(str(site))
    for name, flags in [("local-printer", ["-p", "local_printer.py"]), ("talkative", [])]:
        assert run([*flags, "info", "method", name, "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["name"] == name
        assert f"hello from {name}" in printed.err
