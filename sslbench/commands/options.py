"""What several commands have in common: global options, the types of their own options, completion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslbench.plugin.catalog import Catalog, Kind

if TYPE_CHECKING:
    from sslbench.config.compose import Composed
    from sslbench.config.registry import Registry


@dataclass(frozen=True)
class Session:
    """The global options of one command."""

    catalog: Catalog
    registry_path: Path | None
    runs: Path
    arguments: tuple[str, ...] = ()
    """The words behind ``sslbench``, for the processes that a launcher starts."""

    def registry(self) -> Registry:
        """The registry file alone, for commands that need its defaults but no recipe."""
        from sslbench.config.registry import find_registry, load_registry

        return load_registry(find_registry(self.registry_path))

    def recipes(self) -> Registry:
        """The registry file and those of installed packages; what is wrong with these is a warning."""
        from sslbench.config.published import with_packages
        from sslbench.terminal import warn

        library = with_packages(self.registry(), self.catalog.registries())
        for problem in library.problems:
            warn(problem)
        return library


def complete(kind: Kind) -> Any:
    def names(incomplete: str) -> Iterator[tuple[str, str]]:
        for entry in Catalog().entries(kind):
            if entry.name.startswith(incomplete):
                yield entry.name, entry.summary

    return names


def complete_recipe(incomplete: str) -> Iterator[tuple[str, str]]:
    from sslbench.config.published import with_packages
    from sslbench.config.registry import find_registry, load_registry

    library = with_packages(load_registry(find_registry()), Catalog().registries())
    for name, recipe in library.recipes.items():
        if name.startswith(incomplete):
            yield name, recipe.summary


Method = Annotated[str | None, typer.Option(help="Method to pretrain with.", autocompletion=complete("method"))]
DatasetName = Annotated[str | None, typer.Option(help="Data set.", autocompletion=complete("dataset"))]
BackboneName = Annotated[str | None, typer.Option(help="Backbone.", autocompletion=complete("backbone"))]
RecipeName = Annotated[
    str | None, typer.Option(help="Start from a reviewed recipe.", autocompletion=complete_recipe)
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with more options.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options such as train.epochs=10.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after N steps; the run is left out of reports.")]
_LAUNCH = "Several processes"
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        rich_help_panel=_LAUNCH,
        help="Start N processes on this machine, one per device; auto: one per CUDA device.",
    ),
]
Nodes = Annotated[
    str | None,
    typer.Option(metavar="N|MIN:MAX", rich_help_panel=_LAUNCH, help="How many machines take part."),
]
NodeRank = Annotated[
    int | None,
    typer.Option(min=0, rich_help_panel=_LAUNCH, help="Number of this machine; default: as they come."),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT|auto",
        rich_help_panel=_LAUNCH,
        help="Where machines meet; auto: here, and print the line for the others.",
    ),
]
LaunchId = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_LAUNCH, help="What tells launches at one endpoint apart; it is printed by auto."
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0,
        rich_help_panel=_LAUNCH,
        help="How often all processes start again, from the last checkpoint, after one has died.",
    ),
]
PeerTimeout = Annotated[
    float,
    typer.Option(
        min=1.0,
        metavar="SECONDS",
        envvar="SSLBENCH_PEER_TIMEOUT",
        rich_help_panel=_LAUNCH,
        help="How long to wait for another process or machine before it counts as gone.",
    ),
]
EvalName = Annotated[str, typer.Argument(metavar="PROTOCOL", autocompletion=complete("eval"))]


def named(**names: str | None) -> list[str]:
    """``--method NAME`` and its like as ``method.name="NAME"``: without quotes ``timm:`` would be a mapping."""
    return [
        f"{key.replace('__', '.')}={json.dumps(name, ensure_ascii=False)}" for key, name in names.items() if name
    ]


def compose_pretrain(
    session: Session, recipe: str | None, file: Path | None, items: list[str], resume: str | None
) -> tuple[Composed, Path | None]:
    from sslbench.config.compose import Layer, compose, read_config_file
    from sslbench.config.tree import parse_overrides
    from sslbench.engine.runs import trained_run

    layers: list[Layer] = []
    resumed = None
    if resume is not None:
        resumed = trained_run(resume, session.runs)
        saved = read_config_file(resumed / "config.yaml")
        recipe = recipe or saved.values.get("recipe")
        layers.append(saved)
    layers += [read_config_file(file)] if file else []
    layers.append(Layer("command line", parse_overrides(items)))
    registry = session.recipes() if recipe else session.registry()
    return compose(session.catalog, registry, recipe=recipe, layers=layers), resumed


def run_directory(session: Session, reference: str) -> Path:
    from sslbench.engine.runs import find_run

    return find_run(reference, session.runs)
