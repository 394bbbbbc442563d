"""Five layers to one typed, frozen configuration that knows where each value came from.

Lowest to highest: defaults of core and plugins, the method's own defaults, the recipe, ``--config FILE``, and
``key=value`` on the command line. Composition is pure: nothing is rescaled or inferred later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from sslbench.config.options import Options
from sslbench.config.registry import Registry
from sslbench.config.renaming import with_current_keys, with_current_plugins
from sslbench.config.schema import CoreOptions
from sslbench.config.tree import Tree, differences, flatten, merge, plain, read_yaml
from sslbench.config.validate import ConfigProblems, Problem, check
from sslbench.errors import ConfigError, did_you_mean
from sslbench.plugin.catalog import Catalog, Kind

PLUGIN_SECTIONS: tuple[Kind, ...] = ("method", "backbone", "dataset")
CORE_SECTIONS = tuple(CoreOptions.model_fields)
SECTIONS = (*PLUGIN_SECTIONS, *CORE_SECTIONS, "evals")
DEFAULT = "default"


class Layer(NamedTuple):
    """Some values and where they came from."""

    origin: str
    values: Tree


@dataclass(frozen=True)
class Selection:
    """A plugin chosen by a configuration, with its validated options."""

    kind: Kind
    name: str
    cls: type[Any]
    cfg: Options

    @property
    def label(self) -> str:
        """What tables call it: its name, with the value of its selector (``timm:resnet18``)."""
        return labelled(self.cls, self.name, self.cfg)


def labelled(cls: type[Any], name: str, cfg: Options) -> str:
    """A plugin's name as a user writes it, ``NAME`` or ``NAME:VALUE``."""
    return f"{name}:{getattr(cfg, cls.selector)}" if cls.selector else name


@dataclass(frozen=True)
class Composed:
    """A complete configuration."""

    core: CoreOptions
    method: Selection
    backbone: Selection
    dataset: Selection
    evals: Mapping[str, Options]
    """Options of each evaluation that is named anywhere in the configuration."""
    recipe: str | None
    tree: Tree
    """All values as plain data, as written to config.yaml."""
    origins: Mapping[str, str]
    """Dotted key to the origin of its value."""
    registries: Sequence[Mapping[str, str]] = ()
    """Identities of the packages that the recipe came from, and of those whose recipes were ignored."""

    def hash(self) -> str:
        """A digest of everything that can change the pretrained weights."""
        return _digest(self.essence())

    def group_hash(self) -> str:
        """The same without the seed: runs that differ only by chance share it."""
        return _digest({key: value for key, value in self.essence().items() if key != "run.seed"})

    def essence(self) -> dict[str, Any]:
        """Dotted keys and values that can change the pretrained weights."""
        return self.essence_of(self.tree)

    def essence_of(self, tree: Tree) -> dict[str, Any]:
        """The same of another configuration of the same plugins."""
        models = {"method": self.method.cfg, "backbone": self.backbone.cfg, "dataset": self.dataset.cfg}
        models |= {name: getattr(self.core, name) for name in CORE_SECTIONS}
        skip = {f"{section}.{name}" for section, model in models.items() for name in _cosmetic_fields(model)}
        flat = dict(flatten(tree))
        return {
            key: value
            for key, value in flat.items()
            if key.split(".")[0] not in ("evals", "recipe") and ".".join(key.split(".")[:2]) not in skip
        }


def compose(catalog: Catalog, registry: Registry, *, recipe: str | None, layers: Sequence[Layer]) -> Composed:
    """Compose a pretraining configuration.

    Args:
        layers: configuration files and command line, lowest first; the recipe comes below them.

    Raises:
        ConfigProblems: with every problem found.
        PluginError: a named plugin is unknown or broken.
    """
    given = [Layer("registry defaults", registry.defaults)]
    if recipe is not None:
        recipe = registry.resolve(recipe)
        given += [Layer(f"recipe {name}", part.config) for name, part in registry.recipe_chain(recipe)]
    given += layers
    given = [Layer(origin, with_current_plugins(values, PLUGIN_SECTIONS, catalog)) for origin, values in given]
    names = {kind: catalog.split(kind, _required_name(given, kind))[0] for kind in PLUGIN_SECTIONS}
    classes = {kind: catalog.load(kind, name) for kind, name in names.items()}
    given = [spelled_out(layer, names, catalog) for layer in given]
    base = [
        Layer(DEFAULT, _default_tree(names, classes)),
        Layer(f"method {names['method']}", dict(classes["method"].defaults)),
    ]
    tree, origins = merged([*base, *without_other_plugins(given, classes)], classes, catalog)
    composed = _Validator(catalog, classes, tree, origins, recipe).run()
    return replace(composed, registries=registry.sources_of(recipe))


