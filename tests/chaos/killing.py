"""SIGKILL at any moment, and signals that ask a run to stop."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos.children import NOWHERE, BrokenPromiseError, Child, promise, put_database, ranks, typed
from chaos.fault import Fault
from chaos.runs import (
    RESUME,
    RUN,
    STEPS,
    View,
    expect_close,
    expect_same,
    expect_stored,
    newest,
    resumed_after,
    whole,
)
from chaos.servers import expect_recorded
from chaos.trials import Trial, trials

ATTEMPTS = 20
"""How often a trial is begun anew because the run was past the moment when the signal arrived."""


@dataclass(frozen=True)
class Moment:
    """A moment of a run, as it is seen from outside."""

    comes: Callable[[View], bool]
    pause_s: float
    hit: Callable[[View], bool]
    """Afterwards: whether the signal arrived in it."""


Choose = Callable[[random.Random], Moment]


def in_a_step(rng: random.Random) -> Moment:
    number = rng.randrange(1, STEPS)
    return Moment(
        lambda view: view.last_step() >= number,
        rng.uniform(0, 0.04),
        lambda view: not _saving(view) and view.last_step() < STEPS,
    )


def in_a_save(rng: random.Random) -> Moment:
    number = rng.randrange(0, STEPS - 2)
    file = rng.choice(["", "/backbone.pt", "/state.pt", "/meta.json"])
    return Moment(
        lambda view: view.last_step() >= number and view.any(f"checkpoints/step-*.partial{file}"), 0.0, _saving
    )


def in_an_evaluation(rng: random.Random) -> Moment:
    trace = rng.choice(["runs/.features/*", "runs/digits/*/artifacts/evals/*/*", "runs/digits/*/artifacts/evals"])
    return Moment(
        lambda view: view.status_or("") == "FINISHED" and any(view.path.glob(trace)),
        rng.uniform(0, 0.2),
        lambda view: view.status_or("") == "FINISHED" and len(list(view.path.glob(_RESULTS))) < 2,
    )


def in_the_migration(rng: random.Random) -> Moment:
    size = rng.randrange(1, 400_000)
    return Moment(
        lambda view: view.size(".mlflow.db.new") >= size, 0.0, lambda view: not (view.path / "mlflow.db").exists()
    )


_RESULTS = "runs/digits/*/artifacts/evals/*/*/result.json"


def _saving(view: View) -> bool:
    return view.any("checkpoints/*.partial")


def killed(choose: Choose, *, migrated: bool = True) -> Trial:
    """Kill a run once, resume it, and compare it with one that nobody disturbed."""

    def trial(folder: Path, rng: random.Random) -> int:
        expected = whole()
        view = hit(choose, rng, folder, Child.kill, migrated)
        reached = view.last_step()
        said = typed(RESUME if view.resumable() else RUN, view.path)
        typed("sync last", view.path)
        expect_same(view.the_run(), expected)
        expect_stored(view.the_run(), view.path / "mlflow.db")
        expect_recorded(view.the_run(), view.path / "mlflow.db")
        return max(0, min(reached, STEPS) - resumed_after(said)) if "Resuming" in said else reached

    return trial


def hit(
    choose: Choose, rng: random.Random, folder: Path, blow: Callable[[Child], bool], migrated: bool = True
) -> View:
    """Begin runs until one is hit in the moment; its folder."""
    for attempt in range(ATTEMPTS):
        moment = choose(rng)
        view = View(folder / f"attempt-{attempt}")
        view.path.mkdir()
        if migrated:
            put_database(view.path)
        child = Child(RUN, view.path)
        came = child.wait_for(lambda: moment.comes(view))  # noqa: B023 - called before the next one
        time.sleep(moment.pause_s)
        if blow(child) and came and moment.hit(view):
            return view
    raise BrokenPromiseError(f"the moment was missed {ATTEMPTS} times")


def again_and_again(folder: Path, rng: random.Random) -> int:
    """Kill one run at one moment after the other, from the migration of its store to its last evaluation."""
    view = View(folder)
    planned = moments(rng)
    kills = {name: _killed_at(comes, view) for name, comes in planned.items()}
    promise(sum(kills.values()) >= 10, f"too few kills: {kills}")
    typed(RESUME, folder)
    typed("sync last", folder)
    expect_same(view.the_run(), whole())
    expect_stored(view.the_run(), folder / "mlflow.db")
    expect_recorded(view.the_run(), folder / "mlflow.db")
    return 0


def moments(rng: random.Random) -> dict[str, Callable[[View], bool]]:
    """In the order in which they come up; drawn anew for every seed where there is a choice."""
    steps = sorted(rng.sample(range(5, 18), 3))
    size = rng.randrange(1, 400_000)
    return {
        "migration": lambda view: view.size(".mlflow.db.new") > size,
        "database before a run": lambda view: view.size("mlflow.db") > 0,
        "first record": lambda view: view.run_dir() is not None,
        "first step": _step(rng.randrange(1, 3)),
        "first save": lambda view: view.any("checkpoints/step-*.partial"),
        "first checkpoint": View.resumable,
        **{f"step {number}": _step(number) for number in steps},
        "probe": lambda view: view.last_step() >= STEPS // 2 and "probe/" not in view.journal()[-1],
        "a later save": lambda view: view.last_step() > steps[-1] and _saving(view),
        "last step": _step(STEPS),
        "features": lambda view: any((view.path / "runs").glob(".features/*")),
        "first result": lambda view: view.any("evals/*/knn/result.json"),
        "second evaluation": lambda view: view.any("evals/*/linear/*"),
    }


def _step(number: int) -> Callable[[View], bool]:
    return lambda view: view.last_step() >= number


def _killed_at(comes: Callable[[View], bool], view: View) -> bool:
    """Go on with the run, and kill it; False if it was over before."""
    child = Child(RESUME if view.resumable() else RUN, view.path)
    child.wait_for(lambda: comes(view))
    return child.kill()


def stopped(number: signal.Signals) -> Trial:
    """Ask a run to stop at any moment of its training: it loses nothing."""

    def trial(folder: Path, rng: random.Random) -> int:
        expected = whole()
        view, said = _asked_to_stop(folder, rng, number)
        reached = view.last_step()
        promise(f"stopped by {number.name}; the state is saved" in said, said[-1000:])
        promise("sslbench pretrain --resume killed" in said, "it does not say how to go on")
        promise(newest(view.the_run()).name == f"step-{reached:08d}", f"step {reached} is not saved")
        promise(view.status() == "KILLED", f"its status is {view.status()}")
        lost = reached - resumed_after(typed(RESUME, view.path))
        expect_same(view.the_run(), expected)
        return lost

    return trial


def _asked_to_stop(folder: Path, rng: random.Random, number: signal.Signals) -> tuple[View, str]:
    for attempt in range(ATTEMPTS):
        view = View(folder / f"attempt-{attempt}")
        view.path.mkdir()
        child = Child(f"{RUN} run.tracking_uri={NOWHERE}", view.path)
        moment = in_a_step(rng) if rng.random() < 0.5 else in_a_save(rng)
        child.wait_for(lambda: moment.comes(view))  # noqa: B023 - called before the next one
        time.sleep(moment.pause_s)
        if child.running and view.last_step() < STEPS - 1:
            child.send(number)
            said = child.end(75)
            if view.last_step() < STEPS - 1:  # the checkpoint of a later stop would be one of those that are kept
                return view, said
        child.kill()
    raise BrokenPromiseError(f"the run was over {ATTEMPTS} times")


def stopped_late(folder: Path, rng: random.Random) -> int:
    """Ask a run to stop after its last step, or in its first evaluation: the rest can be had by resuming."""
    expected, view = whole(), View(folder)
    child = Child(f"{RUN} run.tracking_uri={NOWHERE}", folder)
    promise(child.wait_for(lambda: view.last_step() >= STEPS), "it ended before")
    time.sleep(rng.uniform(0, 0.3))
    child.send(signal.SIGTERM)
    said = child.end(75)
    promise(any(f"stopped by SIGTERM; {words}" in said for words in _LATE), said[-1000:])
    promise(view.status() == "FINISHED", f"its status is {view.status()}")
    promise(len(list(folder.glob(_RESULTS))) < 2, "all evaluations are there")
    typed(RESUME, folder)
    expect_same(view.the_run(), expected)
    return 0


_LATE = ("training is complete, the model is kept", "the model and finished evaluations are kept")
PLUGIN = Path(__file__).with_name("contrast.py")
WORLDS = (
    f"-p {PLUGIN} pretrain --method contrast --backbone plain --dataset digits train.batch_size=64 train.epochs=1 "
    "optim.name=sgd optim.lr=0.1 train.log_every=1 data.workers=0 probe.every=0 checkpoint.every_steps=2 "
    "checkpoint.keep=2 run.evals=[] run.name=worlds"
)
GO_ON = f"-p {PLUGIN} pretrain --resume last"


def all_killed(
    line: str, world: int, folder: Path, rng: random.Random, comes: Callable[[View, Child], bool]
) -> View:
    """Begin runs of so many ranks until the first blow hits one in the moment; its folder. No rank survives."""
    for attempt in range(ATTEMPTS):
        view = View(folder / f"attempt-{attempt}")
        view.path.mkdir()
        children = ranks(line, view.path, world)
        first = children[0]
        came = first.wait_for(lambda: comes(view, first))  # noqa: B023 - called before the next one
        time.sleep(rng.uniform(0, 0.02))
        rng.shuffle(children)
        blows = [child.kill() for child in children]  # the others may have ended when they lost contact
        if came and blows[0] and view.status() != "FINISHED":
            return view
    raise BrokenPromiseError(f"the moment was missed {ATTEMPTS} times")


def moved(before: int, after: int) -> Trial:
    """Kill a run of so many ranks, and go on with another number of them."""

    def trial(folder: Path, rng: random.Random) -> int:
        expected = whole(WORLDS)
        number = rng.randrange(3, 20)
        line = f"{WORLDS} run.tracking_uri={NOWHERE}"
        view = all_killed(
            line, before, folder, rng, lambda view, _: view.last_step() >= number and view.resumable()
        )
        reached = view.last_step()
        goes_on = ranks(GO_ON, view.path, after)
        said = [child.end() for child in goes_on]
        expect_close(view.the_run(), expected)
        return reached - resumed_after(said[0])

    return trial


def one_of_two_stopped(folder: Path, rng: random.Random) -> int:
    """SIGTERM reaches one of two ranks only: both stop after the same step."""
    expected = whole(WORLDS)
    view, number = View(folder), rng.randrange(3, 18)
    children = ranks(f"{WORLDS} run.tracking_uri={NOWHERE}", folder, 2)
    children[0].wait_for(lambda: view.last_step() >= number)
    rng.choice(children).send(signal.SIGTERM)
    for child in children:
        child.end(75)
    reached = view.last_step()
    said = [child.end() for child in ranks(GO_ON, folder, 2)]
    expect_close(view.the_run(), expected)
    return reached - resumed_after(said[0])


BITS = "files, weights, optimiser, curves, results bit for bit as undisturbed"
STORE = f"{BITS}; the store complete"
CLOSE = "weights and losses as undisturbed on one rank, within 1e-4"

FAULTS = [
    Fault("SIGKILL in a step", trials(killed(in_a_step), STORE), 6, quick=1),
    Fault("SIGKILL in a save", trials(killed(in_a_save), STORE), 6),
    Fault("SIGKILL in an evaluation", trials(killed(in_an_evaluation), STORE), 4),
    Fault("SIGKILL in MLflow's first migration", trials(killed(in_the_migration, migrated=False), STORE), 4),
    Fault("SIGKILL at ten moments of one run or more", trials(again_and_again, STORE), 1),
    Fault("SIGKILL on 1 rank, resume on 2", trials(moved(1, 2), CLOSE), 4),
    Fault("SIGKILL on 2 ranks, resume on 1", trials(moved(2, 1), CLOSE), 4),
    Fault("SIGTERM", trials(stopped(signal.SIGTERM), f"exit 75; {BITS}"), 5),
    Fault("SIGUSR1", trials(stopped(signal.SIGUSR1), f"exit 75; {BITS}"), 5),
    Fault("SIGTERM after the last step", trials(stopped_late, f"exit 75; {BITS}"), 6, quick=1),
    Fault("SIGTERM to one of two ranks", trials(one_of_two_stopped, f"both exit 75; {CLOSE}"), 4),
]
