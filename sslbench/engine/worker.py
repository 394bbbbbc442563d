"""Wires a pretraining run together: configuration, parts, loop, checkpoints, tracking, evaluations."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from sslbench import comm
from sslbench.config.compose import Composed, differences_from_saved
from sslbench.config.schema import TrainOptions
from sslbench.data.store import DecodedStore
from sslbench.engine import checkpoint
from sslbench.engine.checkpoint import CheckpointMeta
from sslbench.engine.console import Console
from sslbench.engine.evaluate import EvalOutcome, evaluate_run, finished_result, plan_after_pretraining
from sslbench.engine.loop import Loop, Meter
from sslbench.engine.observe import Extensions, RunObserver, took_part
from sslbench.engine.optim import build_optimizer
from sslbench.engine.precision import loss_scaler
from sslbench.engine.schedule import peak_lr
from sslbench.engine.setup import Parts, Start, build_parts, initial_weights, prepare_torch, shards_parameters
from sslbench.engine.stopping import StopSignal, stopped_by, stopping_at_once
from sslbench.engine.trained import Trained
from sslbench.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    PreemptedError,
    SslbenchError,
    described,
)
from sslbench.launch.environment import launch_words
from sslbench.launch.identity import TAG, launch_id
from sslbench.launch.recording import open_tracker
from sslbench.plugin.catalog import Catalog
from sslbench.rng import derive_seed
from sslbench.tracking import RunRecord, Tracker
from sslbench.tracking.plugins import Identities


@dataclass
class Outcome:
    """What a pretraining command achieved."""

    run_dir: Path
    run_id: str
    name: str
    steps: int
    seconds: float
    evals: list[EvalOutcome] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Evaluations that failed; the model and the other evaluations are kept."""
    exit_code: int = 0


def pretrain(
    composed: Composed,
    catalog: Catalog,
    root: Path,
    console: Console,
    *,
    resume: Path | None = None,
    init_from: Path | None = None,
) -> Outcome:
    """Pretrain and evaluate.

    Args:
        root: folder of the run directories.
        resume: run directory to continue exactly.
        init_from: run directory whose backbone weights are the start.

    Raises:
        SslbenchError: after the run is closed with its final status and error.json is written.
    """
    started = time.monotonic()
    prepare_torch(composed.core.train)
    if resume is not None:
        _check_same_config(composed, resume)
    with stopping_at_once("training had not begun", "give the same command again"):
        start = _read_start(init_from, catalog, console) if init_from else None
        restored = resume is not None and comm.on_first_rank(partial(_has_checkpoint, resume))
        initial = "" if restored else initial_weights(composed.backbone, start)
        if resume is not None and not restored:
            _check_same_start(initial, resume)
        parts = build_parts(_drawn(composed) if restored or start else composed, console.info, start)
        if resume is not None:
            _warn_of_other_arithmetic(parts, resume, console)
        observers = catalog.extensions()
        plugins = took_part(composed, catalog, observers) if comm.rank() == 0 else []
        tracker = _open_tracker(composed, parts, root, console, resume, initial, plugins)
    if comm.rank() == 0:
        console.info(_introduction(composed, parts, tracker))
    stop = StopSignal()
    extensions = Extensions(observers, tracker, console)
    again = f"sslbench pretrain --resume {shlex.quote(tracker.name)}{launch_words()}"
    rest = f"{again}   runs the evaluations that are left"
    with stop.listening():
        try:
            with tracker.closing():
                steps = _train(composed, catalog, parts, tracker, console, stop, extensions, resume)
        finally:
            extensions.tell("sslbench_run_finished", status=RunRecord.load(tracker.run_dir).status)
        if stop.agreed_at_the_end():
            raise stopped_by(stop.received, "training is complete, the model is kept", rest)
        outcome = Outcome(tracker.run_dir, tracker.run_id, tracker.name, steps, time.monotonic() - started)
        with stopping_at_once("the model and finished evaluations are kept", rest):
            _evaluate(composed, catalog, parts, outcome, console)
    return outcome


