"""Twelve broken plugins, installed side by side: each is named for what it is, and everything else works."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from installed_kit import install

from sslbench.cli import run
from sslbench.engine.blame import blaming
from sslbench.errors import ExitCode, PluginError
from sslbench.plugin.catalog import Catalog

FOLDER = Path(__file__).parent / "broken_plugins"
SYNTAX_ERROR = '"""Has a colon too few."""\n\n\ndef sslbench_methods()\n    return []\n'
SHORT = ("--dataset", "digits", "--backbone", "conv4", "--limit", "1", "--no-evals", "probe.every=0")
Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Broken:
    """What commands say of a plugin; empty: they find nothing wrong."""

    loading: str = ""
    """``info``, ``pretrain`` and ``doctor``."""
    training: str = ""
    """``pretrain``."""
    rule: str = ""
    """The rule that ``check`` finds broken."""
    name: str = ""
    """Of the plugin, if it is not that of its file."""


TWELVE = {
    "import_error": Broken(
        loading="ModuleNotFoundError: No module named 'nothing_of_the_kind' (import_error.py, line 3)"
    ),
    "syntax_error": Broken(loading="cannot be imported (syntax_error): SyntaxError"),
    "wrong_hook": Broken(loading="does not fit the hooks: unknown hook 'sslbench_method'"),
    "wrong_class": Broken(loading="must be a subclass of sslbench.plugin.api.Method"),
    "missing_forward": Broken(loading="Broken does not define forward"),
    "name_clash": Broken(loading="two plugins claim the method 'simclr': broken-name-clash 1.0", name="simclr"),
    "old_api": Broken(loading="was written for plugin API 0.9"),
    "label_peeking": Broken(
        training="failed in its first step (label_peeking.py, line 30): TypeError", rule="sees no labels"
    ),
    "unused_parameter": Broken(
        training="2 trainable parameters received no gradient, among them spare.weight",
        rule="every trained parameter gets a gradient",
    ),
    "rank_dependent": Broken(rule="several ranks train as one"),
    "non_deterministic": Broken(rule="same seed, same training"),
    "slow_import": Broken(),
}


@pytest.fixture
def installed(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All of them, each in a distribution of its own."""
    site = workdir / "site-packages"
    site.mkdir()
    monkeypatch.delenv("SSLBENCH_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    for module, broken in TWELVE.items():
        source = SYNTAX_ERROR if module == "syntax_error" else (FOLDER / f"{module}.py").read_text()
        points = {"methods": {name_of(module, broken): module}}
        install(site, f"broken-{module.replace('_', '-')}", {f"{module}.py": source}, points)
    return site


def name_of(module: str, broken: Broken) -> str:
    return broken.name or module.replace("_", "-")


def test_they_are_twelve_and_listed_beside_all_others(installed: Path, capsys: Capture) -> None:
    assert len(TWELVE) == 12
    assert run(["list", "methods", "--json"]) == 0
    rows = {(row["name"], row["distribution"]): row["summary"] for row in json.loads(capsys.readouterr().out)}
    for module, broken in TWELVE.items():
        assert rows[name_of(module, broken), f"broken-{module.replace('_', '-')}"]
    assert rows["byol", "sslbench"].startswith("BYOL")
    assert rows["syntax-error", "broken-syntax-error"] == "Has a colon too few."


@pytest.mark.parametrize(("module", "broken"), [(m, b) for m, b in TWELVE.items() if b.loading])
def test_what_cannot_be_loaded_says_why(installed: Path, capsys: Capture, module: str, broken: Broken) -> None:
    name = name_of(module, broken)
    for command in (["info", "method", name], ["pretrain", "--method", name, *SHORT]):
        assert run(command) == ExitCode.PLUGIN
        told = " ".join(capsys.readouterr().err.split())
        assert broken.loading in told
        assert "Next: " in told or module == "wrong_class"
        assert "Traceback" not in told
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("module", "broken"),
    [
        pytest.param(m, b, marks=() if m == "label_peeking" else pytest.mark.slow)
        for m, b in TWELVE.items()
        if b.training
    ],
)
def test_what_breaks_in_training_is_stopped_in_its_first_step(
    installed: Path, capsys: Capture, module: str, broken: Broken
) -> None:
    assert run(["pretrain", "--method", name_of(module, broken), *SHORT]) == ExitCode.PLUGIN
    told = capsys.readouterr().err
    assert f"method '{name_of(module, broken)}'" in told
    assert broken.training in told
    if module == "label_peeking":
        assert "None unless the method declares uses_labels = True" in told


