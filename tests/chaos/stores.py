"""MLflow goes away, gets slow, locks up or dies while runs are recorded."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TextIO

from chaos.children import Child, promise, put_database, typed
from chaos.fault import Fault, Finding
from chaos.mounts import small_disk
from chaos.runs import METHOD, View
from chaos.servers import Line, expect_exact, the_server
from chaos.trials import Trial, trials

HELD = "the run ended as ever; after `sslbench sync` every point, parameter, tag, status and LoggedModel, once"
STEPS = 110
TRAIN = (
    f"pretrain {METHOD} --dataset digits --no-evals train.batch_size=128 train.log_every=1 data.workers=0 "
    "probe.every=0 checkpoint.every_steps=5 checkpoint.keep=2 train.epochs="
)
RUN = f"{TRAIN}10"
_PAIRS, _TURN_S = 10, 12.0
_TOLERANCE = 1.02

Disturb = Callable[[Child, View], None]


def on_a_line(disturb: Callable[[Line], Disturb], *, cut_at_start: bool = False) -> Trial:
    """A run and an evaluation whose server is behind a bad line, which is mended before ``sync``."""

    def trial(folder: Path, rng: random.Random) -> int:
        line = Line(the_server().port)
        if cut_at_start:
            line.cut()
        name = f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        said = _run(folder, f"run.tracking_uri={line.uri} run.name={name}", disturb(line))
        if "sslbench sync" not in said:  # then it must have everything already
            expect_exact(View(folder).the_run(), the_server().database)
        line.cut()
        line.mend()
        typed("sync last", folder)
        expect_exact(View(folder).the_run(), the_server().database)
        line.cut()
        return 0

    return trial


def _run(folder: Path, options: str, disturb: Disturb) -> str:
    child = Child(f"{RUN} {options}", folder)
    disturb(child, View(folder))
    said = child.end()
    promise(View(folder).status() == "FINISHED", f"the run ended {View(folder).status()}")
    return said


def _at(child: Child, view: View, step: int) -> None:
    promise(child.wait_for(lambda: view.last_step() >= step), f"the run ended before step {step}")


def cut_in_the_middle(line: Line) -> Disturb:
    def disturb(child: Child, view: View) -> None:
        _at(child, view, STEPS // 4)
        line.cut()
        _at(child, view, STEPS // 2)
        line.mend()
        _at(child, view, 3 * STEPS // 4)
        line.cut()

    return disturb


def cut_at_the_end(line: Line) -> Disturb:
    def disturb(child: Child, view: View) -> None:
        _at(child, view, STEPS - 5)
        line.cut()

    return disturb


def stay_cut(line: Line) -> Disturb:
    return lambda child, view: None


def slow_down(line: Line) -> Disturb:
    line.slow = True
    return lambda child, view: None


def slow_later(line: Line) -> Disturb:
    def disturb(child: Child, view: View) -> None:
        _at(child, view, 5)
        line.slow = True

    return disturb


def locked_database(folder: Path, rng: random.Random) -> int:
    """Another process holds the database before the run begins, lets go, and holds it again until it has ended."""
    put_database(folder)
    with sqlite3.connect(folder / "mlflow.db", isolation_level=None, check_same_thread=False) as other:
        other.execute("begin exclusive")

        def disturb(child: Child, view: View) -> None:
            _at(child, view, rng.randrange(1, STEPS // 2))
            other.execute("commit")
            _at(child, view, STEPS - rng.randrange(5, STEPS // 3))
            _until_locked(other)

        said = _run(folder, "", disturb)
        other.execute("commit")
    promise("sslbench sync" in said, f"nobody was told to sync:\n{said[-1500:]}")
    return _synced(folder)


def _until_locked(connection: sqlite3.Connection) -> None:
    while True:
        with suppress(sqlite3.OperationalError):  # the run's own writing
            connection.execute("begin exclusive")
            return
        time.sleep(0.01)


def read_only_store(folder: Path, rng: random.Random) -> int:
    """The database is on a disk that becomes read-only during the run, and can be written again afterwards."""
    with small_disk(folder / "disk", 64) as disk:
        put_database(folder / "disk")

        def disturb(child: Child, view: View) -> None:
            _at(child, view, rng.randrange(1, STEPS // 2))
            disk.protect()

        said = _run(folder, f"run.tracking_uri=sqlite:///{folder / 'disk' / 'mlflow.db'}", disturb)
        promise("sslbench sync" in said, f"nobody was told to sync:\n{said[-1500:]}")
        disk.release()
        typed("sync last", folder)
        expect_exact(View(folder).the_run(), folder / "disk" / "mlflow.db")
    return 0


def killed_store_process(folder: Path, rng: random.Random) -> int:
    """SIGKILL for the process that talks to MLflow, at three steps of a run: it may not be there again yet."""
    put_database(folder)
    kills: list[bool] = []

    def disturb(child: Child, view: View) -> None:
        for step in sorted(rng.sample(range(1, STEPS - 5), 3)):
            _at(child, view, step)
            kills.append(_store_killed(child))

    _run(folder, "", disturb)
    promise(any(kills), "there was no store process to kill")
    return _synced(folder)


def _store_killed(child: Child) -> bool:
    """SIGKILL for the process that a run has for the store; False if it has none at the moment."""
    found = list(_store_processes(child.pid))
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return bool(found)


def _store_processes(parent: int) -> Iterator[int]:
    """Children that lead a session of their own and are alive."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[1]) == parent and fields[3] == stat.parent.name:
                yield int(stat.parent.name)


