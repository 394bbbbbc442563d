"""Evaluations: from a run and a protocol's name to a child run with its result."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslbench import comm
from sslbench.config.compose import Composed, read_config_file
from sslbench.config.options import Options
from sslbench.config.renaming import with_current_keys, with_current_plugins
from sslbench.config.schema import DataOptions, TrainOptions
from sslbench.config.tree import Tree, parse_overrides, plain
from sslbench.config.validate import validate_section
from sslbench.engine import checkpoint
from sslbench.engine.console import Console
from sslbench.engine.observe import identity_of
from sslbench.engine.rollback import TAG
from sslbench.engine.setup import choose_device
from sslbench.errors import ConfigError, described
from sslbench.evaluation.job import EvaluationJob, evaluation_dir, run_protocol
from sslbench.evaluation.rules import check_task, task_misfit
from sslbench.launch.recording import open_tracker
from sslbench.plugin.api import Dataset, EvalProtocol
from sslbench.plugin.catalog import Catalog
from sslbench.report.compare import compare
from sslbench.report.results import load_results
from sslbench.report.table import overview
from sslbench.tracking import ParentRef, RunRecord, Tracker, describe_experiment, headline
from sslbench.tracking.plugins import Identities

logger = logging.getLogger(__name__)

FEATURE_CACHE = ".features"
RESULT = "result.json"
_SECTIONS = ("dataset", "data", "train")


@dataclass(frozen=True)
class EvalPlan:
    """One evaluation that is about to run."""

    run_dir: Path
    record: RunRecord
    protocol: EvalProtocol
    dataset_name: str
    dataset_class: type[Dataset]
    dataset_options: Any
    data: DataOptions
    train: TrainOptions
    seed: int

    def tree(self) -> Tree:
        """The complete configuration of the evaluation."""
        return {
            "run": str(self.run_dir),
            "protocol": {
                "name": self.protocol.name,
                "version": self.protocol.version,
                **plain(self.protocol.cfg),
            },
            "dataset": {"name": self.dataset_name, **plain(self.dataset_options)},
            "data": plain(self.data),
            "train": {"device": self.train.device},
        }


@dataclass(frozen=True)
class EvalOutcome:
    """The result of one evaluation."""

    protocol: str
    version: int
    dataset: str
    metrics: dict[str, float]
    primary: str
    out_dir: Path
    seconds: float
    children: list[EvalOutcome] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Prefix of its metrics on the pretraining run."""
        return f"eval/{self.protocol}.v{self.version}/{self.dataset}"

    def headline(self) -> dict[str, float]:
        """Its metrics under the names they have on the pretraining run."""
        return {f"{self.key}/{name}": value for name, value in self.metrics.items()}


def plan_evaluation(
    catalog: Catalog, run_dir: Path, protocol: str, dataset: str | None, items: list[str]
) -> EvalPlan:
    """Compose an evaluation of a finished run.

    Args:
        dataset: another data set than the one the run was pretrained on.
        items: ``key=value`` options; keys that start with ``dataset.``, ``data.`` or ``train.`` address these
            sections, all others the protocol.

    Raises:
        ConfigError: with every problem found.
    """
    given = parse_overrides(items)
    sections = {name: _section(given.pop(name, {}), name) for name in _SECTIONS}
    if dataset:
        sections["dataset"]["name"] = dataset
    return _plan(catalog, run_dir, protocol, sections, given, "command line")


def plan_after_pretraining(
    composed: Composed, catalog: Catalog, dataset: Dataset, run_dir: Path, protocol: str
) -> EvalPlan | str:
    """Plan one of the recipe's evaluations, or say why it does not apply to this data set."""
    cls = catalog.load("eval", protocol)
    if dataset.info.task == "unlabelled":
        return f"{dataset.key} has no labels; name a labelled one: sslbench eval {protocol} RUN --dataset NAME"
    misfit = task_misfit(cls, dataset)
    if misfit:
        return misfit
    if len(dataset.info.classes) < 2:
        return f"{dataset.key} has one class only: {dataset.info.classes[0]}"
    if "test" in cls.splits and "test" not in dataset.info.splits:
        return f"{dataset.key} has no test split"
    return _plan(catalog, run_dir, protocol, {name: {} for name in _SECTIONS}, {}, "recipe")


