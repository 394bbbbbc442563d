"""The comparison: what is averaged, what is kept apart, what is left out."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sslbench.config.registry import Reference
from sslbench.errors import SslbenchError
from sslbench.report.compare import compare, judge
from sslbench.report.results import load_results
from sslbench.report.table import overview, render_table, render_verdicts, to_csv, to_json, to_markdown

KEY = "eval/test.v1/toy/top1"


def write_run(
    root: Path,
    *,
    method: str = "byol",
    seed: int = 1,
    top1: float | None = 70.0,
    lr: float = 0.1,
    status: str = "FINISHED",
    started: float = 1.0,
    limited: bool = False,
    uses_labels: bool = False,
    **result: Any,
) -> Path:
    name = f"{method}-s{seed}-{started:g}-{lr:g}-{status}-{limited}"
    run_dir = root / "toy" / name / "artifacts"
    run_dir.mkdir(parents=True)
    tags = {"method": method, "seed": seed, "backbone": "conv4", "dataset": "toy", "epochs": 5}
    tags |= {"group_hash": f"{method}{lr}", "limited": str(limited).lower(), "recipe": f"{method}/toy"}
    tags |= {"uses_labels": str(uses_labels).lower()}
    record = {
        "run_id": name,
        "name": name,
        "kind": "pretrain",
        "status": status,
        "started": started,
        "tags": {f"sslbench.{key}": str(value) for key, value in tags.items()},
        "params": {"method.name": method, "optim.lr": str(lr), "run.seed": str(seed)},
    }
    (run_dir / "run.json").write_text(json.dumps(record))
    if top1 is not None:
        write_result(run_dir, top1, **result)
    return run_dir


def write_result(run_dir: Path, top1: float, protocol: str = "test", **changes: Any) -> None:
    content = {
        "protocol": protocol,
        "version": 1,
        "dataset": "toy",
        "dataset_fingerprint": "abcdef0123",
        "metrics": {"top1": top1, "top5": 99.0},
        "directions": {"top1": "max", "top5": "max"},
        "primary": "top1",
        "config": {"protocol": {"epochs": 10}, "run": str(run_dir)},
    } | changes
    folder = run_dir / "evals" / f"{protocol}.v{content['version']}" / "toy"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))


def test_seeds_are_averaged_and_configurations_are_not(tmp_path: Path) -> None:
    for seed, value in ((1, 70.0), (2, 71.0), (3, 75.0)):
        write_run(tmp_path, seed=seed, top1=value)
    write_run(tmp_path, lr=0.2, top1=60.0)
    comparison = compare(load_results(tmp_path))
    (column,) = comparison.columns
    assert column.key == KEY
    tuned, other = comparison.rows
    assert tuned.cells[column].mean == 72.0
    assert tuned.cells[column].std == statistics.stdev([70.0, 71.0, 75.0])
    assert tuned.cells[column].n == 3
    assert (tuned.remark, other.remark) == ("optim.lr=0.1", "optim.lr=0.2")
    assert (tuned.cells[column].best, other.cells[column].best) == (True, False)


def test_smaller_is_better_where_the_protocol_says_so(tmp_path: Path) -> None:
    for method, value in (("byol", 3.0), ("simclr", 2.0)):
        write_run(tmp_path, method=method, top1=value, directions={"top1": "min"})
    comparison = compare(load_results(tmp_path))
    best = [row.method for row in comparison.rows for cell in row.cells.values() if cell.best]
    assert best == ["simclr"]
    assert comparison.columns[0].arrow == "↓"


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        ({"version": 2}, "versions 1, 2"),
        ({"dataset_fingerprint": "999999"}, "different data"),
        ({"config": {"protocol": {"epochs": 50}}}, "different options"),
    ],
)
def test_what_does_not_match_gets_its_own_column(tmp_path: Path, difference: dict[str, Any], word: str) -> None:
    write_run(tmp_path, seed=1, top1=70.0)
    write_run(tmp_path, seed=2, top1=90.0, **difference)
    comparison = compare(load_results(tmp_path))
    (row,) = comparison.rows
    assert sorted(cell.mean for cell in row.cells.values()) == [70.0, 90.0]
    assert [cell.n for cell in row.cells.values()] == [1, 1]
    assert [remark for remark in comparison.remarks if word in remark]


def test_left_out_runs_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path, started=1, top1=10.0)
    write_run(tmp_path, started=2, top1=70.0)
    write_run(tmp_path, method="simclr", limited=True)
    write_run(tmp_path, method="simclr", status="KILLED")
    write_run(tmp_path, method="scrl", top1=None)
    comparison = compare(load_results(tmp_path))
    assert [(row.method, row.cells[comparison.columns[0]].mean) for row in comparison.rows] == [("byol", 70.0)]
    reasons = ("train.limit", "did not finish", "no evaluation yet", "same configuration and seed")
    for reason in reasons:
        assert [
            remark for remark in comparison.remarks if remark.startswith("1 run left out") and reason in remark
        ]


def test_methods_that_use_labels_are_marked_and_not_ranked(tmp_path: Path) -> None:
    write_run(tmp_path, method="supervised", top1=95.0, uses_labels=True)
    write_run(tmp_path, method="byol", top1=70.0)
    write_run(tmp_path, method="simclr", top1=60.0)
    comparison = compare(load_results(tmp_path))
    best = [row.method for row in comparison.rows if row.cells[comparison.columns[0]].best]
    assert best == ["byol"]
    assert "supervised *" in to_markdown(comparison)


def test_test_columns_come_first_and_all_renderings_agree(tmp_path: Path) -> None:
    for method, value in (("byol", 70.0), ("simclr", 60.0)):
        run_dir = write_run(tmp_path, method=method, top1=value)
        write_result(run_dir, value - 5, protocol="knn")
        write_result(run_dir, value + 5, protocol="linear")
    comparison = compare(load_results(tmp_path))
    assert [column.protocol for column in comparison.columns] == ["test", "knn", "linear"]
    console = Console(width=160, record=True, quiet=True)
    console.print(render_table(comparison))
    (header, byol, _) = list(csv.reader(io.StringIO(to_csv(comparison))))
    assert float(byol[header.index(f"{KEY} mean")]) == 70.0
    assert to_json(comparison)["rows"][0]["cells"][0]["mean"] == 70.0
    json.dumps(to_json(comparison))
    assert "**70.00**" in to_markdown(comparison)
    table = render_table(comparison)
    assert [column.justify for column in table.columns[-3:]] == ["right"] * 3
    assert str(table.columns[-3].header).splitlines() == ["test v1", "toy", "top1 ↑"]


def test_an_overview_ranks_in_its_first_line(tmp_path: Path) -> None:
    for method, top1 in (("byol", 60.0), ("simclr", 70.0)):
        write_run(tmp_path, method=method, top1=top1)
        if method == "byol":
            transferred = tmp_path / "toy" / "byol-s1-1-0.1-FINISHED-False" / "artifacts"
            write_result(transferred, 99.0, version=2)
    text = overview(compare(load_results(tmp_path)))
    assert text.splitlines()[0] == "test v1, toy, top1: **simclr** 70.00 > **byol** 60.00"
    write_run(tmp_path, method="supervised", top1=95.0, uses_labels=True)
    (line, *_) = overview(compare(load_results(tmp_path))).splitlines()
    assert line.endswith("**simclr** 70.00 > **byol** 60.00; with labels: **supervised** 95.00")
    assert overview(compare([])) == "No finished evaluation yet."


def test_references_judge_recipes(tmp_path: Path) -> None:
    write_run(tmp_path, method="byol", top1=70.0)
    write_run(tmp_path, method="simclr", top1=50.0)

    def reference(recipe: str, metric: str = KEY) -> Reference:
        return Reference(recipe=recipe, metric=metric, value=69.5, tolerance=1.0, source="a paper")

    references = [reference("byol/toy"), reference("simclr/toy"), reference("byol/toy", "eval/knn.v1/toy/top1")]
    references += [reference("byol/toy", "COCO, box AP").model_copy(update={"verified": False})]
    verdicts = judge(compare(load_results(tmp_path)), references)
    assert [v.verdict for v in verdicts] == ["reproduced", "below", "missing", "no protocol"]
    table = render_verdicts(verdicts)
    assert table.row_count == 4
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [("(not verified)" in line, "69.5 ± 1 ?" in line) for line in lines if "COCO" in line] == [(True, True)]
    assert sum("not verified" in line for line in lines) == 1


def test_selectors_pick_by_pattern_and_name_unknown_runs(tmp_path: Path) -> None:
    write_run(tmp_path, method="byol")
    write_run(tmp_path, method="simclr")
    assert [r.method for r in load_results(tmp_path, ["byol-*"])] == ["byol"]
    with pytest.raises(SslbenchError, match="nothing-like-this"):
        load_results(tmp_path, ["nothing-like-this"])


def test_a_half_written_result_is_passed_over(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    broken = run_dir / "evals" / "knn.v1" / "toy"
    broken.mkdir(parents=True)
    (broken / "result.json").write_text('{"protocol": "knn"')
    (result,) = load_results(tmp_path)
    assert [e.protocol for e in result.evals] == ["test"]
