"""Layers, origins, reports of problems, hashes, recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslbench.config.compose import Composed, Layer, compose, differences_from_saved, read_config_file
from sslbench.config.registry import Recipe, Registry, find_registry, load_registry
from sslbench.config.tree import flatten, parse_overrides
from sslbench.config.validate import ConfigProblems
from sslbench.errors import ConfigError, PluginError
from sslbench.plugin.catalog import Catalog

BASE = {"method": {"name": "simclr"}, "dataset": {"name": "digits"}, "backbone": {"name": "conv4"}}


def registry(**recipes: Recipe) -> Registry:
    return Registry(version=1, defaults=BASE, recipes=recipes)


def composed(*items: str, recipes: dict[str, Recipe] | None = None, recipe: str | None = None) -> Composed:
    layer = Layer("command line", parse_overrides(items))
    return compose(Catalog(), registry(**(recipes or {})), recipe=recipe, layers=[layer])


def problems(*items: str) -> dict[str, tuple[str, str]]:
    with pytest.raises(ConfigProblems) as caught:
        composed(*items)
    return {p.key: (p.message, p.origin) for p in caught.value.problems}


def test_layers_override_each_other_and_remember_their_origin() -> None:
    recipe = Recipe(summary="s", source="s", config={"train": {"epochs": 7, "batch_size": 32}})
    result = composed("train.batch_size=64", recipes={"r": recipe}, recipe="r")
    assert (result.core.train.epochs, result.core.train.batch_size) == (7, 64)
    assert result.origins["train.epochs"] == "recipe r"
    assert result.origins["train.batch_size"] == "command line"
    assert result.origins["train.log_every"] == "default"
    assert result.origins["method.name"] == "registry defaults"


def test_method_defaults_lie_below_the_recipe() -> None:
    result = composed()
    assert any(origin == "method simclr" for origin in result.origins.values())
    recipe = Recipe(summary="s", source="s", config={"optim": {"lr": 0.5}})
    assert composed(recipes={"r": recipe}, recipe="r").core.optim.lr == 0.5


def test_a_recipe_extends_another() -> None:
    recipes = {
        "base": Recipe(summary="s", source="s", config={"train": {"epochs": 5, "batch_size": 16}}),
        "long": Recipe(summary="s", source="s", extends="base", config={"train": {"epochs": 50}}),
    }
    result = composed(recipes=recipes, recipe="long")
    assert (result.core.train.epochs, result.core.train.batch_size) == (50, 16)
    assert result.origins["train.batch_size"] == "recipe base"


def test_recipes_in_a_circle_are_refused() -> None:
    recipes = {
        "a": Recipe(summary="s", source="s", extends="b"),
        "b": Recipe(summary="s", source="s", extends="a"),
    }
    with pytest.raises(ConfigError, match="extends itself"):
        composed(recipes=recipes, recipe="a")


def test_all_problems_come_in_one_report_with_origin_and_suggestion() -> None:
    found = problems("optim.nmae=sgd", "train.epochs=-1", "trian.epochs=3", "method.temprature=1")
    assert found["optim.nmae"] == ("unknown key; did you mean 'name'?", "command line")
    assert "did you mean 'train'?" in found["trian"][0]
    assert "greater than or equal to 1" in found["train.epochs"][0]
    assert "got -1" in found["train.epochs"][0]
    assert "did you mean 'temperature'?" in found["method.temprature"][0]


def test_a_required_option_is_named() -> None:
    assert problems("dataset.name=folder")["dataset.root"] == (
        "required; write dataset.root=VALUE",
        "nothing set it",
    )


def test_a_view_is_addressed_by_its_number() -> None:
    result = composed("method.views.0.gray=0.5", "method.views.0.jitter.hue=0.0")
    view = result.method.cfg.views[0]  # type: ignore[attr-defined]
    assert (view.gray, view.jitter.hue) == (0.5, 0.0)
    assert result.origins["method.views.0.gray"] == "command line"


def test_a_view_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"method\.views has 1 item, numbered from 0; there is no number 3"):
        composed("method.views.3.gray=0.5")


def test_a_wrong_key_inside_a_view_suggests_the_views_keys() -> None:
    found = problems("method.views.0.jitter.hew=0.1")
    assert "did you mean 'hue'?" in found["method.views.0.jitter.hew"][0]


def test_options_of_a_replaced_plugin_are_dropped() -> None:
    recipe = Recipe(summary="s", source="s", config={"backbone": {"name": "resnet18", "stem": "cifar"}})
    assert composed(recipes={"r": recipe}, recipe="r").backbone.cfg.stem == "cifar"  # type: ignore[attr-defined]
    result = composed("backbone.name=conv4", recipes={"r": recipe}, recipe="r")
    assert result.backbone.name == "conv4"


def test_unknown_recipe_and_method_suggest_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'simclr/x'"):
        composed(recipes={"simclr/x": Recipe(summary="s", source="s")}, recipe="simclr/y")
    with pytest.raises(PluginError, match="did you mean 'simclr'"):
        composed("method.name=simclear")


def test_values_are_yaml_and_scientific_numbers_are_numbers() -> None:
    tree = parse_overrides(["optim.lr=1e-3", "run.evals=[linear, knn]", "a/b=true", "run.note="])
    assert tree == {
        "optim": {"lr": 1e-3},
        "run": {"evals": ["linear", "knn"], "note": None},
        "a": {"b": True},
    }


@pytest.mark.parametrize("item", ["epochs", "=3", "--epochs=3"])
def test_something_that_is_not_an_option_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="is not an option"):
        parse_overrides([item])


def test_hash_covers_what_changes_results_only() -> None:
    base = composed()
    assert composed("run.name=x", "train.log_every=3", "probe.every=0", "run.evals=[]").hash() == base.hash()
    for item in (
        "train.epochs=3",
        "run.seed=9",
        "method.views.0.gray=0.9",
        "optim.lr=0.7",
        "backbone.name=resnet8",
    ):
        assert composed(item).hash() != base.hash(), item


def test_group_hash_ignores_the_seed_alone() -> None:
    assert composed("run.seed=5").group_hash() == composed().group_hash()
    assert composed("run.seed=5", "train.epochs=3").group_hash() != composed().group_hash()


def test_a_saved_configuration_composes_to_itself(tmp_path: Path) -> None:
    import yaml

    first = composed("train.epochs=3", "method.views.0.gray=0.4", "evals.knn.temperature=0.2")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first.tree))
    again = compose(Catalog(), registry(), recipe=None, layers=[read_config_file(file)])
    assert dict(flatten(again.tree)) == dict(flatten(first.tree))
    assert differences_from_saved(again, file) == []
    changed = composed("train.epochs=4", "method.views.0.gray=0.4")
    assert differences_from_saved(changed, file) == ["train.epochs: 3 -> 4"]
    without = composed("train.epochs=3", "method.views.0.jitter=null")
    assert any("method.views.0.jitter.p" in row for row in differences_from_saved(without, file))


def test_an_option_newer_than_a_run_had_its_default_then(tmp_path: Path) -> None:
    import yaml

    first = composed("train.epochs=3")
    older = {**first.tree, "data": {key: value for key, value in first.tree["data"].items() if key != "colors"}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(older))
    assert differences_from_saved(first, file) == []
    changed = composed("train.epochs=3", "data.colors=fused")
    assert differences_from_saved(changed, file) == ["data.colors: exact -> fused"]


@pytest.mark.parametrize("blur", ["{sigma: [0, 1]}", "{sigma: [2, 1]}", "{factors: []}", "{factors: [0.5]}"])
def test_a_blur_must_blur(blur: str) -> None:
    with pytest.raises(ConfigProblems, match=r"sigma|factors"):
        composed(f"method.views.0.blur={blur}")


def test_eval_options_are_checked_before_training() -> None:
    assert "evals.knn.temprature" in problems("evals.knn.temprature=0.1")


def test_a_config_file_that_is_no_mapping_or_no_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold sections"):
        read_config_file(file)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_config_file(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(tmp_path / "none.yaml")


def test_registry_problems_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text("version: 1\nrecipes:\n  a: {summary: s}\n")
    with pytest.raises(ConfigError, match=r"recipes\.a\.source"):
        load_registry(file)
    with pytest.raises(ConfigError, match="does not exist"):
        find_registry(tmp_path / "none.yaml")


def test_the_nearest_registry_upward_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registry.yaml").write_text("version: 1\nrecipes: {}\n")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "registry.yaml").write_text("something: else\n")
    monkeypatch.chdir(inner)
    monkeypatch.delenv("SSLBENCH_REGISTRY", raising=False)
    assert find_registry() == tmp_path / "registry.yaml"