def read_config_file(path: Path) -> Layer:
    """A ``--config`` file as a layer."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold sections such as 'train:', found {type(values).__name__}")
    return Layer(str(path), values)


class _Validator:
    """Turns a merged tree into typed sections and collects every problem on the way."""

    def __init__(
        self,
        catalog: Catalog,
        classes: Mapping[Kind, type[Any]],
        tree: Tree,
        origins: dict[str, str],
        recipe: str | None,
    ) -> None:
        self.catalog = catalog
        self.classes = classes
        self.tree = tree
        self.origins = origins
        self.recipe = recipe
        self.problems: list[Problem] = []

    def run(self) -> Composed:
        self._check_top_level()
        plugins = {kind: self._plugin(kind) for kind in PLUGIN_SECTIONS}
        core_values = {name: self.tree.get(name, {}) for name in CORE_SECTIONS}
        core = self._section(CoreOptions, core_values, "")
        evals = self._evals(core)
        if self.problems or core is None or None in plugins.values():
            raise ConfigProblems(self.problems)
        chosen = {
            kind: Selection(kind, self.tree[kind]["name"], self.classes[kind], cfg)
            for kind, cfg in plugins.items()
        }
        tree: Tree = {kind: {"name": s.name, **plain(s.cfg)} for kind, s in chosen.items()}
        tree |= plain(core) | {"evals": plain(evals), "recipe": self.recipe}
        return Composed(
            core=core,
            method=chosen["method"],
            backbone=chosen["backbone"],
            dataset=chosen["dataset"],
            evals=evals,
            recipe=self.recipe,
            tree=tree,
            origins=self.origins,
        )

    def _check_top_level(self) -> None:
        for key in self.tree:
            if key not in SECTIONS and key != "recipe":
                guess = did_you_mean(key, SECTIONS)
                self.problems.append(Problem(key, f"unknown section{guess}", self._origin(key)))

    def _plugin(self, kind: Kind) -> Any:
        values = {key: value for key, value in self.tree[kind].items() if key != "name"}
        return self._section(self.classes[kind].Config, values, kind)

    def _evals(self, core: CoreOptions | None) -> dict[str, Options]:
        given = self.tree.get("evals") or {}
        if not isinstance(given, dict):
            self.problems.append(Problem("evals", "must hold sections such as 'linear:'", self._origin("evals")))
            return {}
        names = [*(core.run.evals if core else ()), *given]
        found: dict[str, Options] = {}
        for name in dict.fromkeys(names):
            cfg = self._section(self.catalog.load("eval", name).Config, given.get(name) or {}, f"evals.{name}")
            if cfg is not None:
                found[name] = cfg
        return found

    def _section(self, model: type[Any], values: Tree, prefix: str) -> Any:
        cfg, problems = check(model, values, prefix, self._origin)
        self.problems += problems
        return cfg

    def _origin(self, key: str) -> str:
        while key:
            if key in self.origins:
                return self.origins[key]
            nested = [origin for known, origin in self.origins.items() if known.startswith(key + ".")]
            if nested:
                return nested[-1]
            key = key.rpartition(".")[0]
        return "nothing set it"


def merged(
    layers: Sequence[Layer], classes: Mapping[Kind, type[Any]], catalog: Catalog
) -> tuple[Tree, dict[str, str]]:
    """Layers over each other, lowest first, under the current names of their options.

    Args:
        layers: with current names of plugins, spelled out.

    Returns:
        The values, and the origin of each by its dotted key.
    """
    tree: Tree = {}
    origins: dict[str, str] = {}
    for layer in layers:
        merge(tree, _current(_current_evals(layer, catalog), classes), layer.origin, origins)
    return tree, origins


def _current(layer: Layer, classes: Mapping[Kind, type[Any]]) -> Tree:
    """A layer's values under the current names of its options; those of evaluations are left as they are."""
    models: dict[str, Any] = {kind: cls.Config for kind, cls in classes.items()}
    models |= {name: field.annotation for name, field in CoreOptions.model_fields.items()}
    return {
        section: with_current_keys(models[section], content, section, layer.origin)
        if section in models
        else content
        for section, content in layer.values.items()
    }


