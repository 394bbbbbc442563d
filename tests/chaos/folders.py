"""Run directories that two processes want, that move, fill up, lock up or grow, and clocks that jump."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from chaos.children import LIMIT_S, Child, promise, put_database, typed
from chaos.fault import Fault, Finding
from chaos.mounts import small_disk
from chaos.runs import RESUME, RUN, STEPS, View, expect_same, expect_stored, resumed_after, whole
from chaos.servers import expect_exact
from chaos.trials import Trial, trials
from sslbench.engine import checkpoint
from sslbench.engine.saving import Retention
from sslbench.tracking import RunRecord

YEAR_S = 365 * 86400
SHORT = RUN.replace("run.evals=[knn,linear]", "run.evals=[]")
LONG = SHORT.replace("train.epochs=2", "train.epochs=4000")
MANY = 10_000
_CLOCK = """
import os, time
_real = time.time
def jumping():
    with open(os.environ["CHAOS_CLOCK"]) as file:
        return _real() + float(file.read() or 0)
time.time = jumping
"""


def two_at_once(folder: Path, rng: random.Random) -> int:
    """A second process resumes a run that is running; it is refused, and the run does not notice."""
    put_database(folder)
    first = Child(RUN, folder)
    view = View(folder)
    promise(first.wait_for(view.resumable), "it ended before it could be resumed")
    said = typed(RESUME, folder, code=6)
    owner = f"in use by process {first.pid} on {socket.gethostname()}"
    promise(owner in said, f"it does not say who has it:\n{said[-500:]}")
    first.end()
    expect_same(view.the_run(), whole())
    typed("sync last", folder)
    expect_stored(view.the_run(), folder / "mlflow.db")
    return 0


def stale_lock(folder: Path, rng: random.Random) -> int:
    """The lock of a process that was killed, or of another machine that is gone, stops nobody."""
    put_database(folder)
    view = View(folder)
    reached = _killed_after(rng.randrange(4, STEPS - 2), folder)
    if rng.random() < 0.5:
        (view.the_run() / ".run.lock").write_text("process 1 on another-machine (gone)")
    said = typed(RESUME, folder)
    expect_same(view.the_run(), whole())
    return reached - resumed_after(said)


def _killed_after(step: int, folder: Path) -> int:
    child = Child(RUN, folder)
    view = View(folder)
    promise(child.wait_for(lambda: view.last_step() >= step), f"it ended before step {step}")
    promise(child.kill(), "it ended before it was killed")
    return view.last_step()


def moved_whole(folder: Path, rng: random.Random) -> int:
    """The folder of runs and its database go to another disk in the middle of training."""
    old, disk = folder / "old", folder / "disk"
    old.mkdir()
    with small_disk(disk, 64):
        put_database(old)
        reached = _killed_after(rng.randrange(4, STEPS - 2), old)
        for name in ("runs", "mlflow.db"):
            shutil.move(old / name, disk / name)
        before = _files_below(old)
        said = typed(RESUME, disk)
        promise(f"the run was in {old / 'runs'}" in said, f"it does not say that it was moved:\n{said[-800:]}")
        view = View(disk)
        expect_same(view.the_run(), whole())
        typed("eval knn last k=3", disk)
        promise("simclr" in typed("compare", disk), "`compare` does not see it")
        told = typed("sync last", disk)
        expect_stored(view.the_run(), disk / "mlflow.db")
        promise(_files_below(old) == before, f"something was written where it had been: {_files_below(old)}")
        _repair_link(told, view.the_run())
    return reached - resumed_after(said)


def _repair_link(told: str, run_dir: Path) -> None:
    """Do what the message says; then MLflow's folder of the run is the run directory."""
    found = re.search(r"MLflow looks for its files in (.+); to see them there: (ln -s .+)", told)
    promise(found is not None, f"nobody is told how MLflow finds the files again:\n{told[-800:]}")
    assert found is not None
    subprocess.run(shlex.split(found[2]), check=True)
    promise(Path(found[1]).resolve() == run_dir, f"{found[2]} does not lead to {run_dir}")
    os.unlink(shlex.split(found[2])[-1])


def moved_alone(folder: Path, rng: random.Random) -> int:
    """One run directory is given to somebody else, who has neither its data base nor its siblings."""
    mine, theirs = folder / "mine", folder / "theirs"
    for place in (mine, theirs):
        place.mkdir()
        put_database(place)
    typed(SHORT, mine)
    before = _files_below(mine)
    shutil.copytree(View(mine).the_run(), theirs / "given")
    typed("eval knn given", theirs)
    told = typed("compare given", theirs)
    promise("knn" in told, f"`compare` does not show its evaluation:\n{told[-500:]}")
    typed("sync given", theirs)
    expect_exact(theirs / "given", theirs / "mlflow.db")
    promise(_files_below(mine) == before, "a file of the folder it comes from was touched")
    return 0


