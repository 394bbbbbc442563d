"""Commands that make something: pretrain, eval, import."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslbench.commands.options import (
    AsJson,
    BackboneName,
    ConfigFile,
    DatasetName,
    Devices,
    DryRun,
    Endpoint,
    EvalName,
    LaunchId,
    Limit,
    MaxRestarts,
    Method,
    NodeRank,
    Nodes,
    Overrides,
    PeerTimeout,
    RecipeName,
    Session,
    complete,
    complete_recipe,
    compose_pretrain,
    named,
    run_directory,
)
from sslbench.errors import ConfigError
from sslbench.launch.environment import settle_environment
from sslbench.launch.request import LaunchRequest
from sslbench.terminal import prepare_environment

if TYPE_CHECKING:
    from sslbench.config.schema import TrainOptions


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
    devices: Devices = None,
    nnodes: Nodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Endpoint = None,
    launch_id: LaunchId = None,
    max_restarts: MaxRestarts = 3,
    peer_timeout: PeerTimeout = 600.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Pretrain a method, then run its evaluations."""
    session: Session = context.obj
    extra = named(method__name=method, dataset__name=dataset, backbone__name=backbone)
    extra += [f"train.limit={limit}"] if limit else []
    extra += ["run.evals=[]"] if no_evals else []
    items = [*extra, *(overrides or [])]
    request = LaunchRequest(devices, nnodes, node_rank, rdzv_endpoint, launch_id, max_restarts, peer_timeout)
    launching = not dry_run and request.starts_processes()
    if launching:
        _prepare_launch()
    elif not dry_run:
        _prepare_run()
    runs = [
        compose_pretrain(session, recipe, config, [*items, *seed], resume) for seed in _seed_options(seeds, resume)
    ]
    if dry_run:
        from sslbench.report.show import print_plan

        for composed, _ in runs:
            print_plan(composed, as_json)
        return
    if launching:
        raise typer.Exit(_launch(request, session, runs[0][0].core.train))
    from sslbench.engine.console import Console
    from sslbench.engine.worker import pretrain as run_pretraining
    from sslbench.launch.identity import run_of_launch
    from sslbench.launch.joining import joined_world
    from sslbench.launch.report import write_final_report
    from sslbench.report.show import print_outcome

    initial = run_directory(session, init_from) if init_from else None
    exit_code = 0
    with joined_world(runs[0][0].core.train, peer_timeout) as reports:
        for composed, resumed in runs:
            console = Console(quiet=not reports)
            begun = resumed or run_of_launch(
                session.runs, composed.hash(), composed.core.run.name, initial, composed.backbone
            )
            outcome = run_pretraining(
                composed, session.catalog, session.runs, console, resume=begun, init_from=initial
            )
            if reports:
                print_outcome(outcome, as_json)
            exit_code = exit_code or outcome.exit_code
    if exit_code:
        write_final_report("an evaluation failed; the model is trained")
        raise typer.Exit(exit_code)


def evaluate(
    context: typer.Context,
    protocol: EvalName,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run name, id or directory.")] = "last",
    overrides: Overrides = None,
    dataset: DatasetName = None,
    devices: Devices = None,
    nnodes: Nodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Endpoint = None,
    launch_id: LaunchId = None,
    max_restarts: MaxRestarts = 3,
    peer_timeout: PeerTimeout = 600.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a pretrained model: linear, knn, test, transfer, or a plugin's protocol."""
    session: Session = context.obj
    items = list(overrides or [])
    if "=" in run:  # the run was left out and the first option took its place
        items, run = [run, *items], "last"
    request = LaunchRequest(devices, nnodes, node_rank, rdzv_endpoint, launch_id, max_restarts, peer_timeout)
    launching = not dry_run and request.starts_processes()
    if launching:
        _prepare_launch()
    else:
        _prepare_run(records=not dry_run)
    from sslbench.engine.console import Console
    from sslbench.engine.evaluate import evaluate_run, plan_evaluation
    from sslbench.engine.stopping import stopping_at_once
    from sslbench.report.show import print_evaluation, print_tree

    plan = plan_evaluation(session.catalog, run_directory(session, run), protocol, dataset, items)
    if dry_run:
        print_tree(plan.tree(), as_json)
        return
    if launching:
        raise typer.Exit(_launch(request, session, plan.train))
    from sslbench.launch.joining import joined_world

    stopping = stopping_at_once("features computed so far are kept", "give the same command again")
    with joined_world(plan.train, peer_timeout) as reports, stopping:
        outcome = evaluate_run(plan, session.catalog, Console(quiet=not reports))
        if reports:
            print_evaluation(outcome, as_json)


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Weight file of another program, or backbone.pt of a run.")],
    overrides: Overrides = None,
    backbone: BackboneName = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Data set it was trained on; evaluations use it.", autocompletion=complete("dataset")),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How it was trained: backbone, data set, evaluation options.", autocompletion=complete_recipe
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
    items = named(backbone__name=backbone, dataset__name=dataset, run__name=name)
    _prepare_run()
    from sslbench.engine.console import Console
    from sslbench.engine.importing import import_weights, plan_import
    from sslbench.report.show import print_imported

    plan = plan_import(
        session.catalog,
        session.recipes() if recipe else session.registry(),
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


def _launch(request: LaunchRequest, session: Session, train: "TrainOptions") -> int:
    """Have several processes do the command."""
    from sslbench.launch.launcher import launch

    return launch(request, session.arguments, train, session.runs)


def _prepare_launch() -> None:
    """The same for a process that only starts others."""
    prepare_environment()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what is wrong is said by ourselves


def _prepare_run(*, records: bool = True) -> None:
    """What comes before the first import of torch: settings, and what can go on at the same time."""
    from sslbench.engine.machine import prepare_process
    from sslbench.tracking import prepare_store

    settle_environment()
    prepare_environment()
    prepare_process()
    if records:
        prepare_store()


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


COMMANDS: dict[str, Callable[..., None]] = {"pretrain": pretrain, "eval": evaluate, "import": import_}
