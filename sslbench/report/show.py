"""What commands print on stdout beside listings: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from sslbench.plugin.catalog import Catalog, Entry, Kind
from sslbench.report.listing import print_json
from sslbench.screen import Screen

if TYPE_CHECKING:
    from sslbench.config.compose import Composed
    from sslbench.config.registry import Registry
    from sslbench.config.schema import TrainOptions
    from sslbench.doctor.finding import Check
    from sslbench.engine.evaluate import EvalOutcome
    from sslbench.engine.importing import Imported
    from sslbench.engine.worker import Outcome
    from sslbench.report.compare import Verdict
    from sslbench.tracking import SyncReport


def out() -> Screen:
    """A console on stdout that never wraps when it is piped."""
    console = Screen()
    return console if console.is_terminal else Screen(width=200)


def _headed(name: str, rest: str) -> Text:
    """A bold name and what is said of it."""
    return Text.assemble((name, "bold"), f"  {rest}")


def show_plugin(catalog: Catalog, registry: Registry, kind: Kind, name: str, as_json: bool) -> None:
    """A plugin's origin, documentation, options and the recipes that use it."""
    from sslbench.report.describe import describe_options, nested_models

    plugin, chosen = catalog.choose(kind, name)
    entry = catalog.find(kind, plugin)
    cls = catalog.load(kind, plugin)
    options = [{**row, "default": chosen.get(row["key"], row["default"])} for row in describe_options(cls.Config)]
    recipes = [
        r
        for r, recipe in registry.recipes.items()
        if catalog.split(kind, str(recipe.config.get(kind, {}).get("name")))[0] == entry.name
    ]
    if as_json:
        facts = {**entry.identity(), "file": entry.path and str(entry.path), "kind": kind, "doc": cls.__doc__}
        print_json({**facts, "options": options, "recipes": recipes})
        return
    console = out()
    console.print(_headed(entry.name, f"{kind} of {entry.distribution} {entry.version}  ({entry.module})"))
    console.print(_origin(entry))
    console.print(_module_doc(cls))
    console.print(_option_table(f"options (write {_prefix(kind, entry.name)}KEY=VALUE)", options))
    for model in nested_models(cls.Config):
        console.print(_option_table(model.__name__, describe_options(model)))
    if recipes:
        console.print(f"recipes: {', '.join(recipes)}")


def _origin(entry: Entry) -> str:
    """Where its code lies and what it is, as runs record it."""
    known = entry.identity()
    lines = [f"file     {entry.path}", f"sha256   {known['sha256']}"]
    lines.append(f"package  {known['package_sha256']} ({known['covers']})")
    if known["git_commit"]:
        changed = ", with changes since" if known["git_modified"] == "true" else ""
        lines.append(f"git      {known['git_commit']}{changed}")
    return "\n".join(lines) + "\n"


def show_recipe(registry: Registry, name: str, as_json: bool) -> None:
    """A recipe, merged with those it extends, and its published results."""
    from sslbench.config.tree import merge

    name = registry.resolve(name)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, part in registry.recipe_chain(name):
        merge(merged, part.config, origin, origins)
    recipe = registry.recipes[name]
    references = [{**r.model_dump(), "origin": r.origin} for r in registry.references if r.recipe == name]
    if as_json:
        facts = {"name": name, "origin": recipe.origin, **recipe.model_dump()}
        print_json({**facts, "config": merged, "references": references})
        return
    console = out()
    console.print(_headed(name, f"{recipe.summary}\nof {recipe.origin}\nsource: {recipe.source}"))
    print_tree(merged, False)
    for row in references:
        mark = "" if row["verified"] else "  (not verified)"
        published = f"{row['metric']} = {row['value']} ± {row['tolerance']}{mark}"
        console.print(f"reference: {published}  {row['source']} [{row['origin']}]")


