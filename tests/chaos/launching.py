"""Processes and machines of one launch that die, hang, or are asked to stop."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chaos.children import LIMIT_S, NOWHERE, Child, promise, put_database, typed
from chaos.fault import Fault
from chaos.runs import RESUME, RUN, STEPS, View, expect_same, expect_stored, resumed_after, whole
from chaos.trials import trials

TWO = f"{RUN} --devices 2"
ONE_EACH = (
    f"{RUN.replace('[knn,linear]', '[]')} run.tracking_uri={NOWHERE} "
    "--devices 1 --nnodes 2 --rdzv-endpoint 10.77.0.1:29417 --launch-id net"
)


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process of the workers that a launcher has now."""
    found = {}
    with suppress(OSError):
        for number in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            with suppress(OSError):
                variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
                found |= {int(v[5:]): int(number) for v in variables if v.startswith(b"RANK=")}
    return found


def a_rank_is_killed(folder: Path, rng: random.Random) -> int:
    """SIGKILL; the launcher starts both again, and they go on."""
    said, reached = _struck(folder, rng, signal.SIGKILL, TWO)
    return _redone(said, reached)


def a_rank_hangs(folder: Path, rng: random.Random) -> int:
    """SIGSTOP: its connections stay, it only never answers."""
    said, reached = _struck(folder, rng, signal.SIGSTOP, f"{TWO} --peer-timeout 15")
    promise("did not answer within 15 s" in said, f"the time limit is not named:\n{said[-2000:]}")
    return _redone(said, reached)


def _struck(folder: Path, rng: random.Random, number: signal.Signals, line: str) -> tuple[str, int]:
    expected = whole(TWO)
    view = View(folder)
    put_database(folder)
    child = Child(line, folder)
    step = rng.randrange(0, STEPS - 3)
    promise(child.wait_for(lambda: view.last_step() >= step and _both_at_work(child, view)), "it ended before")
    time.sleep(rng.uniform(0, 0.1))
    reached = view.last_step()
    os.kill(ranks_of(child.pid)[rng.randrange(2)], number)
    said = child.end()
    promise("Restart 1 of 3: rank " in said, f"no restart was reported:\n{said[-2000:]}")
    typed("sync last", folder)
    expect_same(view.the_run(), expected)
    expect_stored(view.the_run(), folder / "mlflow.db")
    return said, reached


def _both_at_work(child: Child, view: View) -> bool:
    return view.run_dir() is not None and len(ranks_of(child.pid)) == 2


def _redone(said: str, reached: int) -> int:
    return reached - resumed_after(said)


def the_launcher_is_asked_to_stop(folder: Path, rng: random.Random) -> int:
    """SIGTERM or SIGUSR1 at the launcher: both ranks save, and the run goes on when it is resumed."""
    expected = whole(TWO)
    view = View(folder)
    put_database(folder)
    child = Child(TWO, folder)
    step = rng.randrange(1, STEPS - 3)
    promise(child.wait_for(lambda: view.last_step() >= step), "it ended before")
    child.send(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
    said = child.end(75)
    promise("the state is saved" in said, f"nothing was saved:\n{said[-2000:]}")
    reached = view.last_step()
    said = typed(f"{RESUME} --devices 2", folder)
    typed("sync last", folder)
    expect_same(view.the_run(), expected)
    return reached - resumed_after(said)


def a_machine_is_killed(folder: Path, rng: random.Random) -> int:
    """Two network namespaces, one launcher each: the second one is killed, and the same line typed again."""
    with two_machines() as (first, second):
        view = View(folder)
        expected = _both_undisturbed(folder / "whole", first, second)
        began = [_typed_on(machine, ONE_EACH, folder) for machine in (first, second)]
        step = rng.randrange(2, STEPS - 3)
        _wait(lambda: view.last_step() >= step, began)
        reached = view.last_step()
        began[1].kill()
        began[1].wait()
        time.sleep(rng.uniform(0, 3))
        began[1] = _typed_on(second, ONE_EACH, folder)
        codes = [process.wait(LIMIT_S) for process in began]
        said = _said(folder, first)
        promise(codes == [0, 0], f"exit codes {codes}\n{said[-2000:]}")
        promise("Restart 1 of 3: " in said, f"no restart was reported:\n{said[-2000:]}")
        expect_same(view.the_run(), expected)
        return _redone(said, reached)


def _both_undisturbed(folder: Path, *machines: str) -> Path:
    folder.mkdir()
    codes = [process.wait(LIMIT_S) for process in [_typed_on(machine, ONE_EACH, folder) for machine in machines]]
    promise(codes == [0, 0], f"exit codes {codes} without a fault\n{_said(folder, machines[0])[-2000:]}")
    return View(folder).the_run()


def _typed_on(machine: str, line: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SSLBENCH_"))
    }
    with (folder / f"{machine}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", machine, sys.executable, "-m", "sslbench", *line.split()],
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _said(folder: Path, machine: str) -> str:
    return (folder / f"{machine}.log").read_text(errors="replace")


def _wait(moment: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not moment():
        promise(time.monotonic() < deadline, f"nothing for {LIMIT_S} s")
        promise(all(process.poll() is None for process in processes), "a launcher ended before")
        time.sleep(0.02)


@contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2.

    Raises:
        PermissionError: this user may not make any.
    """
    names = (f"sslbench-a{os.getpid()}", f"sslbench-b{os.getpid()}")
    try:
        for name in names:
            _ip(f"netns add {name}")
        ends = (f"va{os.getpid()}", f"vb{os.getpid()}")
        _ip(f"link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}")
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            _ip(f"-n {name} addr add 10.77.0.{number}/24 dev {end}")
            _ip(f"-n {name} link set {end} up")
            _ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            with suppress(PermissionError):
                _ip(f"netns del {name}")


def _ip(words: str) -> None:
    try:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"ip {words}: {getattr(error, 'stderr', None) or error}") from error


_SAME = "same files, bits, curves, results"
FAULTS = [
    Fault("SIGKILL of one of two ranks", trials(a_rank_is_killed, f"{_SAME}, store, by the launcher alone"), 5),
    Fault("SIGTERM or SIGUSR1 at the launcher", trials(the_launcher_is_asked_to_stop, f"exit 75; {_SAME}"), 3),
    Fault("SIGSTOP of one of two ranks", trials(a_rank_hangs, f"noticed in time; {_SAME}"), 2),
    Fault(
        "SIGKILL of one of two machines' launchers, started again",
        trials(a_machine_is_killed, f"joined; {_SAME}"),
        2,
    ),
]
