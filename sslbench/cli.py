"""The command line: parse, compose, hand over, print. Heavy imports stay inside the functions that need them."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslbench import __version__
from sslbench.errors import ConfigError, ExitCode, PreemptedError, described
from sslbench.plugin.catalog import KINDS, Catalog, Kind
from sslbench.terminal import hoisted, prepare_environment, report

if TYPE_CHECKING:
    from sslbench.config.compose import Composed
    from sslbench.config.registry import Registry

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Benchmark self-supervised visual representation learning.",
    epilog="A first run: [bold]sslbench pretrain --method simclr[/bold], then [bold]sslbench compare[/bold].",
)


@dataclass(frozen=True)
class Session:
    """The global options of one command."""

    catalog: Catalog
    registry_path: Path | None
    runs: Path

    def registry(self) -> Registry:
        from sslbench.config.registry import find_registry, load_registry

        return load_registry(find_registry(self.registry_path))


@app.callback()
def _global(
    context: typer.Context,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", "-p", help="Load a local plugin FILE.py, or block one: no:NAME. Repeatable."),
    ] = None,
    registry: Annotated[Path | None, typer.Option(help="Use this registry.yaml.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the run directories.", envvar="SSLBENCH_RUNS")] = Path(
        "runs"
    ),
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"sslbench {__version__}")
        raise typer.Exit
    context.obj = Session(Catalog.from_options(plugin or ()), registry, runs)


def _complete(kind: Kind) -> Any:
    def names(incomplete: str) -> Iterator[tuple[str, str]]:
        for entry in Catalog().entries(kind):
            if entry.name.startswith(incomplete):
                yield entry.name, entry.summary

    return names


def _complete_recipe(incomplete: str) -> Iterator[tuple[str, str]]:
    from sslbench.config.registry import find_registry, load_registry

    for name, recipe in load_registry(find_registry()).recipes.items():
        if name.startswith(incomplete):
            yield name, recipe.summary


Method = Annotated[str | None, typer.Option(help="Method to pretrain with.", autocompletion=_complete("method"))]
DatasetName = Annotated[str | None, typer.Option(help="Data set.", autocompletion=_complete("dataset"))]
BackboneName = Annotated[str | None, typer.Option(help="Backbone.", autocompletion=_complete("backbone"))]
RecipeName = Annotated[
    str | None, typer.Option(help="Start from a reviewed recipe.", autocompletion=_complete_recipe)
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with more options.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options such as train.epochs=10.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after N steps; the run is left out of reports.")]
EvalName = Annotated[str, typer.Argument(metavar="PROTOCOL", autocompletion=_complete("eval"))]


@app.command()
def pretrain(
    context: typer.Context,
    overrides: Overrides = None,
    method: Method = None,
    dataset: DatasetName = None,
    backbone: BackboneName = None,
    recipe: RecipeName = None,
    config: ConfigFile = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue a run exactly: its name, id, directory, or 'last'.")
    ] = None,
    init_from: Annotated[str | None, typer.Option(help="Start from the backbone weights of another run.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Run once per seed, such as 1,2,3; compare then shows mean and spread.")
    ] = None,
    limit: Limit = None,
    no_evals: Annotated[bool, typer.Option("--no-evals", help="Skip the evaluations after training.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Pretrain a method, then run its evaluations."""
    session: Session = context.obj
    chosen = {"method": method, "dataset": dataset, "backbone": backbone}
    extra: list[str] = [f"{kind}.name={name}" for kind, name in chosen.items() if name]
    extra += [f"train.limit={limit}"] if limit else []
    extra += ["run.evals=[]"] if no_evals else []
    items = [*extra, *(overrides or [])]
    runs = [
        _compose_pretrain(session, recipe, config, [*items, *seed], resume)
        for seed in _seed_options(seeds, resume)
    ]
    if dry_run:
        from sslbench.report.show import print_plan

        for composed, _ in runs:
            print_plan(composed, as_json)
        return
    prepare_environment()
    from sslbench.engine.machine import prepare_process

    prepare_process()
    from sslbench.engine.console import Console
    from sslbench.engine.launch import joined_world
    from sslbench.engine.worker import pretrain as run_pretraining
    from sslbench.report.show import print_outcome

    initial = _run_directory(session, init_from) if init_from else None
    exit_code = 0
    with joined_world(runs[0][0].core.train) as reports:
        for composed, resumed in runs:
            console = Console(quiet=not reports)
            outcome = run_pretraining(
                composed, session.catalog, session.runs, console, resume=resumed, init_from=initial
            )
            if reports:
                print_outcome(outcome, as_json)
            exit_code = exit_code or outcome.exit_code
    if exit_code:
        raise typer.Exit(exit_code)


