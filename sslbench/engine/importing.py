"""Weights of other programs as runs of ours, which evaluations and ``--init-from`` take like any other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslbench import __version__
from sslbench.config.compose import (
    PLUGIN_SECTIONS,
    Layer,
    chosen_name,
    labelled,
    merged,
    spelled_out,
    without_other_plugins,
)
from sslbench.config.options import Options
from sslbench.config.registry import Registry
from sslbench.config.renaming import with_current_plugins
from sslbench.config.schema import DataOptions, RunOptions, TrainOptions
from sslbench.config.tree import Tree, parse_overrides, plain
from sslbench.config.validate import ConfigProblems, Problem, check
from sslbench.engine import checkpoint, foreign
from sslbench.engine.checkpoint import BackboneMeta, CheckpointMeta
from sslbench.engine.console import Console
from sslbench.engine.observe import identity_of
from sslbench.engine.setup import DEFAULT_SIZE
from sslbench.errors import did_you_mean
from sslbench.launch.recording import open_tracker
from sslbench.plugin.api import Backbone, Dataset
from sslbench.plugin.catalog import Catalog, Kind
from sslbench.rng import derive_seed
from sslbench.tracking import Tracker
from sslbench.tracking.plugins import Identities

Color = tuple[float, float, float]

IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
IMAGENET_STD: Color = (0.229, 0.224, 0.225)
UNKNOWN = "unknown"
_CORE: Mapping[str, type[Options]] = {"run": RunOptions, "train": TrainOptions, "data": DataOptions}
_KINDS: tuple[Kind, ...] = ("backbone", "dataset")
_DOUBT = (
    "{file} holds '{entry}', which this program writes after training with labels (its supervised network, or a "
    "linear evaluation or fine-tuning of another); if labels trained this backbone, import it with --uses-labels, "
    "else it is ranked as self-supervised"
)
_SECTIONS = (*_KINDS, *_CORE, "evals")


@dataclass(frozen=True)
class ImportPlan:
    """Foreign weights and what they are to become."""

    file: Path
    layout: str
    uses_labels: bool
    recipe: str | None
    backbone_name: str
    backbone: Backbone
    dataset_key: str | None
    """What they were trained on, if that is known."""
    run: RunOptions
    mean: Color
    std: Color
    sections: Tree
    """The complete configuration, as evaluations of the run will read it."""
    registries: Identities
    """Of the packages that the recipe came from."""

    @property
    def backbone_label(self) -> str:
        """What tables call it."""
        return labelled(type(self.backbone), self.backbone_name, self.backbone.cfg)


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    run_dir: Path
    run_id: str
    name: str
    method: str
    layout: str
    tensors: int
    expected: int
    ignored: Mapping[str, int]
    filled: int
    """Batch counters that the file lacks."""
    sha256: str
    image_size: int


def plan_import(
    catalog: Catalog,
    registry: Registry,
    file: Path,
    items: Sequence[str],
    *,
    layout: str = "auto",
    recipe: str | None = None,
    image_size: int | None = None,
    mean: Color | None = None,
    std: Color | None = None,
    uses_labels: bool = False,
) -> ImportPlan:
    """Compose an import.

    Args:
        items: ``key=value`` options of the sections backbone, dataset, run, train, data and evals.
        recipe: how the weights were trained; brings backbone, data set and evaluation options.
        image_size: side they were trained with; None: that of the data set, else 224.
        mean, std: of the images they were trained on; None: those of the data set, else ImageNet's.
        uses_labels: whether they were trained with labels, as far as the recipe's method does not say so.

    Raises:
        ConfigProblems: with every problem found.
    """
    recipe = registry.resolve(recipe) if recipe else None
    tree = _merged(catalog, registry, recipe, parse_overrides(items))
    sections = _validated(catalog, tree, recipe)
    cfg, dataset_cfg = sections.pop("backbone"), sections.pop("dataset")
    dataset: Dataset | None = None
    if dataset_cfg is not None:
        dataset = catalog.load("dataset", tree["dataset"]["name"])(dataset_cfg)
    size = image_size or (dataset.info.size if dataset else None) or DEFAULT_SIZE
    name = tree["backbone"]["name"]
    named: Tree = {"backbone": {"name": name, **plain(cfg)}}
    dataset_name = tree.get("dataset", {}).get("name")
    if dataset_name is not None:
        named["dataset"] = {"name": dataset_name, **(plain(dataset_cfg) if dataset else {})}
    return ImportPlan(
        file=file,
        layout=layout,
        uses_labels=uses_labels or (recipe is not None and _method_uses_labels(catalog, registry, recipe)),
        recipe=recipe,
        backbone_name=name,
        backbone=catalog.load("backbone", name)(cfg, size),
        dataset_key=dataset.key if dataset else dataset_name,
        run=sections["run"],
        mean=mean or (dataset.info.mean if dataset else IMAGENET_MEAN),
        std=std or (dataset.info.std if dataset else IMAGENET_STD),
        sections=named | plain(sections) | {"recipe": recipe},
        registries=registry.sources_of(recipe) if recipe else [],
    )


def _merged(catalog: Catalog, registry: Registry, recipe: str | None, given: Tree) -> Tree:
    """The sections that matter here, of the recipe and of the command line."""
    chain = registry.recipe_chain(recipe) if recipe else []
    layers = [
        Layer(f"recipe {name}", {key: value for key, value in part.config.items() if key in _SECTIONS})
        for name, part in chain
    ]
    layers = [
        Layer(origin, with_current_plugins(values, _KINDS, catalog))
        for origin, values in [*layers, Layer("command line", given)]
    ]
    texts = {kind: text for kind in _KINDS if (text := chosen_name(layers, kind))}
    names = {kind: catalog.split(kind, text)[0] for kind, text in texts.items()}
    classes = {kind: catalog.load(kind, name) for kind, name in names.items()}
    layers = [spelled_out(layer, names, catalog) for layer in layers]
    return merged(without_other_plugins(layers, classes), classes, catalog)[0]


def _method_uses_labels(catalog: Catalog, registry: Registry, recipe: str) -> bool:
    """Whether the recipe is of a supervised method."""
    layers = [
        Layer(f"recipe {name}", with_current_plugins(part.config, ("method",), catalog))
        for name, part in registry.recipe_chain(recipe)
    ]
    text = chosen_name(layers, "method")
    return text is not None and bool(catalog.load("method", catalog.split("method", text)[0]).uses_labels)


def _validated(catalog: Catalog, tree: Tree, recipe: str | None) -> dict[str, Any]:
    """Typed options by section; the data set's are None if none is named or its name is enough."""
    origin = f"recipe {recipe} or command line" if recipe else "command line"
    problems = [
        Problem(key, f"unknown section{did_you_mean(key, _SECTIONS)}", origin)
        for key in tree
        if key not in _SECTIONS
    ]
    models: dict[str, tuple[type[Options], Any]] = {
        key: (model, tree.get(key, {})) for key, model in _CORE.items()
    }
    for kind in _KINDS:
        values = dict(tree.get(kind, {}))
        name = values.pop("name", None)
        if name is not None:
            cls = catalog.load(kind, name)
            if kind != "dataset" or values or not _not_needed(cls):
                models[kind] = (cls.Config, values)
        elif values or kind == "backbone":
            problems.append(Problem(f"{kind}.name", f"required; pass --{kind} NAME", "nothing set it"))
    models |= {
        f"evals.{name}": (catalog.load("eval", name).Config, values or {})
        for name, values in tree.get("evals", {}).items()
    }
    checked = {key: check(model, values, key, lambda _: origin) for key, (model, values) in models.items()}
    problems += [problem for _, found in checked.values() for problem in found]
    if problems:
        raise ConfigProblems(problems)
    typed = {key: cfg for key, (cfg, _) in checked.items() if not key.startswith("evals.")}
    evals = {key.removeprefix("evals."): cfg for key, (cfg, _) in checked.items() if key.startswith("evals.")}
    return {"dataset": None, **typed, "evals": evals}


