"""What is recorded of plugins, how they are limited and traced, and extensions that fail."""

from __future__ import annotations

import json
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from installed_kit import install

from sslbench.cli import run
from sslbench.errors import PluginError
from sslbench.plugin import provenance
from sslbench.plugin.catalog import Catalog, Entry
from sslbench.tracking.plugins import changed, plugin_tags

METHOD = '''"""A method for tests."""
from sslbench.plugin.api import Method
from sslbench.plugin.hooks import hookimpl

class Mine(Method):
    name = "{name}"
    def forward(self, batch):
        return {{}}

@hookimpl
def sslbench_methods():
    return [Mine]
'''
WATCH = '''"""Watches runs."""
from sslbench.plugin.hooks import hookimpl

@hookimpl
def sslbench_run_started(run_dir):
    (run_dir / "watched.txt").write_text("yes")

@hookimpl
def sslbench_metrics_logged(run_dir, step, metrics):
    raise {error}
'''
SHORT = "--method simclr --dataset digits --backbone conv4 --limit 2 --no-evals probe.every=0 train.log_every=1"


@pytest.fixture
def site(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = workdir / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("SSLBENCH_PLUGINS", raising=False)
    return folder


def package(site: Path, name: str = "ssl-pack", helper: str = "VALUE = 1\n") -> Entry:
    """A method whose package has a second file."""
    top = name.replace("-", "_")
    files = {f"{top}/__init__.py": "", f"{top}/helper.py": helper, f"{top}/m.py": METHOD.format(name="packed")}
    install(site, name, files, {"methods": {"packed": f"{top}.m"}})
    forget()
    return Catalog().find("method", "packed")


def forget() -> None:
    """As in a new process."""
    caches = (
        provenance.identity,
        provenance._of_distribution,
        provenance._package_digest,
        provenance._git_state,
    )
    for known in caches:
        known.cache_clear()


def test_the_digest_covers_every_file_of_the_package(site: Path) -> None:
    before = package(site).identity()
    assert before["covers"] == "ssl_pack: 3 files"
    (site / "ssl_pack" / "__pycache__").mkdir()
    (site / "ssl_pack" / "__pycache__" / "m.pyc").write_bytes(b"0")
    shutil.rmtree(site / "ssl_pack-1.0.dist-info")
    after = package(site, helper="VALUE = 2\n").identity()
    assert after["sha256"] == before["sha256"]
    assert after["package_sha256"] != before["package_sha256"]
    assert changed([{"kind": "method", **before}], [{"kind": "method", **before}]) == []
    (sentence,) = changed([{"kind": "method", **before}], [{"kind": "method", **after}])
    assert sentence == "ssl-pack 1.0 has changed since the run began: method packed"


def test_sources_listed_in_a_checkout_are_not_taken_for_installed_ones(site: Path) -> None:
    """A build leaves metadata in the checkout, which is found first by whoever works there."""
    package(site)
    shutil.rmtree(site / "ssl_pack-1.0.dist-info")
    left = site / "ssl_pack.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: ssl-pack\nVersion: 1.0\n")
    (left / "entry_points.txt").write_text("[sslbench.methods]\npacked = ssl_pack.m\n")
    (left / "SOURCES.txt").write_text("README.md\nssl_pack/__init__.py\nssl_pack/helper.py\nssl_pack/m.py\n")
    (site / "README.md").write_text("Read me.\n")
    forget()
    assert Catalog().find("method", "packed").identity()["covers"] == "ssl_pack: 3 files"


def test_an_installed_copy_has_no_git_state_although_a_repository_surrounds_it(site: Path) -> None:
    commit_all(site.parent)
    assert package(site).identity()["git_commit"] == ""


def test_a_local_file_names_its_commit_and_whether_it_differs(workdir: Path) -> None:
    file = workdir / "mine.py"
    file.write_text(METHOD.format(name="mine"))
    assert state_of(file)["git_commit"] == ""
    (workdir / ".gitignore").write_text("hidden.py\n")
    commit = commit_all(workdir)
    assert state_of(file) | {"git_commit": commit, "git_modified": "false"} == state_of(file)
    assert state_of(file)["covers"] == "mine.py: 1 file"
    file.write_text(file.read_text() + "\n")
    assert state_of(file)["git_modified"] == "true"
    hidden = workdir / "hidden.py"
    hidden.write_text(METHOD.format(name="mine"))
    assert state_of(hidden)["git_modified"] == "true"