@app.command("eval")
def evaluate(
    context: typer.Context,
    protocol: EvalName,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Run name, id or directory.")] = "last",
    overrides: Overrides = None,
    dataset: DatasetName = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a pretrained model: linear, knn, test, transfer, or a plugin's protocol."""
    session: Session = context.obj
    items = list(overrides or [])
    if "=" in run:  # the run was left out and the first option took its place
        items, run = [run, *items], "last"
    prepare_environment()
    from sslbench.engine.machine import prepare_process

    prepare_process()
    from sslbench.engine.console import Console
    from sslbench.engine.evaluate import evaluate_run, plan_evaluation
    from sslbench.engine.launch import joined_world
    from sslbench.engine.stopping import stopping_at_once
    from sslbench.report.show import print_evaluation, print_tree

    plan = plan_evaluation(session.catalog, _run_directory(session, run), protocol, dataset, items)
    if dry_run:
        print_tree(plan.tree(), as_json)
        return
    stopping = stopping_at_once("features computed so far are kept", "give the same command again")
    with joined_world(plan.train) as reports, stopping:
        outcome = evaluate_run(plan, session.catalog, Console(quiet=not reports))
        if reports:
            print_evaluation(outcome, as_json)


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Weight file of another program, or backbone.pt of a run.")],
    overrides: Overrides = None,
    backbone: BackboneName = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Data set it was trained on; evaluations use it.", autocompletion=_complete("dataset")),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How it was trained: backbone, data set, evaluation options.", autocompletion=_complete_recipe
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="plain, torchvision, swav, moco, scrl, relational; auto recognises it.")
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Name of the run and of the method in tables; default: import:LAYOUT.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=4, help="Side of its training images; default: the data set's, else 224.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="R,G,B in [0, 1]; default: the data set's or ImageNet's.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B in units of [0, 1].")] = None,
    uses_labels: Annotated[
        bool, typer.Option("--uses-labels", help="It was trained with labels: an upper bound, not ranked.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model out of weights that another program trained."""
    session: Session = context.obj
    chosen = {"backbone.name": backbone, "dataset.name": dataset, "run.name": name}
    items = [f"{key}={value}" for key, value in chosen.items() if value]
    prepare_environment()
    from sslbench.engine.console import Console
    from sslbench.engine.importing import import_weights, plan_import
    from sslbench.report.show import print_imported

    plan = plan_import(
        session.catalog,
        session.registry(),
        file,
        [*items, *(overrides or [])],
        layout=layout,
        recipe=recipe,
        image_size=image_size,
        mean=_color("--mean", mean),
        std=_color("--std", std),
        uses_labels=uses_labels,
    )
    print_imported(import_weights(plan, session.catalog, session.runs, Console()), as_json)


@app.command("list")
def list_(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(help="methods, datasets, backbones, evals, recipes or runs; default: all plugins."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List plugins, recipes or runs. Imports none of them."""
    from sslbench.report.show import list_plugins, list_recipes, list_runs

    session: Session = context.obj
    if what == "recipes":
        list_recipes(session.registry(), as_json)
    elif what == "runs":
        list_runs(session.runs, as_json)
    else:
        list_plugins(session.catalog, _kinds(what), as_json)


@app.command()
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
        show_recipe(session.registry(), name, as_json)
    else:
        show_plugin(session.catalog, session.registry(), _kinds(kind)[0], name, as_json)


@app.command()
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

    chosen = {"method": method, "dataset": dataset, "backbone": backbone}
    extra = [f"{kind}.name={name}" for kind, name in chosen.items() if name]
    composed, _ = _compose_pretrain(context.obj, recipe, config_file, [*extra, *(overrides or [])], None)
    if explain:
        print_explained(composed, as_json)
    else:
        print_tree(composed.tree, as_json)


@app.command()
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
    print_comparison(session.runs, runs or [], session.registry() if reference else None, as_json)


@app.command()
def sync(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="[RUN]")] = "last",
) -> None:
    """Send to MLflow what could not be sent while a run was going."""
    from sslbench.engine.console import Console
    from sslbench.report.show import print_sync
    from sslbench.tracking import sync as replay

    report = replay(_run_directory(context.obj, run), Console().info)
    print_sync(report)
    if not report.complete:
        raise typer.Exit(ExitCode.UNEXPECTED)


@app.command()
def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Check the installation: versions, devices, every plugin, the MLflow store."""
    from sslbench.report.doctor import run_checks
    from sslbench.report.show import print_checks

    checks = run_checks(context.obj.catalog)
    print_checks(checks, as_json)
    if not all(check.passed for check in checks):
        raise typer.Exit(ExitCode.UNEXPECTED)


def _compose_pretrain(
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
    return compose(session.catalog, session.registry(), recipe=recipe, layers=layers), resumed


def _seed_options(seeds: str | None, resume: str | None) -> list[list[str]]:
    """One list of overrides per run."""
    if seeds is None:
        return [[]]
    if resume is not None:
        raise ConfigError("--seeds starts new runs and --resume continues one", hint="drop one of the two")
    values = [value.strip() for value in seeds.split(",")]
    if not all(value.isdigit() for value in values) or len(set(values)) < len(values):
        raise ConfigError(f"--seeds {seeds}: not a list of different numbers", hint="--seeds 1,2,3")
    return [[f"run.seed={value}"] for value in values]


def _color(option: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        red, green, blue = (float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: not three numbers", hint=f"{option} 0.485,0.456,0.406") from None
    return red, green, blue


def _run_directory(session: Session, reference: str) -> Path:
    from sslbench.engine.runs import find_run

    return find_run(reference, session.runs)


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


def run(arguments: list[str] | None = None) -> int:
    """Run one command, turn every error into a message, and return the exit code.

    Args:
        arguments: words after ``sslbench``; unset: those of this process.
    """
    try:
        app(hoisted(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as finished:  # Typer ends every command with one
        return finished.code if isinstance(finished.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        report(PreemptedError("interrupted", hint="what was finished is kept; give the same command again"))
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of a listing (head, less) went away: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception as error:  # noqa: BLE001 - the last line of defence against a bare traceback
        if os.environ.get("SSLBENCH_DEBUG"):
            traceback.print_exc()
        problem = described(error)
        report(problem)
        return problem.exit_code
    return ExitCode.OK


def main() -> None:
    """The command ``sslbench``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name with an umlaut on an ASCII terminal is no error
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run())


if __name__ == "__main__":
    main()
