"""Training that diverges: losses that are no numbers any more."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from chaos.children import NOWHERE, Child, promise, ranks, typed
from chaos.fault import Fault
from chaos.killing import GO_ON, WORLDS, all_killed
from chaos.runs import View, expect_close, expect_same, resumed_after, whole
from chaos.trials import Trial, trials
from sslbench.engine.checkpoint import read_meta, step_of

STEPS = 22
CURE = "train.rollback=2 train.rollback_factor=1e-13"


def diverging(step: int) -> str:
    """A run whose curvature jumps after so many steps: its loss overflows a few steps later."""
    return f"{WORLDS} method.sharp_from={step} run.tracking_uri={NOWHERE}"


def lost(world: int) -> Trial:
    """The error says since when, what, at which rate, and what is left; what is left is good."""

    def trial(folder: Path, rng: random.Random) -> int:
        first = rng.randrange(4, 16)
        log_every = rng.choice([1, 3, 50])
        line = f"{diverging(first)} train.log_every={log_every} checkpoint.every_steps={rng.choice([2, 3, 50])}"
        said, *_ = [child.end(7) for child in ranks(line, folder, world)]
        named = re.search(r"not finite at step (\d+): (.*); learning rate", said)
        promise(named is not None, said[-1000:])
        assert named is not None
        step = int(named[1])
        # Finite when the curvature has jumped, 1e22 times as large with each step from then on.
        promise(
            first + 2 <= step <= first + 3, f"it jumped after step {first} and is said to have diverged at {step}"
        )
        promise("train/loss" in named[2] or "weights" in named[2], f"it names {named[2]}")
        view = View(folder)
        kept = view.checkpoints()
        good = [path for path in kept if step_of(path) < step - 1]
        last = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint yet"
        promise(last in said, said[-1000:])
        for path in kept:
            read_meta(path, verify=True)
        promise(all(_finite(path / "backbone.pt") for path in kept), "a checkpoint is not finite")
        return step - step_of(good[-1]) if good else step

    return trial


def _finite(file: Path) -> bool:
    import torch

    return all(bool(value.isfinite().all()) for value in torch.load(file, weights_only=True).values())


def rolled_back(world: int) -> Trial:
    """It goes back by itself and ends, visibly so; killed after that, it ends with the same bits."""

    def trial(folder: Path, rng: random.Random) -> int:
        first = rng.randrange(5, 14)
        line = f"{diverging(first)} {CURE}"
        expected = whole(line)
        view = all_killed(
            line,
            world,
            folder,
            rng,
            lambda view, child: "roll-back 1 of 2" in child.said and view.last_step() > first + 4,
        )
        reached = view.last_step()
        said, *_ = [child.end() for child in ranks(GO_ON, view.path, world)]
        (expect_same if world == 1 else expect_close)(view.the_run(), expected)
        events = json.loads((view.the_run() / "run.json").read_text())["tags"]["sslbench.rolled_back"]
        promise("lr x 1e-13" in events, events)
        promise("(rolled back)" in typed("list runs", view.path), "list runs does not show it")
        return reached - resumed_after(said)

    return trial


def by_hand(folder: Path, rng: random.Random) -> int:
    """A run that has diverged is resumed with a roll-back."""
    line = diverging(rng.randrange(5, 14))
    Child(line, folder).end(7)
    typed(f"{GO_ON} {CURE}", folder)
    expect_same(View(folder).the_run(), whole(f"{line} {CURE}"))
    return 0


NAMED = (
    "exit 7; the step, scalars, weights, rate and the last good checkpoint are named, which is intact and finite"
)

FAULTS = [
    Fault("NaN loss", trials(lost(1), NAMED), 6, quick=1),
    Fault("NaN loss on two ranks", trials(lost(2), NAMED), 3),
    Fault(
        "NaN loss with roll-back, then SIGKILL", trials(rolled_back(1), "bit for bit as not killed; visible"), 4
    ),
    Fault("NaN loss with roll-back on two ranks", trials(rolled_back(2), "as on one rank, within 1e-4"), 2),
    Fault("NaN loss, resumed with roll-back", trials(by_hand, "bit for bit as rolled back at once"), 2),
]