def print_tree(tree: Mapping[str, Any], as_json: bool) -> None:
    """A configuration as YAML."""
    import yaml

    from sslbench.config.tree import plain

    if as_json:
        print_json(plain(tree))
    else:
        print(yaml.safe_dump(plain(tree), sort_keys=False), end="")  # noqa: T201 - results go to stdout


def print_explained(composed: Composed, as_json: bool) -> None:
    """Every value with its origin."""
    from sslbench.config.tree import flatten
    from sslbench.report.describe import as_yaml

    rows = [
        {"key": key, "value": value, "origin": composed.origins.get(key, "default")}
        for key, value in flatten(composed.tree)
        if key != "recipe"
    ]
    if as_json:
        print_json({"config_hash": composed.hash(), "values": rows})
        return
    table = _table(f"configuration {composed.hash()}", "key", "value", "origin")
    for row in rows:
        style = "dim" if row["origin"] == "default" else None
        table.add_row(row["key"], as_yaml(row["value"]), row["origin"], style=style)
    out().print(table)


def print_plan(composed: Composed, as_json: bool) -> None:
    """What a pretraining command would do."""
    from sslbench.engine.schedule import peak_lr
    from sslbench.engine.setup import check_requirements
    from sslbench.report.describe import as_yaml

    check_requirements(composed)
    core = composed.core
    plan = {
        "method": composed.method.label,
        "dataset": composed.dataset.label,
        "backbone": composed.backbone.label,
        "recipe": composed.recipe,
        "epochs": core.train.epochs,
        "global batch": core.train.batch_size,
        "optimizer": core.optim.name,
        "learning rate": f"{peak_lr(core.optim, core.train.batch_size):.6g}"
        + (
            f" ({core.optim.lr:g} per {core.optim.lr_per} images, {core.optim.lr_rule})"
            if core.optim.lr_per
            else ""
        ),
        "step": _step_in_words(core.train),
        "views": sum(spec.count for spec in composed.method.cfg.views),  # type: ignore[attr-defined]
        "seed": core.run.seed,
        "evaluations": list(core.run.evals),
        "config hash": composed.hash(),
    }
    if as_json:
        print_json({"plan": plan, "config": composed.tree})
        return
    for key, value in plan.items():
        shown = value if isinstance(value, str) else as_yaml(value)
        out().print(f"{key:>14}  {'-' if value is None else shown}")
    out().print(f"{'cost':>14}  sslbench plan with the same options predicts memory, hours and traffic")


def _step_in_words(train: TrainOptions) -> str:
    """How a step is computed, where it is not the plain way."""
    words = [f"precision {train.precision}", f"{train.parallel} on several devices"]
    words += [f"gradient of {train.accumulate} parts"] if train.accumulate > 1 else []
    words += ["activations computed again"] if train.checkpoint_activations else []
    words += ["compiled"] if train.compile else []
    return ", ".join(words)


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """The result of a pretraining command."""
    if as_json:
        print_json(dataclasses.asdict(outcome))
        return
    console = out()
    console.print()
    console.print(_headed(outcome.name, f"{outcome.steps} steps, {outcome.seconds:.0f} s"))
    if outcome.evals:
        console.print(_eval_table(outcome.evals))
    console.print(f"run directory  {outcome.run_dir}")
    console.print("next           sslbench compare   or   mlflow ui")


def print_evaluation(outcome: EvalOutcome, as_json: bool) -> None:
    """The result of one evaluation."""
    if as_json:
        print_json(dataclasses.asdict(outcome))
        return
    console = out()
    console.print(_eval_table([outcome, *outcome.children]))
    console.print(f"files  {outcome.out_dir}   ({outcome.seconds:.1f} s)")


