"""Images that are missing, unreadable, unlabelled or too few."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chaos.children import typed
from faults_kit import METHOD, NOWHERE, Command, command, make_images, run_dir

__all__ = ["command"]

FOLDER = f"{METHOD} --dataset folder train.batch_size=4 train.epochs=1 data.workers=0"


def damage(root: Path) -> None:
    (root / "train" / "a" / "00.png").write_bytes(b"")
    half = root / "train" / "b" / "01.png"
    half.write_bytes(half.read_bytes()[:120])
    (root / "test" / "a" / "02.png").write_text("no image")


@pytest.mark.parametrize("given", ["", "dataset.root=nowhere", "dataset.root=empty"])
def test_missing_images_say_where_they_were_looked_for(command: Command, given: str) -> None:
    Path("empty").mkdir()
    done = command(f"pretrain {FOLDER} {given}", 4 if given else 2)
    assert given.partition("=")[2] in done.err
    assert "root" in done.err.lower()


def test_splits_and_labels_that_are_missing_skip_evaluations(command: Command) -> None:
    make_images(Path("plain"), ("train",))
    assert "Skipped test" in command(f"pretrain {FOLDER} dataset.root=plain run.evals=[knn,test]").err
    make_images(Path("single"), classes="a", count=16)
    assert "one class only" in command(f"pretrain {FOLDER} dataset.root=single run.evals=[knn]").err


def test_unlabelled_images_pretrain_and_refuse_what_needs_labels(command: Command) -> None:
    make_images(Path("tree"), ("train",), classes="a")
    assert "Skipped knn" in command(f"pretrain {FOLDER} dataset.root=tree/train/a run.evals=[knn] run.name=u").err
    assert "--dataset NAME" in command("eval knn u", 4).err
    supervised = "pretrain --method supervised --backbone conv4 train.batch_size=4 --dataset folder"
    error = command(f"{supervised} dataset.root=tree/train/a", 4).err
    assert "'supervised' learns from labels" in error


def test_few_images(command: Command) -> None:
    make_images(Path("few"), ("train",), count=1)
    assert "exceeds the 2 training images" in command(f"pretrain {FOLDER} dataset.root=few", 2).err


def test_unreadable_images_are_named_and_nothing_starts(command: Command) -> None:
    make_images(Path("bad"))
    damage(Path("bad"))
    error = command(f"pretrain {FOLDER} dataset.root=bad", 4).err
    for word in ("2 unreadable", "bad/train/a/00.png", "bad/train/b/01.png", "data.max_unreadable="):
        assert word in error, error


@pytest.mark.parametrize("resident", ["auto", "off"])
def test_allowed_unreadable_images_are_left_out_and_counted(command: Command, resident: str) -> None:
    make_images(Path("bad"))
    damage(Path("bad"))
    options = f"dataset.root=bad data.max_unreadable=5 data.resident={resident} probe.every=1 run.name=five"
    done = command(f"pretrain {FOLDER} {options} run.evals=[linear,test]")
    assert "bad/test/a/02.png" in done.err
    counted = {
        protocol: json.loads((run_dir("five") / "evals" / "folder-bad" / protocol / "result.json").read_text())
        for protocol in ("linear", "test")
    }
    assert counted["linear"]["unreadable"]["trainval"] == 2
    assert counted["test"]["unreadable"]["test"] == 1
    top1 = counted["test"]["metrics"]["top1"] / 100 * 15
    assert top1 == pytest.approx(round(top1), abs=1e-3), "of the 15 readable images"
    error = command("eval knn five data.max_unreadable=1", 4).err
    assert "bad/train/a/00.png" in error


def test_resuming_on_other_images_is_refused(command: Command) -> None:
    make_images(Path("mine"))
    command(f"pretrain {FOLDER} dataset.root=mine --limit 1 --no-evals run.name=m")
    (Path("mine") / "train" / "a" / "00.png").unlink()
    assert "are not those the run began with" in command("pretrain --resume m train.limit=2", 4).err


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "data.features=host"])
def test_of_two_ranks_one_cannot_read_an_image_and_both_end(workdir: Path, features: str) -> None:
    make_images(Path("images"), count=12)
    data = f"--dataset folder dataset.root=images train.device=cpu run.tracking_uri={NOWHERE}"
    typed(f"pretrain {METHOD} {data} train.batch_size=8 train.epochs=1 run.evals=[]", workdir)
    # Sorted by name the second rank has it; a cache would know the images from before.
    Path("images/train/b/11.png").write_bytes(b"no image")
    said = typed(f"eval knn last --devices 2 k=3 data.cache=false {features}", workdir, code=4)
    assert "11.png" in said
    assert "Traceback" not in said
