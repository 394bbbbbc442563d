"""``NAME:VALUE`` where a plugin is named: the command line, files, recipes, evaluations, imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from sslbench_plugins.evals.transfer import Transfer, TransferConfig

from sslbench.commands.options import named
from sslbench.config.compose import Composed, Layer, compose, differences_from_saved
from sslbench.config.registry import Recipe, Registry
from sslbench.config.tree import parse_overrides
from sslbench.errors import ConfigError, PluginError
from sslbench.plugin.catalog import Catalog

WIDE = '''"""A backbone whose width is chosen behind its name."""
import torch
from torch import nn
from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.hooks import hookimpl

class WideOptions(Options):
    width: int
    """Channels."""
    bias: bool = True
    more: dict[str, int] = {}

class Wide(Backbone):
    name = "wide"
    Config = WideOptions
    selector = "width"
    stride = 4

    def __init__(self, cfg, image_size):
        super().__init__(cfg, image_size)
        self.dim = cfg.width
        self.conv = nn.Conv2d(3, cfg.width, 4, 4, bias=cfg.bias)

    def forward(self, images):
        x = self.conv(images)
        return Features(pooled=x.mean((2, 3)), map=x)

@hookimpl
def sslbench_backbones():
    return [Wide]
'''
BASE = {"method": {"name": "simclr"}, "dataset": {"name": "digits"}, "backbone": {"name": "conv4"}}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    (tmp_path / "widths.py").write_text(WIDE)
    return Catalog(local=(tmp_path / "widths.py",))


def composed(catalog: Catalog, *layers: dict | list[str], recipe: dict | None = None) -> Composed:
    recipes = {"r": Recipe(summary="s", source="s", config=recipe)} if recipe else {}
    given = [
        Layer(f"layer {number}", parse_overrides(layer) if isinstance(layer, list) else layer)
        for number, layer in enumerate(layers)
    ]
    registry = Registry(version=1, defaults=BASE, recipes=recipes)
    return compose(catalog, registry, recipe="r" if recipe else None, layers=given)


def test_the_value_sets_the_option_and_is_part_of_the_label(catalog: Catalog) -> None:
    result = composed(catalog, ["backbone.name=wide:6"])
    assert result.tree["backbone"] == {"name": "wide", "width": 6, "bias": True, "more": {}}
    assert (result.backbone.name, result.backbone.label) == ("wide", "wide:6")
    assert result.origins["backbone.width"] == "layer 0"
    assert result.hash() == composed(catalog, ["backbone.name=wide", "backbone.width=6"]).hash()
    assert composed(catalog).backbone.label == "conv4"


def test_an_address_is_a_name_and_may_have_a_value_too(catalog: Catalog) -> None:
    assert catalog.split("backbone", "widths:wide") == ("widths:wide", None)
    assert catalog.split("backbone", "widths:wide:6") == ("widths:wide", "6")
    assert catalog.split("backbone", "wide:a:b") == ("wide", "a:b")
    assert catalog.split("backbone", "none:such") == ("none:such", None)
    assert composed(catalog, ["backbone.name=widths:wide:6"]).backbone.cfg.width == 6
    with pytest.raises(PluginError, match="no backbone is named 'none:such'"):
        composed(catalog, ["backbone.name=none:such"])


def test_what_takes_no_value_says_so(catalog: Catalog) -> None:
    with pytest.raises(PluginError, match="'conv4' takes nothing behind its name, got 'conv4:64'"):
        composed(catalog, ["backbone.name=conv4:64"])
    with pytest.raises(PluginError, match="lacks the width") as caught:
        composed(catalog, {"backbone": {"name": "wide:"}})
    assert caught.value.hint == "wide:WIDTH"
    with pytest.raises(PluginError, match="blocked"):
        composed(Catalog(blocked=frozenset({"conv4"})), ["backbone.name=conv4:64"])
    with pytest.raises(ConfigError, match="should be a valid integer"):
        composed(catalog, ["backbone.name=wide:broad"])
    with pytest.raises(ConfigError, match="contradict each other"):
        composed(catalog, ["backbone.name=wide:6", "backbone.width=7"])


def test_two_plugins_of_one_name_are_told_apart_before_the_value(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "other.py").write_text(WIDE)
    both = Catalog(local=(*catalog.local, tmp_path / "other.py"))
    with pytest.raises(PluginError, match="two plugins claim the backbone 'wide'"):
        composed(both, ["backbone.name=wide:6"])
    assert composed(both, ["backbone.name=other:wide:6"]).backbone.label == "other:wide:6"


def test_another_value_is_another_plugin_and_the_same_one_is_not(catalog: Catalog) -> None:
    recipe = {"backbone": {"name": "wide:6", "bias": False}}
    assert composed(catalog, recipe=recipe).backbone.cfg.bias is False
    assert composed(catalog, ["backbone.name=wide:7"], recipe=recipe).backbone.cfg.bias is True
    assert composed(catalog, ["backbone.name=wide:6"], recipe=recipe).backbone.cfg.bias is False
    assert composed(catalog, ["backbone.name=wide"], recipe=recipe).backbone.cfg.bias is False
    # The option alone changes the option alone: data that has moved keeps what is known of it.
    moved = composed(catalog, ["backbone.width=8"], recipe=recipe).backbone
    assert (moved.label, moved.cfg.bias) == ("wide:8", False)


def test_a_plugin_that_is_replaced_is_not_imported(catalog: Catalog) -> None:
    result = composed(catalog, ["backbone.name=conv4"], recipe={"backbone": {"name": "gone:6", "bias": False}})
    assert result.tree["backbone"] == {"name": "conv4"}


def test_a_saved_configuration_gives_the_same_run(catalog: Catalog, tmp_path: Path) -> None:
    first = composed(catalog, ["backbone.name=wide:6", "backbone.bias=false"])
    saved = {key: value for key, value in first.tree.items() if key != "recipe"}
    assert composed(catalog, saved).hash() == first.hash()
    again = composed(catalog, saved, ["backbone.name=wide:6"])
    assert again.hash() == first.hash()
    (tmp_path / "config.yaml").write_text(
        "backbone: {name: wide, width: 5}\nmethod: {name: simclr}\ndataset: {name: digits}\n"
    )
    assert "backbone.width: 5 -> 6" in differences_from_saved(first, tmp_path / "config.yaml")


def test_a_transfer_calls_data_by_the_last_part_of_their_path() -> None:
    cfg = TransferConfig(datasets=("digits", "hf:/data/flowers/", "hf:me/birds"))
    assert Transfer(cfg).subject("any") == "digits+hf:flowers+hf:birds"


@pytest.mark.parametrize("name", ["timm:", "a: b", "[x]", "12", "größe 😀", 'a"b'])
def test_names_of_the_command_line_are_taken_as_they_are(name: str) -> None:
    (item,) = named(backbone__name=name)
    assert parse_overrides([item]) == {"backbone": {"name": name}}