def killed_run(folder: Path, rng: random.Random) -> int:
    """A run that is killed says RUNNING in MLflow until ``sync``; ``list`` and ``compare`` know better at once."""
    put_database(folder)
    child = Child(RUN, folder)
    view = View(folder)
    _at(child, view, rng.randrange(1, STEPS))
    promise(child.kill(), "it ended before it was killed")
    promise("KILLED" in typed("list runs", folder), "`list runs` does not see that it was killed")
    promise("pretraining did not finish" in typed("compare", folder), "`compare` does not see that it was killed")
    typed("sync last", folder)
    promise(view.status() == "KILLED", f"after sync it is {view.status()}")
    expect_exact(view.the_run(), folder / "mlflow.db")
    return 0


def two_first_runs(folder: Path, rng: random.Random) -> int:
    """Both find no database and want to make one."""
    short = TRAIN.replace("checkpoint.every_steps=5", "") + "1"
    children = [Child(f"{short} run.name=first-{seed} run.seed={seed}", folder) for seed in (1, 2)]
    for child in children:
        child.end()
    for name in ("first-1", "first-2"):
        typed(f"sync {name}", folder)
        expect_exact((folder / "runs" / name).resolve(), folder / "mlflow.db")
    return 0


def _synced(folder: Path) -> int:
    typed("sync last", folder)
    expect_exact(View(folder).the_run(), folder / "mlflow.db")
    return 0


class Pace(NamedTuple):
    """What a step took while the store was as it was."""

    wall: float
    """Seconds, pauses included."""
    cpu: float
    """Of all threads of the process, in seconds."""


def speed(spoil: Callable[[Line], None], mend: Callable[[Line], None]) -> Trial:
    """Time of a step while the store is well and while it is not, by turns in one process.

    Each turn is longer than the first pauses between attempts to reach a lost store, and is compared with its
    neighbour, since the machine may get slower or faster meanwhile.
    """

    def trial(folder: Path, rng: random.Random) -> int:
        line = Line(the_server().port)
        quiet = f"{TRAIN}100000".replace("checkpoint.every_steps=5", "checkpoint.every_steps=10000000")
        child = Child(f"{quiet} run.tracking_uri={line.uri} run.name=speed-{time.time_ns()}", folder)
        view = View(folder)
        _at(child, view, 100)
        paces = []
        for phase in range(2 * _PAIRS):
            if phase % 2:
                spoil(line)
            else:
                mend(line)
                _acknowledged(child, line)
            paces.append(_pace(child, view.the_run() / "metrics.jsonl"))
        child.kill()
        line.cut()
        _measured.extend(Pace(bad.wall / well.wall, bad.cpu / well.cpu) for well, bad in _pairs(paces))
        for name in Pace._fields:
            slower = statistics.median(getattr(ratio, name) for ratio in _measured)
            promise(slower <= _TOLERANCE, f"a step takes {_percent(slower)} {name} time")
        return 0

    return trial