PAIR = {
    "method": """from sslbench.plugin.api import Method
from sslbench.plugin.hooks import hookimpl

class Pull(Method):
    name = "pull"
    def forward(self, batch):
        return net(batch)

@hookimpl
def sslbench_methods():
    return [Pull]
""",
    "backbone": """import torch

from sslbench.plugin.api import Backbone
from sslbench.plugin.hooks import hookimpl

class Net(Backbone):
    name = "net"
    def forward(self, images):
        return torch.zeros(2) @ images

@hookimpl
def sslbench_backbones():
    return [Net]
""",
}


@pytest.mark.parametrize("together", [False, True])
def test_a_mistake_is_told_of_the_plugin_whose_line_it_is(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    names = {kind: "both.py" if together else f"{kind}.py" for kind in PAIR}
    sources = {"both.py": PAIR["method"] + PAIR["backbone"]} if together else PAIR
    for name, source in sources.items():
        Path(name if together else names[name]).write_text(source)
    catalog = Catalog.from_options(sorted(set(names.values())))
    method, backbone = catalog.load("method", "pull"), catalog.load("backbone", "net")
    sharded = type("Sharded", (backbone,), {"__module__": "torch.nn"})
    for net, told in [
        (lambda batch: backbone.forward(None, batch), rf"backbone 'net' .* now \({names['backbone']}, line \d+\)"),
        (lambda batch: int("x"), rf"method 'pull' failed just now \({names['method']}, line 7\): ValueError"),
    ]:
        monkeypatch.setitem(method.forward.__globals__, "net", net)
        with pytest.raises(PluginError, match=told) as caught, blaming((method, sharded), "just now"):
            method.forward(None, [1.0])
        assert told.split("'")[1] in str(caught.value.hint)
    with pytest.raises(ZeroDivisionError), blaming((method, sharded), "just now"):
        1 / 0  # noqa: B018 - in no plugin's file


@pytest.mark.slow
def test_everything_else_works_beside_them(installed: Path, capsys: Capture) -> None:
    assert run(["pretrain", "--method", "byol", *SHORT, "run.name=beside"]) == 0
    assert json.loads(Path("runs/beside/run.json").read_text())["status"] == "FINISHED"
    capsys.readouterr()
    assert run(["info", "method", "sslbench:simclr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distribution"] == "sslbench"
    assert run(["-p", "no:broken-name-clash", "info", "method", "simclr"]) == 0


@pytest.mark.slow
def test_doctor_names_them_all_at_once(installed: Path, capsys: Capture) -> None:
    assert run(["doctor", "--json"]) == ExitCode.UNEXPECTED
    found: dict[str, list[dict[str, str]]] = {}
    for check in json.loads(capsys.readouterr().out):
        found.setdefault(check["name"], []).append(check)
    for module, broken in TWELVE.items():
        rows = found[f"method {name_of(module, broken)}"]
        if broken.loading:
            words = "several packages claim it" if module == "name_clash" else broken.loading
            told = [" ".join(row["detail"].split()) for row in rows if row["level"] == "failure"]
            assert any(words in detail for detail in told), (module, rows)
    (slow,) = found["method slow-import"]
    assert slow["level"] == "warning"
    assert "most in slow_import (1.3 s)" in slow["detail"]
    assert [row["level"] for row in found["method byol"]] == ["ok"]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "broken"), [(m, b) for m, b in TWELVE.items() if b.rule])
def test_the_conformance_kit_finds_the_rule(installed: Path, capsys: Capture, module: str, broken: Broken) -> None:
    quick = ["--quick"] if module != "rank_dependent" else []
    assert run(["check", "method", name_of(module, broken), *quick, "--json"]) == ExitCode.PLUGIN
    assert broken.rule in broken_rules(capsys.readouterr().out)


def broken_rules(text: str) -> list[str]:
    """Names of the broken rules in what ``check --json`` prints."""
    document = json.loads(text)
    reports = document if isinstance(document, list) else [document]
    return [v["rule"] for report in reports for v in report["verdicts"] if v["outcome"] == "broken"]