def _not_needed(cls: type[Dataset]) -> bool:
    """Whether a data set has no labels, so that nothing is evaluated on it, and must be told where it lies.

    Its name is enough then; what does need it asks for the rest.
    """
    required = any(field.is_required() for field in cls.Config.model_fields.values())
    return required and cls.published is not None and not cls.published.classes


def import_weights(plan: ImportPlan, catalog: Catalog, root: Path, console: Console) -> Imported:
    """Load a foreign file completely or not at all, and make it a run with one checkpoint.

    Raises:
        CheckpointError: unreadable, of no known layout, or it does not fit the backbone.
    """
    weights = foreign.read_weights(plan.file, plan.layout)
    filled = foreign.load_into(plan.backbone, weights, plan.file)
    if weights.doubtful and not _uses_labels(plan, weights):
        console.warn(_DOUBT.format(file=plan.file, entry=weights.layout.doubtful_entry))
    sha256 = checkpoint.sha256_of(plan.file)
    tracker = _open_tracker(plan, weights, sha256, root, console, _took_part(plan, catalog))
    label = _label(plan, weights)
    with tracker.closing():
        meta = _meta(plan, weights, label, sha256, catalog)
        path = checkpoint.save(tracker.run_dir, meta, plan.backbone.state_dict(), None)
        tracker.checkpoint(path, checkpoint.read_meta(path, verify=False).model_dump(mode="json"))
    return Imported(
        run_dir=tracker.run_dir,
        run_id=tracker.run_id,
        name=tracker.name,
        method=label,
        layout=weights.layout.name,
        tensors=len(weights.tensors) + filled,
        expected=len(plan.backbone.state_dict()),
        ignored=weights.ignored,
        filled=filled,
        sha256=sha256,
        image_size=plan.backbone.image_size,
    )


