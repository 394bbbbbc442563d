"""The whole job through the command line on the embedded digits: pretrain, evaluate, compare, resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Cli
from PIL import Image

SMALL = (
    "--dataset", "digits", "--backbone", "conv4", "train.batch_size=64", "probe.images=200",
    "evals.linear.epochs=10", "method.hidden=32", "method.out_dim=16",
)  # fmt: skip
CPU_TIMING = ("perf/",)


def run_dir(root: Path, name: str) -> Path:
    return (root / "runs" / name).resolve()


def tags(directory: Path) -> dict[str, str]:
    return json.loads((directory / "run.json").read_text())["tags"]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    newest = sorted(directory.glob("checkpoints/step-*"))[-1]
    return torch.load(newest / "backbone.pt", weights_only=True)


def curves(directory: Path) -> list[dict[str, object]]:
    """The journal without what a clock measured."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"], **{k: v for k, v in line["metrics"].items() if not k.startswith(CPU_TIMING)}}
        for line in lines
    ]


def test_pretrain_evaluates_compares_and_lists(cli: Cli, workdir: Path) -> None:
    done = cli("pretrain", "--method", "simclr", *SMALL, "train.epochs=2", "run.name=one", "--json")
    outcome = json.loads(done.stdout)
    assert [e["protocol"] for e in outcome["evals"]] == ["linear", "knn", "test"]
    directory = run_dir(workdir, "one")
    for name in ("config.yaml", "environment.yaml", "command.txt", "metrics.jsonl", "run.json"):
        assert (directory / name).is_file(), name
    cli("pretrain", "--method", "random", "--dataset", "digits", "run.name=control")
    table = json.loads(cli("compare", "--json").stdout)
    assert {row["method"] for row in table["rows"]} == {"simclr", "random"}
    runs = json.loads(cli("list", "runs", "--json").stdout)
    assert [run["name"] for run in runs] == ["one", "control"]
    transfer = cli("eval", "transfer", "one", "datasets=[digits]", "--json")
    assert json.loads(transfer.stdout)["children"]


def test_a_killed_run_resumes_to_the_same_bits(cli: Cli, workdir: Path) -> None:
    options = (*SMALL, "train.epochs=3", "checkpoint.every_steps=7", "run.evals=[]")
    cli("pretrain", "--method", "byol", *options, "run.name=whole")
    killed = subprocess.Popen(
        [sys.executable, "-m", "sslbench", "pretrain", "--method", "byol", *options, "run.name=killed"],
        cwd=workdir, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = workdir / "runs" / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = sorted(p.name for p in checkpoints.glob("step-*[0-9]"))
    assert before
    assert before[-1] != sorted(p.name for p in run_dir(workdir, "whole").glob("checkpoints/step-*"))[-1]
    cli("pretrain", "--resume", "killed")
    whole, resumed = run_dir(workdir, "whole"), run_dir(workdir, "killed")
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key
    assert curves(whole) == curves(resumed)


def test_sigterm_saves_and_exits_75(cli: Cli, workdir: Path) -> None:
    command = ["pretrain", "--method", "simclr", *SMALL, "train.epochs=500", "run.name=stopped", "probe.every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sslbench", *command], cwd=workdir, stderr=subprocess.PIPE, text=True
    )
    journal = workdir / "runs" / "stopped" / "metrics.jsonl"
    while not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75, message
    assert "sslbench pretrain --resume stopped" in message
    assert json.loads((run_dir(workdir, "stopped") / "run.json").read_text())["status"] == "KILLED"


@pytest.mark.slow
def test_probes_do_not_change_training(cli: Cli, workdir: Path) -> None:
    options = (*SMALL, "train.epochs=2", "run.evals=[]")
    cli("pretrain", "--method", "simclr", *options, "run.name=with", "probe.every=1")
    cli("pretrain", "--method", "simclr", *options, "run.name=without", "probe.every=0")
    first, second = run_dir(workdir, "with"), run_dir(workdir, "without")
    assert any("probe/knn_top1" in line for line in curves(first))
    for key, value in weights(first).items():
        assert torch.equal(value, weights(second)[key]), key


@pytest.mark.slow
def test_seeds_make_a_spread(cli: Cli) -> None:
    cli("pretrain", "--method", "random", "--dataset", "digits", "--seeds", "1,2", "run.evals=[knn]")
    rows = json.loads(cli("compare", "--json").stdout)["rows"]
    assert [row["seeds"] for row in rows] == [["1", "2"]]
    assert [row["cells"][0]["n"] for row in rows] == [2]


