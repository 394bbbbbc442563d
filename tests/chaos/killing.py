"""SIGKILL at any moment, and signals that ask a run to stop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos.children import Child, promise, put_database, typed
from chaos.fault import Fault
from chaos.runs import RESUME, RUN, STEPS, View, expect_same, expect_stored, resumed_after, whole
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
    promise(False, f"the moment was missed {ATTEMPTS} times")
    raise AssertionError


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


FAULTS = [
    Fault("SIGKILL in a step", trials(killed(in_a_step), "same files, bits, curves, results, store"), 6, quick=1),
    Fault("SIGKILL in a save", trials(killed(in_a_save), "same files, bits, curves, results, store"), 6, quick=1),
    Fault("SIGKILL in an evaluation", trials(killed(in_an_evaluation), "the same, without training again"), 4),
    Fault(
        "SIGKILL in MLflow's first migration",
        trials(killed(in_the_migration, migrated=False), "a run and a whole store"),
        4,
    ),
    Fault(
        "SIGKILL at 14 moments of one run", trials(again_and_again, "same files, bits, curves, results, store"), 2
    ),
]
