"""Disks that fill up during a save, and checkpoints that are damaged afterwards."""

from __future__ import annotations

import atexit
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from chaos.children import NOWHERE, Child, promise, typed
from chaos.fault import Fault
from chaos.mounts import small_disk
from chaos.runs import RESUME, RUN, STEPS, View, expect_same, newest, results, resumed_after, whole
from chaos.trials import Trial, trials
from sslbench.engine.checkpoint import read_meta

FILES = ("state.pt", "backbone.pt", "meta.json")


def full_disk(folder: Path, rng: random.Random) -> int:
    """The disk has room for a part of the next checkpoint."""
    expected = whole()
    line = f"--runs disk/runs {RUN} run.tracking_uri={NOWHERE}"
    with small_disk(folder / "disk", 16) as disk:
        view = View(disk.path)
        child = _running(line, folder, view, rng)
        before = view.checkpoints()
        disk.fill()
        filler = disk.path / "filler"
        needed = sum((before[-1] / name).stat().st_size for name in FILES)
        os.truncate(filler, max(0, filler.stat().st_size - rng.randrange(needed // 8, needed * 7 // 8)))
        said = child.end(5)
        promise("the disk is full" in said, said[-1000:])
        lost = _lost(view, said)
        disk.empty()
        typed(f"--runs disk/runs {RESUME}", folder)
        expect_same(view.the_run(), expected)
    return lost


def short_files(folder: Path, rng: random.Random) -> int:
    """Files may not grow beyond a size that a checkpoint needs and nothing else."""
    expected = whole()
    view = View(folder)
    child = _running(f"{RUN} run.tracking_uri={NOWHERE}", folder, view, rng)
    size = (view.checkpoints()[-1] / "state.pt").stat().st_size
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (rng.randrange(size // 2, size), resource.RLIM_INFINITY))
    lost = _lost(view, child.end(5))
    typed(RESUME, folder)
    expect_same(view.the_run(), expected)
    return lost


def _running(line: str, folder: Path, view: View, rng: random.Random) -> Child:
    """A run that has done some steps and saved some checkpoints."""
    number = rng.randrange(2, STEPS // 2)
    child = Child(line, folder)
    promise(child.wait_for(lambda: view.last_step() >= number and view.resumable()), child.said[-1000:])
    return child


def _lost(view: View, said: str) -> int:
    """Steps since the last checkpoint of a run that could not save; what it had saved must be intact."""
    promise("could not be written" in said or "disk is full" in said, said[-1000:])
    promise("--resume" in said, "it does not say how to go on")
    promise(not view.any("checkpoints/*.partial"), "half a checkpoint was left")
    for kept in view.checkpoints():
        read_meta(kept, verify=True)
    return view.last_step() - int(newest(view.the_run()).name.removeprefix("step-"))


def truncated(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def flipped(file: Path, rng: random.Random) -> None:
    """One bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def removed(file: Path, rng: random.Random) -> None:
    file.unlink()


Damage = Callable[[Path, random.Random], None]


def damaged(damage: Damage, names: tuple[str, ...] = FILES) -> Trial:
    """A file of the newest checkpoint is not what it was: the one before it is used, and that is said."""

    def trial(folder: Path, rng: random.Random) -> int:
        view = finished_run()
        broken = newest(view.the_run())
        damage(broken / rng.choice(names), rng)
        said = typed(RESUME, view.path)
        promise(broken.name in said and "looking for" in said, said[-1000:])
        expect_same(view.the_run(), whole())
        return STEPS - resumed_after(said)

    return trial


def _nowhere(file: Path, rng: random.Random) -> None:
    file.write_text(f'"step-{rng.randrange(STEPS + 1, 99):08d}"')


def _garbage(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(rng.randrange(60)))


def lost_pointer(damage: Damage) -> Trial:
    """LATEST is of no use: the newest intact checkpoint is found, and that is said."""

    def trial(folder: Path, rng: random.Random) -> int:
        view = finished_run()
        pointer = newest(view.the_run()).parent / "LATEST"
        damage(pointer, rng)
        said = typed(RESUME, view.path)
        pointer.touch()  # only the next save would write it again
        promise("LATEST" in said and "looking for" in said, said[-1000:])
        promise(resumed_after(said) == STEPS, f"resumed after step {resumed_after(said)}")
        expect_same(view.the_run(), whole())
        return 0

    return trial


def state_alone(folder: Path, rng: random.Random) -> int:
    """What only training needs is damaged: evaluations go on with the newest checkpoint."""
    view = finished_run()
    before = results(view.the_run())
    rng.choice([truncated, flipped, removed])(newest(view.the_run()) / "state.pt", rng)
    said = typed("eval knn last", view.path)
    promise("damaged" not in said, said[-1000:])
    promise(results(view.the_run()) == before, "other results")
    return 0


def finished_run() -> View:
    """A finished run, whole again after the last trial, in the place that its files name."""
    place, kept = _finished()
    shutil.rmtree(place)
    shutil.copytree(kept, place, symlinks=True)
    return View(place)


@cache
def _finished() -> tuple[Path, Path]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-finished-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    place, kept = folder / "place", folder / "kept"
    place.mkdir()
    typed(f"{RUN} run.tracking_uri={NOWHERE}", place)
    shutil.copytree(place, kept, symlinks=True)
    return place, kept


BITS = "then files, weights, optimiser, curves, results bit for bit as undisturbed"
BEFORE = f"the one before it is used, which is said; {BITS}"
FOUND = f"the newest checkpoint is found, which is said; {BITS}"

FAULTS = [
    Fault("disk full during a save", trials(full_disk, f"exit 5, earlier checkpoints intact; {BITS}"), 6),
    Fault("files may not grow", trials(short_files, f"exit 5, earlier checkpoints intact; {BITS}"), 4),
    Fault("checkpoint truncated", trials(damaged(truncated), BEFORE), 6),
    Fault("a bit of a checkpoint flipped", trials(damaged(flipped), BEFORE), 12, quick=1),
    Fault("file of a checkpoint removed", trials(damaged(removed), BEFORE), 3),
    Fault("LATEST points nowhere", trials(lost_pointer(_nowhere), FOUND), 2),
    Fault("LATEST is removed", trials(lost_pointer(removed), FOUND), 2),
    Fault("LATEST is garbage", trials(lost_pointer(_garbage), FOUND), 4),
    Fault("state.pt damaged, then an evaluation", trials(state_alone, "the newest backbone, the same numbers"), 3),
]