def _files_below(folder: Path) -> dict[str, tuple[int, int]]:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def jumping_clock(folder: Path, rng: random.Random) -> int:
    """A year forwards and back during a run, another run a year earlier, a third one now."""
    put_database(folder)
    (folder / "sitecustomize.py").write_text(_CLOCK)
    clock = folder / "clock"
    clock.write_text("0")
    began = time.time()
    first = _with_clock(f"{RUN} run.tracking_uri=sqlite:///mlflow.db", folder, clock)
    view, jumps = View(folder), iter((YEAR_S, -YEAR_S, 0))
    for step in sorted(rng.sample(range(1, STEPS - 1), 3)):
        while view.last_step() < step and first.poll() is None:
            time.sleep(0.001)
        clock.write_text(str(next(jumps)))
    said = _ended(first)
    _expect_sane(view.the_run(), began, said)
    expect_exact(view.the_run(), folder / "mlflow.db")
    for name, offset in (("earlier", -YEAR_S), ("now", 0)):
        clock.write_text(str(offset))
        _ended(_with_clock(SHORT.replace("run.name=killed", f"run.name={name}"), folder, clock))
    listed = [run["name"] for run in json.loads(typed("list runs --json", folder))]
    promise(listed == ["killed", "earlier", "now"], f"the runs are listed as {listed}")
    typed("sync earlier", folder)
    expect_exact((folder / "runs" / "earlier").resolve(), folder / "mlflow.db")
    return 0


def _with_clock(line: str, folder: Path, clock: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "sslbench", *shlex.split(line)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "CHAOS_CLOCK": str(clock)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=LIMIT_S)
    promise(process.returncode == 0, f"exit code {process.returncode}\n{said[-1500:]}")
    return said