def _current_evals(layer: Layer, catalog: Catalog) -> Layer:
    evals = layer.values.get("evals")
    if not isinstance(evals, dict):
        return layer
    models = {name: catalog.load("eval", name).Config for name in evals}
    current = {
        name: with_current_keys(models[name], options, f"evals.{name}", layer.origin)
        for name, options in evals.items()
    }
    return Layer(layer.origin, {**layer.values, "evals": current})


def _default_tree(names: Mapping[Kind, str], classes: Mapping[Kind, type[Any]]) -> Tree:
    tree: Tree = {name: _defaults_of(getattr(CoreOptions(), name).__class__) for name in CORE_SECTIONS}
    for kind, cls in classes.items():
        tree[kind] = {"name": names[kind], **_defaults_of(cls.Config)}
    return tree


def _defaults_of(model: type[BaseModel]) -> Tree:
    return {
        name: plain(field.get_default(call_default_factory=True))
        for name, field in model.model_fields.items()
        if not field.is_required()
    }


def _cosmetic_fields(model: BaseModel) -> list[str]:
    return [
        name
        for name, field in type(model).model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("cosmetic")
    ]


def chosen_name(layers: Sequence[Layer], section: Kind) -> str | None:
    """The plugin that the highest layer with one names; None: no layer does."""
    for layer in reversed(layers):
        values = layer.values.get(section)
        if isinstance(values, dict) and values.get("name"):
            return str(values["name"])
    return None


def _required_name(layers: Sequence[Layer], section: Kind) -> str:
    name = chosen_name(layers, section)
    if name is None:
        raise ConfigProblems([Problem(f"{section}.name", f"required; pass --{section} NAME", "nothing set it")])
    return name


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(plain(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spelled_out(layer: Layer, names: Mapping[Kind, str], catalog: Catalog) -> Layer:
    """``name: timm:resnet18`` as ``name: timm`` and the option which that sets.

    Raises:
        ConfigError: the layer also sets this option to something else.
    """
    values = dict(layer.values)
    for kind, final in names.items():
        section = values.get(kind)
        if not (isinstance(section, dict) and section.get("name")):
            continue
        name, value = catalog.split(kind, str(section["name"]))
        # A plugin that a higher layer replaced is not even imported.
        options = catalog.options_of(kind, name, value) if name == final else {}
        for key, chosen in options.items():
            if section.get(key, chosen) != chosen:
                raise ConfigError(
                    f"{kind}.name={section['name']} and {kind}.{key}={section[key]} contradict each other"
                    f"   [{layer.origin}]",
                    hint=f"{kind}.name={name} {kind}.{key}={section[key]}",
                )
        values[kind] = {**section, "name": name, **options}
    return Layer(layer.origin, values)


def without_other_plugins(layers: Sequence[Layer], classes: Mapping[Kind, type[Any]]) -> list[Layer]:
    """Drop options that a layer meant for a plugin which a higher layer replaced by another."""
    kept = [Layer(layer.origin, dict(layer.values)) for layer in layers]
    for kind, cls in classes.items():
        meant = _meant([layer.values.get(kind) for layer in layers], cls.selector)
        for layer, plugin in zip(kept, meant, strict=True):
            if plugin not in (None, meant[-1]):
                layer.values.pop(kind, None)
    return kept


def _meant(sections: Sequence[Any], selector: str | None) -> list[tuple[str, str | None] | None]:
    """Whom the options of each layer are for: a name and what its selector said beside it; None: not known yet.

    A name alone does not replace the same name with a value. Nor does the selector's option alone, which is how a
    path changes when files move.
    """
    current: tuple[str, str | None] | None = None
    meant = []
    for section in sections:
        if isinstance(section, dict) and section.get("name"):
            value = section.get(selector) if selector else None
            named = (str(section["name"]), None if value is None else str(value))
            if current is None or named[0] != current[0] or named[1] is not None:
                current = named
        meant.append(current)
    return meant


def differences_from_saved(composed: Composed, saved: Path) -> list[str]:
    """Rows for every option that changes results and differs from a run's saved config.yaml.

    An option that is newer than the run had its default then: new options begin with what was before them.
    """
    chosen: dict[Kind, Selection] = {
        "method": composed.method,
        "backbone": composed.backbone,
        "dataset": composed.dataset,
    }
    classes = {kind: selection.cls for kind, selection in chosen.items()}
    values = _default_tree({kind: selection.name for kind, selection in chosen.items()}, classes)
    layer = read_config_file(saved)
    merge(values, _current(layer, classes), layer.origin, {})
    for kind, cls in classes.items():
        if values[kind]["name"] in cls.renamed:
            values[kind]["name"] = cls.renamed[values[kind]["name"]].to
    return differences(composed.essence_of(values), composed.essence())
