"""Full disks and damaged checkpoints: earlier work stays, the message names the file, the exit code is 5."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults_kit import DIGITS, Command, checkpoints, command, run_dir, status

from sslbench.engine import observe
from sslbench.tracking.journal import Journal

__all__ = ["command"]

RUN = f"pretrain {DIGITS} --no-evals checkpoint.every_steps=1 checkpoint.keep=3"


@pytest.fixture
def small_disk(workdir: Path) -> Iterator[Path]:
    disk = workdir / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


@pytest.mark.parametrize("moment", ["save", pytest.param("metrics", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_keeps_earlier_checkpoints_and_resumes(
    command: Command, small_disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    original = getattr(observe.RunObserver, moment)

    def crowded(self: observe.RunObserver, step: int, *rest: object) -> None:
        if step == 3:
            self.settle()
            fill(small_disk)
        original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(observe.RunObserver, moment, crowded)
        error = command(f"--runs disk/runs {RUN} run.name=full train.log_every=1", 5).err
    assert "the disk is full" in error
    assert "--resume" in error
    assert [path.name for path in checkpoints("full", "disk/runs")] == ["step-00000001", "step-00000002"]
    assert not list(small_disk.rglob("*.partial"))
    (small_disk / "filler").unlink()
    command("--runs disk/runs pretrain --resume full")
    assert checkpoints("full", "disk/runs")[-1].name == "step-00000005"
    assert status("full", "disk/runs") == "FINISHED"
    fill(small_disk)
    assert "the disk is full" in command("--runs disk/runs eval knn full", 5).err
    assert not list(small_disk.rglob("*.partial"))


def test_a_file_that_may_not_grow_is_a_checkpoint_error(command: Command) -> None:
    command(f"{RUN} --limit 1 run.name=limited")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        error = command("pretrain --resume limited train.limit=2", 5).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-00000002 could not be written" in error
    assert [path.name for path in checkpoints("limited")] == ["step-00000001"]
    assert status("limited") == "FAILED"
    command("pretrain --resume limited train.limit=2")


def test_half_a_line_in_the_journal_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(1, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size() + 10, before[1]))
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            journal.append(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.ENOSPC
    journal.append(3, {"loss": 3.0})
    assert [entry.step for entry in journal.entries()] == [1, 3]


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch owned",)


def write_code(file: Path) -> None:
    with file.open("wb") as stream:
        pickle.dump({"method": Code()}, stream, protocol=2)


def sign(folder: Path, name: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"].pop("meta.json", None)  # signed before
    meta["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


def cut(folder: Path) -> None:
    os.truncate(folder / "state.pt", 500)


def flip(folder: Path) -> None:
    content = bytearray((folder / "backbone.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "backbone.pt").write_bytes(content)


def unlink(folder: Path) -> None:
    (folder / "backbone.pt").unlink()


def forget(folder: Path) -> None:
    (folder / "meta.json").unlink()


def foreign(folder: Path) -> None:
    (folder / "meta.json").write_text('{"epoch": 3}')


def unsigned(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": {}}))


def dangling(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "damage",
    [flip, forget, *(pytest.param(f, marks=pytest.mark.slow) for f in (cut, unlink, foreign, unsigned, dangling))],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    command: Command, damage: Callable[[Path], None]
) -> None:
    command(f"{RUN} --limit 3 run.name=hurt")
    whole = torch.load(checkpoints("hurt")[-1] / "backbone.pt", weights_only=True)
    damage(checkpoints("hurt")[-1])
    assert ("step-00000003" in command("eval knn hurt").err) == (damage is not cut), "it needs no state.pt"
    error = command("pretrain --resume hurt").err
    assert "step-00000003" in error
    assert "Resuming after step 2" in error
    again = torch.load(checkpoints("hurt")[-1] / "backbone.pt", weights_only=True)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_without_an_intact_checkpoint_there_is_nothing_to_resume(command: Command) -> None:
    command(f"{RUN} --limit 2 run.name=gone")
    for folder in checkpoints("gone"):
        flip(folder)
    assert "2 damaged" in command("pretrain --resume gone", 5).err
    assert "2 damaged" in command("eval knn gone", 5).err


def test_damaged_later_checkpoints_do_not_crowd_out_good_ones(command: Command) -> None:
    command(f"{RUN} --limit 5 run.name=crowd checkpoint.keep=4")
    for folder in checkpoints("crowd")[-2:]:
        cut(folder)
    command("pretrain --resume crowd train.limit=4 checkpoint.keep=2")
    assert [path.name[-1] for path in checkpoints("crowd")] == ["3", "4", "5"]


@pytest.mark.parametrize("name", ["state.pt", "backbone.pt"])
def test_code_in_a_checkpoint_is_never_run(command: Command, name: str) -> None:
    command(f"{RUN} --limit 2 run.name=trap")
    newest = checkpoints("trap")[-1]
    write_code(newest / name)
    sign(newest, name)
    line = "pretrain --resume trap train.limit=3" if name == "state.pt" else "eval knn trap"
    error = command(line, 5).err
    assert str(newest / name) in error
    assert "could run code" in error
    assert not Path("owned").exists()


def test_code_in_heads_and_cached_features_is_never_run(command: Command) -> None:
    command(f"{RUN} --limit 1 run.name=trap")
    command("eval linear trap")
    head = run_dir("trap") / "evals" / "digits" / "linear" / "head.pt"
    for file in [head, *Path("runs/.features").glob("*/rows-*")]:
        write_code(file)
    assert "sslbench eval linear" in command("eval test trap", 5).err
    assert "is damaged" in command("eval knn trap").err
    assert not Path("owned").exists()


def test_a_state_of_another_model_does_not_fit(command: Command) -> None:
    command(f"{RUN} --limit 2 run.name=other")
    newest = checkpoints("other")[-1]
    for name in ("state.pt", "backbone.pt"):
        torch.save({"x": torch.zeros(3)}, newest / name)
        sign(newest, name)
    assert "no entry 'method'" in command("pretrain --resume other train.limit=3", 5).err
    assert "does not fit backbone 'conv4'" in command("eval knn other", 5).err


@pytest.mark.parametrize("every", [1, 0])
def test_divergence_names_steps_rate_and_the_last_good_checkpoint(command: Command, every: int) -> None:
    steps = f"checkpoint.every_steps={every}" if every else ""
    options = f"{steps} checkpoint.keep=1 optim.name=sgd optim.lr=1e20 run.name=lost"
    error = command(f"pretrain {DIGITS} --no-evals {options}", 7).err
    assert "not finite at step 2: train/loss nan" in error
    assert "gradients of" in error
    assert "learning rate 6.5" in error
    assert "optim.lr=1e+19" in error
    kept = checkpoints("lost")
    assert len(kept) == every
    assert "no good checkpoint yet" in error, "the first step from the one that is there went wrong"
    for folder in kept:
        weights = torch.load(folder / "backbone.pt", weights_only=True)
        assert all(value.isfinite().all() for value in weights.values())
    assert status("lost") == "FAILED"
    command(f"pretrain --config {run_dir('lost') / 'config.yaml'} optim.lr=1e-3 --limit 2 --no-evals")


@pytest.mark.parametrize("deleted", ["completely", "by half", "not yet"])
def test_a_kill_between_a_save_and_its_announcement_is_made_good(command: Command, deleted: str) -> None:
    command(f"pretrain {DIGITS} --no-evals checkpoint.every_steps=1 checkpoint.keep=2 --limit 4 run.name=silent")
    older, newest = kept = checkpoints("silent")
    before = older.with_name("step-00000002")
    if deleted != "completely":
        shutil.copytree(older, before)
    if deleted == "by half":
        (before / "state.pt").unlink()
    record = json.loads((run_dir("silent") / "run.json").read_text())
    right = record["checkpoints"]
    record["checkpoints"] = {f"checkpoints/{path.name}": {"step": int(path.name[5:])} for path in (before, older)}
    (run_dir("silent") / "run.json").write_text(json.dumps(record))

    assert "has all its 4 steps already" in command("pretrain --resume silent").err
    assert checkpoints("silent") == kept
    assert list(json.loads((run_dir("silent") / "run.json").read_text())["checkpoints"].items()) == list(
        right.items()
    )
    assert [Path(path).name for path in right] == [older.name, newest.name]


def test_a_lost_pointer_is_said_and_the_newest_checkpoint_used(command: Command) -> None:
    command(f"{RUN} --limit 2 run.name=pointless")
    newest = checkpoints("pointless")[-1]
    (newest.parent / "LATEST").unlink()
    said = command("pretrain --resume pointless").err
    assert "LATEST is missing; looking for the newest checkpoint" in said
    assert "Resuming after step 2" in said