def _train(
    composed: Composed,
    catalog: Catalog,
    parts: Parts,
    tracker: Tracker,
    console: Console,
    stop: StopSignal,
    extensions: Extensions,
    resume: Path | None,
) -> int:
    """Run the loop to its end and return the number of steps done."""
    core = composed.core
    optimizer = build_optimizer(core.optim, parts.method.param_groups(), parts.method, core.train.batch_size)
    trained = Trained(parts.method, optimizer, loss_scaler(parts.precision, parts.device))
    observer = RunObserver(composed, catalog, parts, trained, tracker, console, stop, extensions)
    extensions.tell("sslbench_run_started", config=composed.tree)
    if parts.loader is None or parts.plan is None:
        with observer:
            observer.save(0, Meter().state())
        return 0
    meter = _restore(parts, trained, resume, observer) if resume else None
    if resume:
        tracker.rewind(parts.plan.start_step)
        observer.catch_up(parts.plan.start_step)
        observer.note_rollbacks()
    if parts.plan.start_step >= parts.plan.stop_step:
        console.info(f"The run has all its {parts.plan.start_step} steps already.")
        return parts.plan.start_step
    model = trained.distribute(parts.device, sharded=shards_parameters(core.train))
    try:
        with observer:
            if core.train.rollback and parts.plan.start_step == 0:
                observer.save(0, Meter().state())
            while (complete := _loop(parts, trained, model, observer, meter)) is None:
                meter = _restore(parts, trained, tracker.run_dir, observer)
                tracker.rewind(parts.plan.start_step)
                observer.note_rollbacks()
    except DivergedError as error:
        raise _cure(error, composed, tracker) from error
    if not complete:
        hint = f"sslbench pretrain --resume {shlex.quote(tracker.name)}{launch_words()}"
        raise stopped_by(stop.received, "the state is saved", hint)
    return parts.plan.stop_step


def _loop(
    parts: Parts, trained: Trained, model: torch.nn.Module, observer: RunObserver, meter: Meter | None
) -> bool | None:
    """Train until the end (True), a signal (False) or a divergence that is rolled back (None)."""
    assert parts.plan is not None
    assert parts.loader is not None
    loop = Loop(
        model=model,
        method=parts.method,
        optimizer=trained.optimizer,
        loader=parts.loader,
        plan=parts.plan,
        observer=observer,
        device=parts.device,
        precision=parts.precision,
        scaler=trained.scaler,
        shards=trained.shards,
        meter=meter,
        lr_factor=observer.rollbacks.factor,
    )
    observer.console.begin(parts.method.name, parts.plan.start_step, parts.plan.stop_step)
    try:
        return loop.run()
    except DivergedError as error:
        if not observer.rolls_back(error):
            raise
        trained.optimizer.zero_grad(set_to_none=True)
        return None
    finally:
        observer.console.end()


def _cure(error: DivergedError, composed: Composed, tracker: Tracker) -> DivergedError:
    """Name what is left of a diverged run and the command that starts it again."""
    kept = checkpoint.good_before(tracker.run_dir, error.step)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there was no good checkpoint yet"
    command = (
        f"sslbench pretrain --config {tracker.run_dir / 'config.yaml'} optim.lr={composed.core.optim.lr / 10:g}"
    )
    name = shlex.quote(tracker.name)
    again = f"sslbench pretrain --resume {name} train.rollback={composed.core.train.rollback + 1}"
    start = f"; from the last checkpoint on: {again} train.rollback_factor=0.1{launch_words()}" if kept else ""
    return DivergedError(f"{error.message}; {last}", hint=f"{command}{launch_words()}{start}, or {error.hint}")


def _restore(parts: Parts, trained: Trained, run_dir: Path, observer: RunObserver) -> Meter | None:
    """Bring method and optimiser to where the run was; without a checkpoint yet, to its beginning."""
    console = observer.console
    path = comm.on_first_rank(lambda: _checkpoint_of(run_dir, observer))
    if path is None:
        console.info("The run has no checkpoint yet: it begins again with its first step.")
        return None
    _check_same_images(parts, checkpoint.read_meta(path, verify=False), run_dir)
    state = checkpoint.load_tensors(path / checkpoint.STATE)
    assert parts.plan is not None
    try:
        trained.load(state)
        parts.plan.start_step = int(state["step"])
        meter = Meter.restore(state["meter"], parts.device)
        observer.rollbacks.begin(state.get("rollbacks", ()), parts.plan.start_step)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / checkpoint.STATE} does not fit this run: {checkpoint.details(error)}",
            hint="was the method or backbone plugin changed since? sslbench info shows the installed versions",
        ) from error
    console.info(f"Resuming after step {parts.plan.start_step} from {path}")
    return meter