def _expect_sane(run_dir: Path, began: float, said: str) -> None:
    took = time.time() - began
    times = [json.loads(line)["time"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    promise(times == sorted(times), "points of the journal are not in the order of their times")
    promise(times[-1] - times[0] < took, f"the curves cover {times[-1] - times[0]:.0f} s")
    record = RunRecord.load(run_dir)
    promise(0 < (record.ended or 0) - record.started < took, f"it lasted {(record.ended or 0) - record.started} s")
    rates = [json.loads(line)["metrics"].get("perf/images_per_second", 1) for line in _lines(run_dir)]
    promise(min(rates) > 0, "a speed is negative")
    hours = [int(found) for found in re.findall(r"eta (\d+):\d\d:\d\d", said)]
    promise(not [value for value in hours if value > 1], f"it announced {hours} hours")


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


_seconds: dict[str, float] = {}


def many_checkpoints(folder: Path, rng: random.Random) -> int:
    """Ten thousand kept checkpoints; what is done with them is timed beside a run that has two."""
    typed(f"{LONG} run.tracking_uri=http://127.0.0.1:9 train.limit=4", folder)
    few = {words: _timed(words, folder) for words in ("list runs", "compare", "config --method simclr")}
    run_dir = View(folder).the_run()
    _multiply(run_dir)
    _seconds["list"] = _time(lambda: promise(len(checkpoint.list_checkpoints(run_dir)) == MANY, "not all listed"))
    _seconds["find the newest intact"] = _time(lambda: checkpoint.latest(run_dir, print))
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    _seconds["look at all of them to keep them"] = _time(lambda: Retention(run_dir, 2, 1).add(newest, 0))
    for words, before in few.items():
        _seconds[f"`{words.split()[0]}` more than with two"] = max(0.0, _timed(words, folder) - before)
    _seconds["resume and 4 saves"] = _timed(
        f"pretrain --resume last checkpoint.keep=20000 train.limit={2 * MANY + 8}", folder
    )
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    _seconds["delete all but two"] = _time(lambda: Retention(run_dir, 2, None).add(newest, 0))
    promise(len(checkpoint.list_checkpoints(run_dir)) == 2, "not all were deleted")
    slow = {what: seconds for what, seconds in _seconds.items() if seconds > 60}
    promise(not slow, f"slow: {slow}")
    return 0


def _multiply(run_dir: Path) -> None:
    """Make the run's newest checkpoint one of a late step, with copies for earlier ones that share its files."""
    first = checkpoint.list_checkpoints(run_dir)
    meta = checkpoint.read_meta(first[-1], verify=True).model_copy(update={"step": 2 * MANY})
    backbone, state = (
        checkpoint.load_tensors(first[-1] / name) for name in (checkpoint.BACKBONE, checkpoint.STATE)
    )
    newest = checkpoint.save(run_dir, meta, backbone, state | {"step": 2 * MANY})
    for path in first:
        shutil.rmtree(path)
    record = RunRecord.load(run_dir)
    record.checkpoints = {}
    written = json.loads((newest / checkpoint.META).read_text())
    written["sha256"].pop(checkpoint.META)  # each would have its own
    for step in range(2, 2 * MANY, 2):
        path = newest.with_name(f"step-{step:08d}")
        path.mkdir()
        for name in (checkpoint.BACKBONE, checkpoint.STATE):
            os.link(newest / name, path / name)
        (path / checkpoint.META).write_text(json.dumps(written | {"step": step}))
        record.checkpoints[f"checkpoints/{path.name}"] = {"step": step}
    record.save(run_dir)


def _time(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _timed(line: str, folder: Path) -> float:
    return _time(lambda: typed(line, folder))


def with_seconds(trial: Trial) -> Callable[[Path, int, int], Finding]:
    """A row that states the figures."""
    inflict = trials(trial, "seconds")

    def told(folder: Path, times: int, seed: int) -> Finding:
        found = inflict(folder, times, seed)
        figures = ", ".join(f"{what} {seconds:.2f}" for what, seconds in _seconds.items())
        return replace(found, result=f"{found.result}: {figures}")

    return told


def torn_line(folder: Path, rng: random.Random) -> int:
    """The journal ends in the middle of a line, as after a power cut."""
    put_database(folder)
    view = View(folder)
    reached = _killed_after(rng.randrange(4, STEPS - 2), folder)
    journal = view.the_run() / "metrics.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[: -rng.randrange(1, len(content.splitlines()[-1]))])
    said = typed(RESUME, folder)
    expect_same(view.the_run(), whole())
    typed("sync last", folder)
    expect_stored(view.the_run(), folder / "mlflow.db")
    return reached - resumed_after(said)


def read_only_runs(folder: Path, rng: random.Random) -> int:
    """Looking goes on; what would have to write says so, with the right exit code."""
    with small_disk(folder / "disk", 64) as disk:
        runs = f"--runs {disk.path}/runs"
        typed(f"{runs} {RUN} run.tracking_uri=http://127.0.0.1:9", folder)
        disk.protect()
        promise("killed" in typed(f"{runs} list runs", folder), "`list` does not see it")
        promise("simclr" in typed(f"{runs} compare", folder), "`compare` does not see it")
        elsewhere = f"sync last --tracking-uri sqlite:///{folder}/mlflow.db"
        for line in ("pretrain --resume last train.epochs=2", "eval knn last k=3", elsewhere):
            said = typed(f"{runs} {line}", folder, code=5)
            promise("read-only" in said, f"{line} does not say that it is read-only:\n{said[-500:]}")
        disk.release()
        typed(f"{runs} eval knn last k=3", folder)
    return 0


def full_disk(folder: Path, rng: random.Random) -> int:
    """No room for the next line of the journal; with room again the run goes on exactly."""
    disk_folder = folder / "disk"
    with small_disk(disk_folder, 32) as disk:
        child = Child(f"{RUN} run.tracking_uri=http://127.0.0.1:9", disk_folder)
        view, step = View(disk_folder), rng.randrange(4, STEPS - 4)
        promise(child.wait_for(lambda: view.last_step() >= step), "it ended before the disk was full")
        disk.fill()
        said = child.end(5)
        promise("disk is full" in said and "--resume" in said, f"it does not say what to do:\n{said[-800:]}")
        reached = view.last_step()
        disk.empty()
        said = typed(RESUME, disk_folder)
        expect_same(view.the_run(), whole())
    return reached - resumed_after(said)


SAME = "checkpoints, curves and results to the bit as of a run that nobody disturbed"
FAULTS = [
    Fault(
        "a running run is resumed by a second process", trials(two_at_once, f"refused, exit 6; {SAME}"), times=3
    ),
    Fault("lock left by a killed process or another machine", trials(stale_lock, SAME), times=4),
    Fault("runs moved to another disk", trials(moved_whole, f"{SAME}; store complete; link as told"), times=3),
    Fault(
        "one run directory given away", trials(moved_alone, "eval, compare and sync; origin untouched"), times=2
    ),
    Fault("clock jumps by a year", trials(jumping_clock, "times, durations, ETA, order, store sane"), times=2),
    Fault("ten thousand checkpoints", with_seconds(many_checkpoints), times=1),
    Fault("journal ends in half a line", trials(torn_line, f"{SAME}; store complete"), times=3, quick=1),
    Fault(
        "run directory on a read-only disk",
        trials(read_only_runs, "exit 5 with the reason; looking works"),
        times=1,
    ),
    Fault("disk full while journalling", trials(full_disk, SAME), times=4),
]
