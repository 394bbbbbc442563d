"""Finding, isolating and refusing plugins, with real distributions built on disk."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sslbench.errors import PluginError
from sslbench.plugin.catalog import KINDS, Catalog

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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(
    site: Path, dist: str, module: str, source: str, entries: dict[str, str], version: str = "1.0"
) -> None:
    """Lay down a distribution as pip would: a module and its dist-info."""
    (site / f"{module}.py").write_text(source)
    info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("[sslbench.methods]\n" + "\n".join(lines) + "\n")
    importlib.invalidate_caches()


def test_every_built_in_entry_point_loads_and_every_plugin_file_has_one() -> None:
    catalog = Catalog()
    files = set()
    for kind in KINDS:
        for entry in catalog.entries(kind):
            if entry.distribution == "sslbench":
                assert catalog.load(kind, entry.name).name == entry.name
                assert entry.path is not None
                assert entry.summary, f"{entry.path} has no docstring"
                files.add(entry.path.resolve())
    root = Path(__file__).parents[1] / "plugins"
    assert files == {p.resolve() for p in root.glob("*/*.py") if p.name != "__init__.py"}


def test_a_third_party_plugin_is_found_with_its_summary_and_identity(site: Path) -> None:
    install(site, "ssl-mine", "mine_a", METHOD.format(name="mine"), {"mine": "mine_a"})
    entry = Catalog().find("method", "mine")
    assert (entry.distribution, entry.version, entry.summary) == ("ssl-mine", "1.0", "A method for tests.")
    assert len(entry.identity()["sha256"]) == 64
    assert Catalog().load("method", "ssl-mine:mine").name == "mine"


def test_listing_survives_a_broken_plugin_and_loading_it_names_the_line(site: Path) -> None:
    install(
        site, "ssl-broken", "broken_a", '"""Broken."""\n\nimport nothing_of_the_kind\n', {"broken": "broken_a"}
    )
    catalog = Catalog()
    assert "broken" in catalog.names("method")
    assert "simclr" in catalog.names("method")
    with pytest.raises(PluginError, match=r"ssl-broken 1\.0.*ModuleNotFoundError.*broken_a\.py, line 3"):
        catalog.load("method", "broken")
    assert catalog.load("method", "simclr").name == "simclr"


def test_a_syntax_error_is_a_plugin_error(site: Path) -> None:
    install(site, "ssl-syntax", "syntax_a", "def (:\n", {"syn": "syntax_a"})
    assert Catalog().find("method", "syn").summary == "(its source cannot be read)"
    with pytest.raises(PluginError, match=r"SyntaxError: invalid syntax \(syntax_a\.py, line 1\)$"):
        Catalog().load("method", "syn")


def test_two_packages_with_one_name_are_an_error_naming_both(site: Path) -> None:
    install(site, "ssl-one", "one_a", METHOD.format(name="same"), {"same": "one_a"})
    install(site, "ssl-two", "two_a", METHOD.format(name="same"), {"same": "two_a"})
    with pytest.raises(PluginError, match=r"ssl-one 1\.0.*ssl-two 1\.0") as caught:
        Catalog().load("method", "same")
    assert "ssl-one:same or ssl-two:same" in str(caught.value.hint)
    assert Catalog().load("method", "ssl-two:same").__module__ == "two_a"
    assert Catalog().load("method", "SSL_two:same").__module__ == "two_a", "names of packages, as pip reads them"
    assert Catalog().choose("method", "SSL_two:same") == ("ssl-two:same", {}), "runs of one method compare as one"
    blocked = Catalog.from_options(["no:ssl-one"])
    assert blocked.find("method", "same").distribution == "ssl-two"


def test_a_misspelt_hook_is_refused(site: Path) -> None:
    source = METHOD.format(name="typo").replace("sslbench_methods", "sslbench_method")
    install(site, "ssl-typo", "typo_a", source, {"typo": "typo_a"})
    with pytest.raises(PluginError, match=r"does not fit the hooks.*did you mean 'sslbench_methods'"):
        Catalog().load("method", "typo")


def test_a_class_that_is_no_method_or_has_another_name_is_refused(site: Path) -> None:
    install(site, "ssl-class", "class_a", METHOD.format(name="k").replace("(Method)", ""), {"k": "class_a"})
    with pytest.raises(PluginError, match=r"must be a subclass of sslbench\.plugin\.api\.Method"):
        Catalog().load("method", "k")
    install(site, "ssl-name", "name_a", METHOD.format(name="other"), {"wanted": "name_a"})
    with pytest.raises(PluginError, match="registered as method 'wanted' but offers 'other'"):
        Catalog().load("method", "wanted")


def test_another_major_api_version_is_refused(site: Path) -> None:
    source = METHOD.format(name="old") + '\nAPI_VERSION = "0.9"\n'
    install(site, "ssl-old", "old_a", source, {"old": "old_a"})
    with pytest.raises(PluginError, match=r"plugin API 0\.9"):
        Catalog().load("method", "old")


def test_a_module_without_the_hook_is_refused(site: Path) -> None:
    install(site, "ssl-empty", "empty_a", '"""Empty."""\n', {"empty": "empty_a"})
    with pytest.raises(PluginError, match="no hook that offers methods"):
        Catalog().load("method", "empty")


def test_a_local_file_is_a_plugin(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(METHOD.format(name="local-one"))
    catalog = Catalog.from_options([str(file)])
    assert catalog.load("method", "local-one").name == "local-one"
    assert catalog.find("method", "local-one").version == "local"
    with pytest.raises(PluginError, match="no such file"):
        Catalog.from_options(["nowhere.py"])


def test_a_broken_local_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text('"""Bad."""\n1 / 0\n')
    with pytest.raises(PluginError, match=r"ZeroDivisionError.*bad\.py, line 2"):
        Catalog.from_options([str(file)]).entries("method")


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        ("return Mine", r"sslbench_methods must return a list of classes, not <class .*Mine'>"),
        ("return 3", "sslbench_methods must return a list of classes, not 3"),
        ("return [Mine.mine]", r"failed in sslbench_methods: AttributeError: .*mine.* \(bad\.py, line 7\)"),
        ("pass", "sslbench_methods must return a list of classes, not None"),
        ("import sys; sys.exit(2)", "failed in sslbench_methods: SystemExit: 2"),
        ("return [Method]", "sslbench_methods offers <class .*Method'>, which has no name"),
    ],
)
def test_a_local_file_whose_hook_is_wrong_is_named(tmp_path: Path, hook: str, told: str) -> None:
    file = tmp_path / "bad.py"
    source = "from sslbench.plugin.api import Method\nfrom sslbench.plugin.hooks import hookimpl\n"
    file.write_text(
        f"{source}class Mine(Method):\n    name = 'mine'\n@hookimpl\ndef sslbench_methods():\n    {hook}\n"
    )
    with pytest.raises(PluginError, match=told) as caught:
        Catalog.from_options([str(file)]).find("method", "simclr")
    assert f"plugin file {file}" in str(caught.value)


def test_an_installed_plugin_whose_hook_is_wrong_is_named(site: Path) -> None:
    source = METHOD.format(name="alone").replace("return [Mine]", "return Mine")
    install(site, "ssl-alone", "alone_a", source, {"alone": "alone_a"})
    with pytest.raises(PluginError, match="'alone' of ssl-alone: sslbench_methods must return a list"):
        Catalog().load("method", "alone")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("", "offers nothing: it has no hook"),
        ("def sslbench_methods():\n    return []\n", "offers nothing: sslbench_methods lacks @hookimpl"),
    ],
)
def test_a_local_file_that_offers_nothing_is_named(tmp_path: Path, source: str, told: str) -> None:
    file = tmp_path / "nothing.py"
    file.write_text(source)
    with pytest.raises(PluginError, match=told) as caught:
        Catalog.from_options([str(file)]).names("method")
    assert f"plugin file {file}" in str(caught.value)
    assert "@hookimpl before" in str(caught.value.hint)


def test_a_local_file_of_another_api_is_not_to_be_installed(tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text(METHOD.format(name="old") + '\nAPI_VERSION = "0.9"\n')
    with pytest.raises(PluginError, match=r"plugin API 0\.9") as caught:
        Catalog.from_options([str(file)]).load("method", "old")
    assert str(caught.value.hint).startswith(f"bring {file} to API")


def test_a_local_file_named_twice_is_one(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text(METHOD.format(name="one"))
    assert Catalog.from_options([str(file), f"{tmp_path}/./one.py"]).load("method", "one").name == "one"


def test_files_whose_addresses_are_equal_are_told_to_rename(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(METHOD.format(name="same"))
    catalog = Catalog.from_options([str(tmp_path / "a" / "same.py"), str(tmp_path / "b" / "same.py")])
    with pytest.raises(PluginError, match="two plugins claim the method 'same'") as caught:
        catalog.load("method", "same")
    assert str(caught.value.hint) == "give one of them another name = ..., or leave one out"


def test_a_blocked_plugin_says_so() -> None:
    with pytest.raises(PluginError, match="blocked by -p no:simclr"):
        Catalog.from_options(["no:simclr"]).load("method", "simclr")


def test_blocking_what_there_is_not_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"-p no:simcrl: no plugin and no package.*did you mean 'simclr'"):
        Catalog.from_options(["no:simcrl"])


def test_a_local_file_with_a_built_in_name_is_a_conflict(tmp_path: Path) -> None:
    file = tmp_path / "clash.py"
    file.write_text(METHOD.format(name="simclr"))
    with pytest.raises(PluginError, match="two plugins claim"):
        Catalog.from_options([str(file)]).load("method", "simclr")


@pytest.mark.parametrize("command", [["--help"], ["list"], ["list", "--json"]])
def test_help_and_list_import_neither_torch_nor_mlflow(command: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['sslbench', *{command!r}]\n"
        "from sslbench.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        "assert not {'torch', 'mlflow', 'torchvision'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