def finished_result(plan: EvalPlan, dataset_key: str) -> EvalOutcome | None:
    """The result that this very evaluation of the newest checkpoint has already, such as before a resume.

    One rank asks.
    """
    out_dir = evaluation_dir(plan.run_dir, plan.protocol.name, plan.protocol.subject(dataset_key))
    try:
        found = json.loads((out_dir / RESULT).read_text(encoding="utf-8"))
        newest = checkpoint.read_meta(checkpoint.list_checkpoints(plan.run_dir)[-1], verify=False)
        same = found["config"] == json.loads(json.dumps(plan.tree()))
        if not same or found["checkpoint_sha256"] != newest.sha256[checkpoint.BACKBONE]:
            return None
        outcome = EvalOutcome(
            found["protocol"],
            found["version"],
            found["dataset"],
            found["metrics"],
            found["primary"],
            out_dir,
            found["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    # It may be missing when the process was killed right after writing the result.
    headline(plan.run_dir, outcome.headline(), step=newest.step, log=logger.info)
    return outcome


def evaluate_run(plan: EvalPlan, catalog: Catalog, console: Console) -> EvalOutcome:
    """Run an evaluation as a child run and put its headline on the pretraining run.

    Raises:
        SslbenchError: after the child run is closed as FAILED.
    """
    started = time.monotonic()
    # What only training needs may be damaged.
    newest = comm.on_first_rank(lambda: checkpoint.latest(plan.run_dir, console.warn, [checkpoint.BACKBONE]))
    backbone, meta = checkpoint.load_backbone(newest, catalog)
    dataset = plan.dataset_class(plan.dataset_options)
    check_task(plan.protocol, dataset)
    subject = plan.protocol.subject(dataset.key)
    out_dir = evaluation_dir(plan.run_dir, plan.protocol.name, subject)
    plugins = _took_part(plan, meta, catalog) if comm.rank() == 0 else []
    tracker = _open_tracker(plan, dataset, console, plugins)
    children: list[EvalOutcome] = []

    def run_child(
        protocol: str, name: str, dataset_options: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, float]:
        sections: dict[str, Tree] = {
            "dataset": {"name": name, **dataset_options},
            "data": plain(plan.data),
            "train": {"device": plan.train.device},
        }
        child = _plan(catalog, plan.run_dir, protocol, sections, dict(options), plan.protocol.name)
        children.append(evaluate_run(child, catalog, console))
        return children[-1].metrics

    if plan.record.moved_from:
        console.info(f"{plan.record.name} was in {plan.record.moved_from}; recorded in {plan.record.tracking_uri}")
    console.info(f"Evaluating {plan.protocol.name} v{plan.protocol.version} on {subject}")
    with tracker.closing():
        job = EvaluationJob(
            plan.protocol,
            backbone,
            dataset,
            image_size=meta.backbone.image_size,
            data=plan.data,
            seed=plan.seed,
            device=choose_device(plan.train),
            run_dir=plan.run_dir,
            out_dir=out_dir,
            cache_dir=Path(plan.record.root) / FEATURE_CACHE,
            log=tracker.log,
            run_child=run_child,
            dataset_key=dataset.key,
        )
        metrics = run_protocol(plan.protocol, job)
        outcome = EvalOutcome(
            plan.protocol.name,
            plan.protocol.version,
            subject,
            metrics,
            plan.protocol.primary,
            out_dir,
            time.monotonic() - started,
            children,
        )
        tracker.summary(metrics)
        report = _result(plan, outcome, dataset, meta, tracker.run_id)
        job.write_report(RESULT, report | {"unreadable": job.unreadable, "built_on": job.built_on})
    if comm.rank() == 0:
        headline(plan.run_dir, outcome.headline(), step=meta.step, log=console.info)
        _update_overview(plan, console)
    return outcome


def _update_overview(plan: EvalPlan, console: Console) -> None:
    """The comparison of all models of the experiment, above its list of runs in MLflow."""
    root = Path(plan.record.root)
    try:
        same = [result for result in load_results(root) if result.experiment == plan.record.experiment]
        describe_experiment(plan.run_dir, overview(compare(same)), log=console.info)
    except Exception as error:  # noqa: BLE001 - the damaged files of another run must not fail this evaluation
        console.warn(f"the overview in MLflow was not brought up to date: {described(error).message}")


def _plan(
    catalog: Catalog,
    run_dir: Path,
    protocol: str,
    sections: Mapping[str, Tree],
    options: Tree,
    origin: str,
) -> EvalPlan:
    protocol = catalog.current_name("eval", protocol)
    cls = catalog.load("eval", protocol)
    file = read_config_file(run_dir / "config.yaml")
    saved = with_current_plugins(file.values, ("dataset",), catalog)
    of_run = dict(saved.get("dataset", {}))
    asked = dict(sections["dataset"])
    name = asked.pop("name", of_run.get("name"))
    if name is None:  # imported weights that came without one
        raise ConfigError(
            f"the run {RunRecord.load(run_dir).name} has no data set of its own",
            hint=f"name one: sslbench eval {protocol} RUN --dataset NAME",
        )
    name, selected = catalog.choose("dataset", str(name))
    same = all(str(of_run.get(key)) == value for key, value in {"name": name, **selected}.items())
    base = of_run if same else {}
    dataset_class = catalog.load("dataset", name)
    kept = {key: value for key, value in base.items() if key != "name"}

    def validated(model: type[Options], section: str, of_file: Any, given: Tree) -> Any:
        """The run's own options below those of the command line, each under their current names."""
        below = with_current_keys(model, of_file or {}, section, file.origin)
        above = with_current_keys(model, given, section, origin)
        return validate_section(model, {**below, **above}, section, origin)

    train = {"device": saved["train"]["device"], **sections["train"]}
    return EvalPlan(
        run_dir=run_dir,
        record=RunRecord.load(run_dir),
        protocol=cls(validated(cls.Config, "", saved.get("evals", {}).get(protocol), options)),
        dataset_name=name,
        dataset_class=dataset_class,
        dataset_options=validated(dataset_class.Config, "dataset", kept, {**selected, **asked}),
        data=validated(DataOptions, "data", saved.get("data"), sections["data"]),
        train=validate_section(TrainOptions, train, "train", origin),
        seed=int(saved["run"]["seed"]),
    )


def _section(values: Any, name: str) -> Tree:
    if not isinstance(values, dict):
        raise ConfigError(f"'{name}' is a section", hint=f"write {name}.KEY=VALUE")
    return dict(values)


def _took_part(plan: EvalPlan, meta: checkpoint.CheckpointMeta, catalog: Catalog) -> Identities:
    return [
        identity_of(catalog, "eval", plan.protocol.name),
        identity_of(catalog, "dataset", plan.dataset_name),
        identity_of(catalog, "backbone", meta.backbone.name),
    ]


def _open_tracker(plan: EvalPlan, dataset: Dataset, console: Console, plugins: Identities) -> Tracker:
    inherited = ("sslbench.method", "sslbench.backbone", "sslbench.limited", "sslbench.config_hash", TAG)
    tags = {key: plan.record.tags[key] for key in inherited if key in plan.record.tags}
    tags |= {
        "sslbench.dataset": plan.protocol.subject(dataset.key),
        "sslbench.seed": str(plan.seed),
        "sslbench.protocol": f"{plan.protocol.name}.v{plan.protocol.version}",
    }
    fingerprint = dataset.fingerprint()
    tracker = open_tracker(
        root=Path(plan.record.root),
        name=f"{plan.protocol.name}-{plan.protocol.subject(dataset.key)}-of-{plan.record.name}",
        kind="eval",
        experiment=plan.record.experiment,
        tracking_uri=plan.record.tracking_uri,
        parent=ParentRef(plan.record.run_id, plan.run_dir),
        params=plan.tree(),
        tags=tags,
        log=console.info,
        plugins=plugins,
    )
    tracker.dataset(dataset.key, fingerprint, plan.protocol.name)
    return tracker


def _result(
    plan: EvalPlan, outcome: EvalOutcome, dataset: Dataset, meta: checkpoint.CheckpointMeta, run_id: str
) -> dict[str, Any]:
    return {
        "protocol": outcome.protocol,
        "version": outcome.version,
        "dataset": outcome.dataset,
        "dataset_fingerprint": dataset.fingerprint(),
        "metrics": outcome.metrics,
        "directions": dict(plan.protocol.metrics),
        "primary": outcome.primary,
        "checkpoint_step": meta.step,
        "checkpoint_sha256": meta.sha256[checkpoint.BACKBONE],
        "limited": meta.limited,
        "rolled_back": plan.record.tags.get(TAG, ""),
        "seed": plan.seed,
        "config": plan.tree(),
        "run_id": run_id,
        "seconds": outcome.seconds,
        "time": time.time(),
    }