@pytest.mark.slow
def test_init_from_starts_from_the_other_runs_weights(cli: Cli, workdir: Path) -> None:
    cli("pretrain", "--method", "random", "--dataset", "digits", "run.name=start", "run.seed=5", "--no-evals")
    tiny = ("optim.lr=1e-12", "optim.weight_decay=0", "--limit", "1", "--no-evals", "run.name=next")
    cli("pretrain", "--method", "simclr", *SMALL, "--init-from", "start", *tiny)
    a, b = weights(run_dir(workdir, "start")), weights(run_dir(workdir, "next"))
    learned = [key for key in a if key.endswith("weight")]
    assert learned
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in learned)
    cli("pretrain", "--method", "simclr", *SMALL, *tiny[:-1], "run.name=scratch")
    groups = [tags(run_dir(workdir, name))["sslbench.group_hash"] for name in ("next", "scratch")]
    assert groups[0] != groups[1], "compare would average them"


def test_resume_refuses_other_images(cli: Cli, workdir: Path) -> None:
    folder = workdir / "photos"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(folder / f"{number:02d}.png")
    options = ("--dataset", "folder", f"dataset.root={folder}", "--backbone", "conv4", "train.batch_size=4")
    cli("pretrain", *options, "train.epochs=2", "--limit", "2", "--no-evals", "run.name=first", "data.workers=0")
    Image.new("RGB", (16, 16), (0, 0, 99)).save(folder / "03.png")
    done = cli("pretrain", "--resume", "first", "train.limit=null", check=4)
    assert "are not those the run began with" in done.stderr


def test_limited_runs_stay_out_of_reports(cli: Cli) -> None:
    cli("pretrain", "--method", "simclr", *SMALL, "--limit", "3", "run.evals=[knn]")
    done = json.loads(cli("compare", "--json").stdout)
    assert done["rows"] == []
    assert any("limit" in remark for remark in done["remarks"])


def test_an_unreadable_environment_variable_store_does_not_stop_training(cli: Cli, workdir: Path) -> None:
    options = ("pretrain", "--method", "simclr", *SMALL, "--limit", "2", "--no-evals", "run.name=offline")
    done = cli(*options, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "sslbench sync" in done.stderr
    assert run_dir(workdir, "offline").is_dir()


@pytest.mark.parametrize(
    "command",
    [
        ("list", "methods"),
        ("info", "method", "scrl"),
        ("config", "--explain"),
        ("list", "recipes"),
        ("info", "recipe", "scrl/imagenet-r50-200ep"),
        ("pretrain", "--dry-run"),
    ],
)
def test_listings_answer_in_text_and_json(cli: Cli, command: tuple[str, ...]) -> None:
    assert cli(*command).stdout.strip()
    json.loads(cli(*command, "--json").stdout)


OBSERVER = '''"""Notes what it is told."""
from sslbench.plugin.hooks import hookimpl

def note(run_dir, line):
    with open(run_dir / "seen.txt", "a") as file:
        file.write(line + "\\n")

@hookimpl
def sslbench_run_started(run_dir, config):
    note(run_dir, "started " + config["method"]["name"])

@hookimpl
def sslbench_metrics_logged(run_dir, step):
    raise RuntimeError("a broken observer")

@hookimpl
def sslbench_checkpoint_saved(run_dir, step):
    note(run_dir, f"saved {step}")

@hookimpl
def sslbench_run_finished(run_dir, status):
    note(run_dir, "finished " + status)
'''


@pytest.mark.slow
def test_observers_are_told_and_cannot_end_a_run(cli: Cli, workdir: Path) -> None:
    (workdir / "observer.py").write_text(OBSERVER)
    options = ("-p", "observer.py", "pretrain", "--method", "simclr", *SMALL, "--limit", "2", "--no-evals")
    done = cli(*options, "run.name=seen")
    failure = "failed in sslbench_metrics_logged: RuntimeError: a broken observer (observer.py, line 14)"
    assert done.stderr.count(failure) == 1
    lines = (run_dir(workdir, "seen") / "seen.txt").read_text().splitlines()
    assert lines == ["started simclr", "saved 2", "finished FINISHED"]
    record = run_dir(workdir, "seen") / "run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "status": "RUNNING", "checkpoints": {}}))
    cli("-p", "observer.py", "pretrain", "--resume", "seen")
    lines = (run_dir(workdir, "seen") / "seen.txt").read_text().splitlines()
    assert lines[3:] == ["started simclr", "saved 2", "finished FINISHED"], "as if killed before it could tell"
