"""Recipes and published results that installed packages ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installed_kit import install

from sslbench.cli import run
from sslbench.config.compose import compose
from sslbench.config.published import Library, with_packages
from sslbench.config.registry import Registry
from sslbench.errors import ConfigError
from sslbench.plugin.catalog import Catalog

RECIPE = """
version: 1
recipes:
  {name}:
    summary: of {name}
    source: ours
    {extends}
    config:
      method: {{name: simclr}}
      dataset: {{name: digits}}
      backbone: {{name: conv4}}
      train: {{epochs: {epochs}}}
references:
  - {{recipe: {name}, metric: eval/knn.v1/digits/top1, value: 97.0, tolerance: 1.0, source: ours}}
"""
MAIN = Registry.model_validate(
    {"version": 1, "recipes": {"base": {"summary": "s", "source": "t", "config": {"train": {"batch_size": 64}}}}}
)


@pytest.fixture
def site(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = workdir / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def ship(site: Path, name: str, yaml: str) -> None:
    """A package that must never be imported."""
    package = name.replace("-", "_")
    files = {f"{package}/__init__.py": "raise RuntimeError('imported')", f"{package}/registry.yaml": yaml}
    install(site, name, files, {"registries": {"own": package}})


def library() -> Library:
    return with_packages(MAIN, Catalog().registries())


def test_a_package_ships_a_recipe_that_builds_on_the_registry_file(site: Path) -> None:
    ship(site, "ssl-a", RECIPE.format(name="a/short", epochs=3, extends="extends: base"))
    merged = library()
    assert [name for name, _ in merged.recipe_chain("a/short")] == ["base", "a/short"]
    assert [name for name, _ in merged.recipe_chain("ssl-a:a/short")] == ["base", "a/short"]
    assert merged.recipes["a/short"].origin == "ssl-a 1.0"
    assert [(r.recipe, r.origin) for r in merged.references] == [("a/short", "ssl-a 1.0")]
    composed = compose(Catalog(), merged, recipe="ssl-a:a/short", layers=[])
    assert (composed.recipe, composed.core.train.epochs, composed.core.train.batch_size) == ("a/short", 3, 64)
    (source,) = composed.registries
    assert (source["kind"], source["distribution"], source["covers"]) == ("registry", "ssl-a", "ssl_a: 2 files")


def test_a_name_of_two_packages_is_an_error_naming_both(site: Path) -> None:
    ship(site, "ssl-a", RECIPE.format(name="same", epochs=3, extends=""))
    ship(site, "ssl-b", RECIPE.format(name="same", epochs=4, extends=""))
    merged = library()
    with pytest.raises(ConfigError, match=r"'same': ssl-a 1\.0 and ssl-b 1\.0") as caught:
        merged.resolve("same")
    assert caught.value.hint == "name one: ssl-a:same or ssl-b:same"
    assert merged.recipe_chain("ssl-b:same")[0][1].config["train"]["epochs"] == 4
    assert {r.recipe for r in merged.references} == {"ssl-a:same", "ssl-b:same"}


def test_a_name_of_the_registry_file_cannot_be_taken_over(site: Path) -> None:
    ship(site, "ssl-a", RECIPE.format(name="base", epochs=3, extends=""))
    ship(site, "ssl-b", RECIPE.format(name="b/short", epochs=4, extends="extends: base"))
    with pytest.raises(ConfigError, match=r"sslbench and ssl-a 1\.0"):
        library().resolve("base")
    assert library().recipe_chain("sslbench:base")[0][1].config == {"train": {"batch_size": 64}}
    assert [name for name, _ in library().recipe_chain("b/short")] == ["sslbench:base", "b/short"]


@pytest.mark.parametrize(
    ("yaml", "why"),
    [
        ("recipes: [", "is not valid YAML"),
        ("version: 1\nrecipes: {x: {sumary: y}}", "is not a valid registry"),
        ("version: 1\ndefaults: {train: {epochs: 1}}", "would change the runs of everybody"),
        ("just words", "is not a valid registry"),
    ],
)
def test_a_broken_file_breaks_only_itself(site: Path, yaml: str, why: str) -> None:
    ship(site, "ssl-bad", yaml)
    ship(site, "ssl-good", RECIPE.format(name="good", epochs=3, extends=""))
    merged = library()
    (problem,) = merged.problems
    assert problem.startswith("the recipes of ssl-bad 1.0 are ignored: ")
    assert why in problem
    assert merged.resolve("good") == "good"
    kinds = {source["distribution"]: source.get("problem", "") for source in merged.sources_of("good")}
    assert kinds["ssl-good"] == ""
    assert kinds["ssl-bad"]


def test_packages_that_lack_the_file_or_are_no_package_say_so(site: Path) -> None:
    install(site, "ssl-none", {"ssl_none/__init__.py": ""}, {"registries": {"own": "ssl_none"}})
    install(site, "ssl-single", {"ssl_single.py": ""}, {"registries": {"own": "ssl_single"}})
    install(site, "ssl-gone", {}, {"registries": {"own": "ssl_gone"}})
    problems = library().ignored
    assert "No such file" in problems["ssl-none 1.0"]
    assert "must lie in a package" in problems["ssl-single 1.0"]
    assert "there is no package 'ssl_gone'" in problems["ssl-gone 1.0"]


def test_blocked_packages_ship_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(site, "ssl-a", RECIPE.format(name="a/short", epochs=3, extends=""))
    assert not Catalog.from_options(["no:ssl-a"]).registries()
    monkeypatch.setenv("SSLBENCH_PLUGINS", "")
    assert not Catalog().registries()


def test_commands_know_them_and_name_their_origin(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ship(site, "ssl-a", RECIPE.format(name="a/short", epochs=3, extends=""))
    ship(site, "ssl-bad", "recipes: [")
    assert run(["list", "recipes", "--json"]) == 0
    printed = capsys.readouterr()
    assert "Warning: the recipes of ssl-bad 1.0 are ignored" in printed.err
    rows = {row["name"]: row["origin"] for row in json.loads(printed.out)}
    assert rows["a/short"] == "ssl-a 1.0"
    assert rows["demo/simclr"] == "sslbench"
    assert run(["info", "recipe", "a/short", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["origin"], facts["references"][0]["origin"]) == ("ssl-a 1.0", "ssl-a 1.0")
    assert run(["config", "--recipe", "ssl-a:a/short", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "a/short"


def test_a_recipe_that_builds_on_nothing_names_itself(site: Path) -> None:
    ship(site, "ssl-a", RECIPE.format(name="a/short", epochs=3, extends="extends: bose"))
    with pytest.raises(ConfigError, match=r"recipe 'a/short' of ssl-a 1\.0 extends 'bose', .*did you mean 'base'"):
        library().recipe_chain("a/short")