def test_the_programs_that_a_repository_names_are_not_run(workdir: Path) -> None:
    file, ran = workdir / "mine.py", workdir.parent / "ran"
    file.write_text(METHOD.format(name="mine"))
    commit_all(workdir)
    (workdir / ".gitattributes").write_text("*.py filter=own\n")
    for setting in ("filter.own.clean", "filter.own.smudge", "core.fsmonitor"):
        subprocess.run(["git", "config", setting, f"touch {ran}; cat"], cwd=workdir, check=True)
    file.write_text(file.read_text() + "\n")
    subprocess.run(["git", "status"], cwd=workdir, check=True, capture_output=True)
    assert ran.exists()  # git itself would
    ran.unlink()
    file.write_text(file.read_text() + "\n")
    assert state_of(file)["git_modified"] == "true"
    assert not ran.exists()


def test_a_converted_file_is_the_committed_one(workdir: Path) -> None:
    content = METHOD.format(name="mine").encode()
    pointer = f"oid sha256:{sha256(content).hexdigest()}\nsize {len(content)}\n"
    for stored, here in [
        (content, content.replace(b"\n", b"\r\n")),
        (f"version https://git-lfs.github.com/spec/v1\n{pointer}".encode(), content),
    ]:
        (workdir / "mine.py").write_bytes(stored)
        commit = commit_all(workdir)
        (workdir / "mine.py").write_bytes(here)
        found = state_of(workdir / "mine.py")
        assert (found["git_commit"], found["git_modified"]) == (commit, "false")
    (workdir / "mine.py").write_bytes(content + b"\n")
    assert state_of(workdir / "mine.py")["git_modified"] == "true"


