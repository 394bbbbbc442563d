"""Commands that look: list, info, config, compare, sync, doctor."""

from collections.abc import Callable
from typing import Annotated

import typer

from sslbench.commands.options import (
    AsJson,
    BackboneName,
    ConfigFile,
    DatasetName,
    Method,
    Overrides,
    RecipeName,
    Session,
    compose_pretrain,
    named,
    run_directory,
)
from sslbench.errors import ConfigError, ExitCode
from sslbench.plugin.catalog import KINDS, Kind
from sslbench.terminal import prepare_environment


def list_(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(help="methods, datasets, backbones, evals, recipes or runs; default: all plugins."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List plugins, recipes or runs. Imports none of them."""
    from sslbench.report.listing import list_plugins, list_recipes, list_runs

    session: Session = context.obj
    if what == "recipes":
        list_recipes(session.recipes(), as_json)
    elif what == "runs":
        list_runs(session.runs, as_json)
    else:
        list_plugins(session.catalog, _kinds(what), as_json)


def info(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="method, dataset, backbone, eval or recipe.")],
    name: Annotated[str, typer.Argument()],
    as_json: AsJson = False,
) -> None:
    """Show one plugin with its options, or one recipe with its references."""
    from sslbench.report.show import show_plugin, show_recipe

    session: Session = context.obj
    if kind.removesuffix("s") == "recipe":
        show_recipe(session.recipes(), name, as_json)
    else:
        show_plugin(session.catalog, session.recipes(), _kinds(kind)[0], name, as_json)


def config(
    context: typer.Context,
    overrides: Overrides = None,
    method: Method = None,
    dataset: DatasetName = None,
    backbone: BackboneName = None,
    recipe: RecipeName = None,
    config_file: ConfigFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the complete configuration of a pretraining run, ready for --config."""
    from sslbench.report.show import print_explained, print_tree

    extra = named(method__name=method, dataset__name=dataset, backbone__name=backbone)
    composed, _ = compose_pretrain(context.obj, recipe, config_file, [*extra, *(overrides or [])], None)
    if explain:
        print_explained(composed, as_json)
    else:
        print_tree(composed.tree, as_json)


def compare(
    context: typer.Context,
    runs: Annotated[list[str] | None, typer.Argument(help="Runs to compare; default: all.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Judge each run against the published result of its recipe.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put pretrained models side by side: mean and spread over seeds, best value marked."""
    from sslbench.report.show import print_comparison

    session: Session = context.obj
    print_comparison(session.runs, runs or [], session.recipes() if reference else None, as_json)


def sync(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN")] = "last",
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="Record it there from now on, such as when the server has moved."),
    ] = None,
) -> None:
    """Send to MLflow what could not be sent while a run was going; close runs whose process was killed."""
    prepare_environment()  # or MLflow prints addresses between the results
    from sslbench.engine.console import Console
    from sslbench.report.show import print_sync
    from sslbench.tracking import sync as replay

    report = replay(run_directory(context.obj, run), Console().info, tracking_uri)
    print_sync(report)
    if not report.complete:
        raise typer.Exit(ExitCode.UNEXPECTED)


def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Check the installation: versions, devices, store, data, every plugin and what fits together."""
    prepare_environment()
    from sslbench.doctor.checks import run_checks
    from sslbench.report.show import print_checks

    session: Session = context.obj
    checks = run_checks(session.catalog, session.runs, session.registry)
    print_checks(checks, as_json)
    if any(check.level == "failure" for check in checks):
        raise typer.Exit(ExitCode.UNEXPECTED)


def _kinds(what: str | None) -> list[Kind]:
    if what is None:
        return list(KINDS)
    kind = what.removesuffix("s")
    if kind not in KINDS:
        from sslbench.errors import did_you_mean

        known = [f"{k}s" for k in KINDS] + ["recipes", "runs"]
        raise ConfigError(
            f"there is no kind '{what}'{did_you_mean(what, known)}", hint=f"one of: {', '.join(known)}"
        )
    return [kind]


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_,
    "info": info,
    "config": config,
    "compare": compare,
    "sync": sync,
    "doctor": doctor,
}