def _checkpoint_of(run_dir: Path, observer: RunObserver) -> Path | None:
    """The one to go on from. One rank looks: another may see a shared folder as it was a moment ago."""
    if not checkpoint.list_checkpoints(run_dir):
        return None
    return checkpoint.latest(run_dir, observer.console.warn, before=observer.rollbacks.before)


def _check_same_images(parts: Parts, meta: CheckpointMeta, run_dir: Path) -> None:
    """Paths are not part of the configuration's hash, so another data set may lie where the old one was."""
    if parts.dataset.fingerprint() != meta.dataset_fingerprint:
        raise DataError(
            f"--resume {RunRecord.load(run_dir).name}: the images or labels of '{parts.dataset.key}' are not "
            "those the run began with",
            hint="bring the data back, or start a new run with --init-from",
        )


def _read_start(run_dir: Path, catalog: Catalog, console: Console) -> Start:
    """The exported weights of another run."""
    backbone, meta = checkpoint.load_backbone(
        checkpoint.latest(run_dir, console.warn, [checkpoint.BACKBONE]), catalog
    )
    name = RunRecord.load(run_dir).name
    return Start(name, meta.backbone.name, backbone.state_dict(), meta.sha256[checkpoint.BACKBONE])


def _check_same_config(composed: Composed, run_dir: Path) -> None:
    rows = differences_from_saved(composed, run_dir / "config.yaml")
    if rows:
        listed = "\n".join(f"  {row}" for row in rows)
        raise ConfigError(
            f"--resume {RunRecord.load(run_dir).name}: these options differ from the run's own\n{listed}",
            hint="drop them to continue this run, or start a new one with --init-from",
        )


def _has_checkpoint(run_dir: Path) -> bool:
    return bool(checkpoint.list_checkpoints(run_dir))


def _drawn(composed: Composed) -> Composed:
    """The same to build from, with a backbone that reads no weights, since all of them follow."""
    chosen = composed.backbone
    return replace(composed, backbone=replace(chosen, cfg=chosen.cls.without_weights(chosen.cfg)))


def _check_same_start(initial: str, run_dir: Path) -> None:
    """Without a checkpoint, a run that began with weights of another one or of a file needs them again."""
    record = RunRecord.load(run_dir)
    if record.tags.get("sslbench.start", "") != initial:
        raise ConfigError(
            f"--resume {record.name}: it has no checkpoint yet and did not begin with these weights",
            hint="give the same --init-from (or file of weights) as when it began, or none if there was none",
        )


def _arithmetic_tags(parts: Parts) -> dict[str, str]:
    """What decides about the last bits and is chosen for the machine, not by options alone."""
    if parts.loader is None:
        return {"sslbench.precision": "fp32"}
    layout = "channels-last" if parts.loader.views.memory_format == torch.channels_last else "contiguous"
    return {
        "sslbench.precision": parts.precision,
        "sslbench.layout": layout,
        "sslbench.pixels": "workers" if isinstance(parts.loader.store, DecodedStore) else "memory",
    }


_CAUSES = {
    "sslbench.precision": "train.precision",
    "sslbench.layout": "train.channels_last",
    "sslbench.pixels": "data.resident",
}


def _apart(options: TrainOptions) -> tuple[int, ...]:
    """The number of processes, where results depend on it."""
    return (comm.world(),) if options.sync_bn is not True and comm.world() > 1 else ()


def _warn_of_other_arithmetic(parts: Parts, resume: Path, console: Console) -> None:
    """A run that goes on elsewhere may round differently; whoever wants the same bits is told how to get them."""
    before = RunRecord.load(resume).tags
    for tag, now in _arithmetic_tags(parts).items():
        if (then := before.get(tag, now)) != now:
            name = tag.removeprefix("sslbench.")
            console.warn(f"the run began with {name} {then} and goes on with {now}: see {_CAUSES[tag]}")