def print_imported(outcome: Imported, as_json: bool) -> None:
    """What was taken from a foreign file and what was left."""
    if as_json:
        print_json(dataclasses.asdict(outcome))
        return
    left = ", ".join(f"{what} ({count})" for what, count in outcome.ignored.items()) or "nothing"
    console = out()
    console.print(_headed(outcome.name, f"{outcome.method}, layout {outcome.layout}"))
    console.print(f"{outcome.tensors} of {outcome.expected} tensors, ignored: {left}")
    if outcome.filled:
        console.print(
            f"{outcome.filled} batch counters are not in the file and begin at 0; features do not use them"
        )
    console.print(f"evaluations show it images of {outcome.image_size} pixels, unless size=N says otherwise")
    console.print(f"run directory  {outcome.run_dir}")
    console.print(f"next           sslbench eval linear {outcome.name} --dataset NAME")


def print_checks(checks: Sequence[Check], as_json: bool) -> None:
    """The findings of ``doctor``, by section, with what to type where something is wrong."""
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
        return
    marks = {"ok": ("ok  ", "green"), "warning": ("warn", "yellow"), "failure": ("FAIL", "red")}
    console = out()
    for section, found in groupby(checks, key=lambda check: check.section):
        console.print(Text(section, style="bold"))
        for check in found:
            console.print(Text.assemble("  ", marks[check.level], f" {check.name:<28} {check.detail}"))
            if check.advice:
                console.print(Text(textwrap.indent(f"next: {check.advice}", " " * 36), style="dim"))
    count = Counter(check.level for check in checks)
    warnings, failures = (f"{count[level]} {level}{'s' * (count[level] != 1)}" for level in ("warning", "failure"))
    console.print(f"{count['ok']} ok, {warnings}, {failures}")


def print_comparison(root: Path, selectors: Sequence[str], registry: Registry | None, as_json: bool) -> None:
    """The comparison table; with a registry, each row against its recipe's published results as well."""
    from sslbench.report.compare import compare, judge
    from sslbench.report.results import load_results
    from sslbench.report.table import render_table, render_verdicts, to_json

    comparison = compare(load_results(root, selectors))
    verdicts = judge(comparison, registry.references) if registry else []
    if as_json:
        judged = [_judged(v) for v in verdicts]
        print_json({**to_json(comparison), "verdicts": judged})
        return
    if not (comparison.rows or comparison.remarks):
        out().print(f"there is no run in {root} to compare; train one: sslbench pretrain --method simclr")
        return
    out().print(render_table(comparison))
    if registry:
        out().print(render_verdicts(verdicts))


def _judged(verdict: Verdict) -> dict[str, Any]:
    reference = verdict.reference
    facts = {"recipe": verdict.row.recipe, **reference.model_dump(), "origin": reference.origin}
    return {**facts, "verdict": verdict.verdict}


def print_sync(report: SyncReport) -> None:
    """What a synchronisation sent, children included."""
    console = out()
    for part in (report, *report.children):
        state = "complete" if part.error is None else f"not complete: {part.error}"
        console.print(f"{part.name}: {part.points} values sent, {state}")
        for note in part.notes:
            console.print(f"  {note}", soft_wrap=True)
        for refused in part.refused:
            console.print(f"  refused by the store: {refused}")


def _eval_table(outcomes: Sequence[EvalOutcome]) -> Table:
    table = _table(None, "protocol", "data set", "metric", "value")
    for outcome in outcomes:
        for number, (name, value) in enumerate(outcome.metrics.items()):
            head = (f"{outcome.protocol} v{outcome.version}", outcome.dataset) if number == 0 else ("", "")
            style = "bold" if name == outcome.primary else None
            table.add_row(*head, name, f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}", style=style)
    return table


def _option_table(title: str, options: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("key", "type", "default", "meaning")
    table = _table(title, *columns)
    for row in options:
        table.add_row(*(str(row[column]) for column in columns))
    return table


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _prefix(kind: Kind, name: str) -> str:
    return f"evals.{name}." if kind == "eval" else f"{kind}."


def _module_doc(cls: type[Any]) -> str:
    import inspect

    module = inspect.getmodule(cls)
    return inspect.cleandoc((module.__doc__ if module else None) or cls.__doc__ or "")