_measured: list[Pace] = []
"""Of each pair of turns, how many times longer a step took without a healthy store."""


def _pairs(paces: Sequence[Pace]) -> Iterator[tuple[Pace, Pace]]:
    return zip(paces[::2], paces[1::2], strict=True)


def _acknowledged(child: Child, line: Line) -> None:
    """Wait until the store has what it missed."""
    before = line.calls
    promise(child.wait_for(lambda: line.calls > before + 2), "nothing reaches the store again")
    time.sleep(3)


def _pace(child: Child, journal: Path) -> Pace:
    with journal.open() as lines:
        lines.seek(0, os.SEEK_END)
        lines.readline()  # the rest of one half written
        begun = _next_step(child, lines)
        started, cpu = time.perf_counter(), _cpu_seconds(child.pid)
        while time.perf_counter() < started + _TURN_S:
            step = _next_step(child, lines)
        wall, cpu = time.perf_counter() - started, _cpu_seconds(child.pid) - cpu
    return Pace(wall / (step - begun), cpu / (step - begun))


def _next_step(child: Child, lines: TextIO) -> int:
    """Wait for a line of the journal; its step."""
    found = ""
    while not found.endswith("\n"):
        promise(child.running, "the run ended too early")
        found += lines.readline() or _nothing()
    return int(json.loads(found)["step"])


def _nothing() -> str:
    time.sleep(0.0005)
    return ""


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _cpu_seconds(pid: int) -> float:
    total = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(file.read_text().split()[0])
    return total / 1e9


def _mended(line: Line) -> None:
    line.cut()
    line.mend()


def _slow(line: Line) -> None:
    line.slow = True


def _fast(line: Line) -> None:
    line.slow = False


def measured(trial: Trial) -> Callable[[Path, int, int], Finding]:
    """A row that states the figures."""
    inflict = trials(trial, "of a step, in turns beside a healthy store")

    def with_figures(folder: Path, times: int, seed: int) -> Finding:
        _measured.clear()
        found = inflict(folder, times, seed)
        figures = []
        for name in Pace._fields if _measured else ():
            ratios = sorted(getattr(ratio, name) for ratio in _measured)
            between = f"{_percent(ratios[0])} to {_percent(ratios[-1])}"
            figures.append(
                f"{name} time {_percent(statistics.median(ratios))} (median of {len(ratios)}; {between})"
            )
        return replace(found, result=" ".join([", ".join(figures), found.result]))

    return with_figures


FAULTS = [
    Fault("MLflow server down at the start", trials(on_a_line(stay_cut, cut_at_start=True), HELD), times=2),
    Fault("MLflow server goes, comes and goes", trials(on_a_line(cut_in_the_middle), HELD), times=3),
    Fault("MLflow server down at the end", trials(on_a_line(cut_at_the_end), HELD), times=3),
    Fault("MLflow server takes 5 s per call", trials(on_a_line(slow_down), HELD), times=2),
    Fault("MLflow server begins to take 5 s per call", trials(on_a_line(slow_later), HELD), times=2),
    Fault("MLflow database locked by another process", trials(locked_database, HELD), times=3),
    Fault("MLflow database on a disk that becomes read-only", trials(read_only_store, HELD), times=2),
    Fault("MLflow store process killed, up to three times", trials(killed_store_process, HELD), times=4),
    Fault("killed run in MLflow", trials(killed_run, "KILLED in list, compare and after sync"), times=3, quick=1),
    Fault("two first runs in one empty folder", trials(two_first_runs, "both in one database, exactly"), times=3),
    Fault("speed while the MLflow server is down", measured(speed(Line.cut, _mended)), times=1),
    Fault("speed while the MLflow server takes 5 s per call", measured(speed(_slow, _fast)), times=1),
]