def _label(plan: ImportPlan, weights: foreign.Weights) -> str:
    """What tables call the method."""
    return plan.run.name or f"import:{weights.layout.name}"


def _uses_labels(plan: ImportPlan, weights: foreign.Weights) -> bool:
    return plan.uses_labels or weights.layout.uses_labels


def _config_hash(plan: ImportPlan, sha256: str) -> str:
    """Equal for the same file in the same backbone."""
    cfg = plan.backbone.cfg.model_dump_json()
    return f"{derive_seed(0, sha256, plan.backbone_name, cfg, plan.backbone.image_size):016x}"


def _meta(plan: ImportPlan, weights: foreign.Weights, label: str, sha256: str, catalog: Catalog) -> CheckpointMeta:
    backbone = plan.backbone
    return CheckpointMeta(
        step=0,
        epoch=weights.epochs or 0,
        method=label,
        uses_labels=_uses_labels(plan, weights),
        limited=False,
        seed=plan.run.seed,
        backbone=BackboneMeta(
            name=plan.backbone_name,
            options=plain(backbone.cfg),
            image_size=backbone.image_size,
            dim=backbone.dim,
            stride=backbone.stride,
        ),
        dataset=plan.dataset_key or UNKNOWN,
        dataset_fingerprint=UNKNOWN,  # whatever lies here now, nobody can tell what they were trained on
        mean=plan.mean,
        std=plan.std,
        config_hash=_config_hash(plan, sha256),
        plugins=[identity_of(catalog, "backbone", plan.backbone_name)],
        sslbench=__version__,
    )


def _open_tracker(
    plan: ImportPlan,
    weights: foreign.Weights,
    sha256: str,
    root: Path,
    console: Console,
    plugins: Identities,
) -> Tracker:
    dataset = plan.dataset_key or UNKNOWN
    origin = {"file": str(plan.file.resolve()), "sha256": sha256, "layout": weights.layout.name}
    config_hash = _config_hash(plan, sha256)
    tags = {
        "sslbench.method": _label(plan, weights),
        "sslbench.dataset": dataset,
        "sslbench.backbone": plan.backbone_label,
        "sslbench.seed": str(plan.run.seed),
        "sslbench.epochs": str(weights.epochs or "?"),
        "sslbench.recipe": plan.recipe or "",
        "sslbench.config_hash": config_hash,
        "sslbench.group_hash": config_hash,
        "sslbench.limited": "false",
        "sslbench.uses_labels": str(_uses_labels(plan, weights)).lower(),
        "sslbench.source": origin["file"],
        "sslbench.source_sha256": sha256,
    }
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return open_tracker(
        root=root,
        name=plan.run.name or f"import-{weights.layout.name}-{plan.backbone_label.replace(':', '_')}-{stamp}",
        kind="import",
        experiment=plan.run.experiment or plan.dataset_key or "imported",
        tracking_uri=plan.run.tracking_uri,
        parent=None,
        params=plan.sections | {"import": origin},
        tags=tags,
        log=console.info,
        plugins=plugins,
    )


def _took_part(plan: ImportPlan, catalog: Catalog) -> Identities:
    chosen = [identity_of(catalog, k, plan.sections[k]["name"]) for k in PLUGIN_SECTIONS if k in plan.sections]
    return [*chosen, *plan.registries]