def _introduction(composed: Composed, parts: Parts, tracker: Tracker) -> str:
    """What is about to run, for whoever reads the terminal or a log file."""
    what = f"{composed.method.name} with {composed.backbone.label} on {parts.dataset.key}"
    head = f"Run {tracker.name}: {what}\n  {tracker.run_dir}"
    if parts.loader is None or parts.plan is None:
        return head
    core = composed.core
    epochs = "1 epoch" if core.train.epochs == 1 else f"{core.train.epochs} epochs"
    amount = f"{epochs} of {parts.loader.num_images} images, {parts.plan.steps} steps"
    rate = f"{core.optim.name} at {peak_lr(core.optim, core.train.batch_size):.4g}"
    return f"{head}\n  {amount} of {core.train.batch_size}; {rate}; {_arithmetic(parts)}"


def _arithmetic(parts: Parts) -> str:
    layout = parts.loader is not None and parts.loader.views.memory_format == torch.channels_last
    words = [f"{parts.device} in {parts.precision}", *(["channels-last"] if layout else [])]
    if parts.device.type == "cpu":
        threads = torch.get_num_threads()
        words.append(f"{threads} thread{'s' if threads > 1 else ''}")
    return ", ".join(words)


def _open_tracker(
    composed: Composed,
    parts: Parts,
    root: Path,
    console: Console,
    resume: Path | None,
    start: str,
    plugins: Identities,
) -> Tracker:
    """``start`` identifies the weights the run starts from, if it does not draw them."""
    core = composed.core
    fingerprint = parts.dataset.fingerprint()
    precision = parts.precision
    # Runs whose results may be averaged differ by chance only: also the same images, start and precision.
    group = (composed.group_hash(), fingerprint, start, precision, *_apart(core.train))
    tags = {
        "sslbench.method": composed.method.label,
        "sslbench.dataset": parts.dataset.key,
        "sslbench.backbone": composed.backbone.label,
        "sslbench.seed": str(core.run.seed),
        "sslbench.epochs": str(core.train.epochs if composed.method.cls.trains else 0),
        "sslbench.recipe": composed.recipe or "",
        "sslbench.config_hash": composed.hash(),
        "sslbench.group_hash": f"{derive_seed(*group):016x}",
        "sslbench.start": start,
        **_arithmetic_tags(parts),
        "sslbench.world": str(comm.world()),
        **({TAG: identity} if (identity := launch_id()) else {}),
        "sslbench.limited": str(core.train.limit is not None).lower(),
        "sslbench.uses_labels": str(composed.method.cls.uses_labels).lower(),
    }
    tracker = open_tracker(
        root=root,
        name=core.run.name or _default_name(composed, parts),
        kind="pretrain",
        experiment=core.run.experiment or parts.dataset.key,
        tracking_uri=core.run.tracking_uri,
        parent=None,
        params=composed.tree,
        tags=tags,
        log=console.info,
        plugins=plugins,
        resume=resume,
    )
    tracker.dataset(parts.dataset.key, fingerprint, "pretraining")
    return tracker


def _default_name(composed: Composed, parts: Parts) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    words = (composed.method.name, parts.dataset.key, composed.backbone.label, f"s{composed.core.run.seed}", stamp)
    return "-".join(words).replace("/", "_").replace(":", "_")


def _evaluate(composed: Composed, catalog: Catalog, parts: Parts, outcome: Outcome, console: Console) -> None:
    """Run the configured evaluations; one that fails does not stop the others."""
    for name in composed.core.run.evals:
        try:
            plan = plan_after_pretraining(composed, catalog, parts.dataset, outcome.run_dir, name)
            if isinstance(plan, str):
                console.info(f"Skipped {name}: {plan}")
                continue
            known = comm.on_first_rank(partial(finished_result, plan, parts.dataset.key))
            outcome.evals.append(known or evaluate_run(plan, catalog, console))
        except PreemptedError:
            raise
        except Exception as error:
            unforeseen = comm.world() > 1 and not isinstance(error, SslbenchError)
            if unforeseen or comm.is_lost_contact(error):
                raise  # the next one needs the same processes, which may still be at this one
            outcome.failed.append(name)
            outcome.exit_code = _report_failure(name, error, outcome, console)


def _report_failure(name: str, error: Exception, outcome: Outcome, console: Console) -> int:
    known = described(error)
    again = known.hint or f"sslbench eval {name} {outcome.name}"
    console.warn(f"{name} failed: {known.message} (next: {again}). The model and other evaluations are kept.")
    return int(known.exit_code)