def test_a_package_in_a_checkout_differs_by_what_is_added_and_what_is_gone(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = workdir / "checkout"
    checkout.mkdir()
    monkeypatch.syspath_prepend(str(checkout))
    package(checkout)
    (checkout / "ssl_pack-1.0.dist-info" / "RECORD").unlink()
    (checkout / "ssl_pack" / "link.py").symlink_to("helper.py")
    commit = commit_all(checkout)

    def state() -> tuple[str, str]:
        forget()
        identity = Catalog().find("method", "packed").identity()
        return identity["git_commit"], identity["git_modified"]

    (checkout / "notes.md").write_text("beside the package")
    (checkout / "ssl_pack" / "m.pyc").write_text("a cache")
    assert state() == (commit, "false")
    added = checkout / "ssl_pack" / "new.py"
    added.touch()
    assert state() == (commit, "true")
    added.unlink()
    assert state() == (commit, "false")
    (checkout / "ssl_pack" / "helper.py").unlink()
    assert state() == (commit, "true")


def test_weights_that_a_package_ships_count(site: Path) -> None:
    install(
        site,
        "ssl-pack",
        {"ssl_pack/m.py": METHOD.format(name="packed"), "ssl_pack/net.pth": "1", "ssl_pack.pth": "/nowhere\n"},
        {"methods": {"packed": "ssl_pack.m"}},
    )
    digests = []
    for content in "12":
        (site / "ssl_pack" / "net.pth").write_text(content)
        forget()
        identity = Catalog().find("method", "packed").identity()
        assert identity["covers"] == "ssl_pack: 2 files"
        digests.append(identity["package_sha256"])
    assert digests[0] != digests[1]


def state_of(file: Path) -> dict[str, str]:
    forget()
    return Catalog.from_options([str(file)]).find("method", "mine").identity()


def commit_all(folder: Path) -> str:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all", "--allow-empty"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_built_in_plugins_are_covered_as_a_whole() -> None:
    identity = Catalog().find("method", "simclr").identity()
    assert identity["covers"].startswith("sslbench, sslbench_plugins: ")
    (tag,) = plugin_tags([{"kind": "method", **identity}]).items()
    assert tag[0] == "sslbench.plugin.method"
    assert tag[1].startswith("simclr of sslbench 0.1.0, sha256 ")


@pytest.mark.parametrize(
    ("allowed", "seen"),
    [
        (None, True),
        ("", False),
        ("other", False),
        ("ssl-pack", True),
        ("SSL_Pack", True),
        ("x, packed", True),
        ("ssl-pack:packed", True),
        ("ssl-other:packed", False),
    ],
)
def test_a_variable_limits_what_is_loaded(
    site: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None, seen: bool
) -> None:
    package(site)
    if allowed is not None:
        monkeypatch.setenv("SSLBENCH_PLUGINS", allowed)
    catalog = Catalog()
    assert ("packed" in catalog.names("method")) is seen
    assert "simclr" in catalog.names("method")
    if not seen:
        with pytest.raises(
            PluginError, match=r"'packed' of ssl-pack 1\.0 is left out: SSLBENCH_PLUGINS="
        ) as caught:
            catalog.load("method", "packed")
        assert "add ssl-pack" in str(caught.value.hint)


def test_a_file_named_on_the_command_line_is_not_limited(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "mine.py").write_text(METHOD.format(name="mine"))
    monkeypatch.setenv("SSLBENCH_PLUGINS", "")
    assert Catalog.from_options(["mine.py"]).load("method", "mine").name == "mine"


@pytest.mark.parametrize("word", ["watch", "ssl-watch", "ssl_watch", "ssl-watch:watch"])
def test_extensions_are_blocked_by_name_and_by_package(site: Path, word: str) -> None:
    files = {"ssl_watch.py": WATCH.format(error="OSError")}
    install(site, "ssl-watch", files, {"extensions": {"watch": "ssl_watch"}})
    assert [e.address for e in Catalog().observers()] == ["ssl-watch:watch"]
    assert not Catalog.from_options([f"no:{word}"]).observers()


def test_a_damaged_package_hides_no_other(site: Path) -> None:
    package(site)
    broken = install(site, "ssl-torn", {}, {"methods": {"torn": "torn"}})
    (broken / "entry_points.txt").write_bytes(b"[sslbench.methods]\nt\xff\xfe = x\n")
    (broken / "METADATA").write_bytes(b"\xff\xfe")
    assert {"packed", "simclr"} <= set(Catalog().names("method"))


def test_hook_calls_are_traced(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(site)
    monkeypatch.setenv("SSLBENCH_TRACE", "1")
    Catalog().load("method", "packed")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trace: sslbench_methods() by ssl-pack:packed (m.py, line 10) returned [[<class ")
    assert line.endswith(" ms")
    monkeypatch.setenv("SSLBENCH_TRACE", "0")
    Catalog().load("method", "packed")
    assert capsys.readouterr().err == ""


def test_an_extension_that_fails_is_told_of_once(site: Path) -> None:
    for name, error in {"good": "ValueError('bad')", "quits": "SystemExit(4)"}.items():
        install(site, f"ext-{name}", {f"{name}.py": WATCH.format(error=error)}, {"extensions": {name: name}})
    install(site, "ext-torn", {"torn.py": "def (:\n"}, {"extensions": {"torn": "torn"}})
    good, quits, torn = Catalog().extensions()
    logged = {"run_dir": site, "step": 1, "metrics": {}}
    failed = "failed in sslbench_metrics_logged"
    assert (good.tell("sslbench_metrics_logged", **logged) or "").startswith(
        f"extension 'good' of ext-good 1.0 {failed}: ValueError: bad"
    )
    assert good.tell("sslbench_metrics_logged", **logged) is None
    assert f"{failed}: SystemExit: 4" in (quits.tell("sslbench_metrics_logged", **logged) or "")
    assert torn.tell("sslbench_metrics_logged", **logged) is None
    assert torn.identity()["problem"].startswith("extension 'torn' of ext-torn 1.0 cannot be imported")


@pytest.mark.slow
def test_extensions_that_fail_are_named_recorded_and_take_nothing_down(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {
        "good": WATCH.format(error="ValueError('bad\\nday')"),
        "leaves": "import sys; sys.exit(3)\n",
        "quits": WATCH.format(error="SystemExit(4)"),
        "typo": WATCH.format(error="OSError").replace("metrics_logged", "metric_logged"),
        "torn": "def (:\n",
    }
    for name, source in sources.items():
        install(site, f"ext-{name}", {f"ext_{name}.py": source}, {"extensions": {name: f"ext_{name}"}})
    assert run(["pretrain", *SHORT.split(), "run.name=watched"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("extension 'good' of ext-good 1.0 failed in sslbench_metrics_logged: ValueError: bad") == 1
    assert shown.count("extension 'quits' of ext-quits 1.0 failed in sslbench_metrics_logged: SystemExit: 4") == 1
    assert "extension 'leaves' of ext-leaves 1.0 cannot be imported" in shown
    assert "extension 'typo' of ext-typo 1.0 does not fit the hooks" in shown
    assert "extension 'torn' of ext-torn 1.0 cannot be imported (ext_torn): SyntaxError" in shown
    folder = Path("runs/watched")
    assert (folder / "watched.txt").read_text() == "yes"
    record = json.loads((folder / "run.json").read_text())
    noted = {(p["kind"], p["name"]): p.get("problem", "") for p in record["plugins"]}
    assert {kind for kind, _ in noted} == {"method", "dataset", "backbone", "extension"}
    assert noted["extension", "good"].startswith("failed in sslbench_metrics_logged")
    assert noted["extension", "torn"].startswith("extension 'torn'")
    assert "ext-quits" in record["tags"]["sslbench.plugin.extension"]
    assert record["tags"]["sslbench.plugin.method"].startswith("simclr of sslbench")
    facts = yaml.safe_load((folder / "environment.yaml").read_text())
    assert {"method", "extension"} <= {plugin["kind"] for plugin in facts["plugins"]}
