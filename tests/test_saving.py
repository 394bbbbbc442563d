"""Checkpoints written beside training: what they hold, what stays, and how failures are told."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sslbench.engine import checkpoint
from sslbench.engine.checkpoint import BackboneMeta, CheckpointMeta
from sslbench.engine.saving import HostCopy, Saver
from sslbench.errors import CheckpointError


def meta(step: int, epoch: int = 0) -> CheckpointMeta:
    backbone = BackboneMeta(name="b", options={}, image_size=8, dim=2, stride=1)
    return CheckpointMeta(
        step=step, epoch=epoch, method="m", uses_labels=False, limited=False, seed=1, backbone=backbone,
        dataset="d", dataset_fingerprint="f", mean=(0, 0, 0), std=(1, 1, 1), config_hash="h", plugins=[],
        sslbench="0",
    )  # fmt: skip


def saver(folder: Path, *, keep: int = 2, keep_epochs: int | None = None, background: bool = True) -> Saver:
    return Saver(folder, keep=keep, keep_epochs=keep_epochs, background=background)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_what_was_there_when_it_began(tmp_path: Path, background: bool) -> None:
    weights = torch.arange(1000.0)
    writer = saver(tmp_path, background=background)
    for step in (1, 2):
        writer.save(meta(step), {"w": weights}, {"w": weights, "tied": weights, "step": step})
        weights += 1  # training goes on
    done = [*writer.finished(wait=True)]
    assert [saved.meta.step for saved in done] == [1, 2]
    for saved in done:
        checkpoint.read_meta(saved.path, verify=True)
        state = checkpoint.load_tensors(saved.path / "state.pt")
        assert torch.equal(state["w"], torch.arange(1000.0) + saved.meta.step - 1)
        assert torch.equal(state["tied"], state["w"])
    writer.close()


def test_copies_keep_values_layouts_and_ties() -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    copy = HostCopy()({"a": image, "b": [image, (torch.tensor(3), "word")], "e": torch.empty(0)})
    assert torch.equal(copy["a"], image)
    assert copy["a"].stride() == image.stride()
    assert copy["b"][0] is copy["a"]
    assert copy["b"][1] == (torch.tensor(3), "word")
    assert copy["a"].data_ptr() != image.data_ptr()


def test_a_failure_in_the_background_is_told_by_the_next_call(tmp_path: Path) -> None:
    writer = saver(tmp_path)
    writer.save(meta(1), {"w": torch.zeros(10)}, {})
    writer.finished(wait=True)
    with file_limit(10_000):
        writer.save(meta(2), {"w": torch.zeros(100_000)}, {})
        with pytest.raises(CheckpointError, match="step-00000002 could not be written"):
            writer.finished(wait=True)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    writer.close()


def test_retention_keeps_the_newest_and_some_epochs_across_processes(tmp_path: Path) -> None:
    for first, last in ((1, 5), (6, 9)):
        writer = saver(tmp_path, keep=2, keep_epochs=3, background=False)
        for step in range(first, last + 1):
            writer.save(meta(step, epoch=step), {}, {})
    kept = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)]
    assert kept == [3, 6, 8, 9]


def test_meta_json_vouches_for_itself(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, meta(1), {}, {})
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace('"seed": 1', '"seed": 3'))
    with pytest.raises(CheckpointError, match="its own SHA-256"):
        checkpoint.read_meta(path, verify=False)


@pytest.mark.parametrize("content", ["", "7", '"../../elsewhere"', '"step-00000009"'])
def test_a_pointer_of_no_use_is_told_and_the_newest_is_found(tmp_path: Path, content: str) -> None:
    said: list[str] = []
    path = checkpoint.save(tmp_path, meta(1), {}, {})
    (path.parent / "LATEST").write_text(content)
    assert checkpoint.latest(tmp_path, said.append) == path
    assert "LATEST" in said[0]


def test_only_what_is_needed_must_be_intact(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, meta(step), {}, {}) for step in (1, 2)]
    os.truncate(paths[1] / "state.pt", 3)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append, ["backbone.pt"]) == paths[1]
    assert not said
    assert checkpoint.latest(tmp_path, said.append) == paths[0]
    assert "state.pt" in said[0]


def test_what_killed_processes_left_is_removed_and_anything_else_stays(tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.FOLDER
    (folder / "step-00000001.partial").mkdir(parents=True)
    (folder / "step-00000001.partial" / "backbone.pt").write_bytes(b"begun")
    (folder / "step-00000002").mkdir()  # deleted but for the folder itself
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / "state.pt").write_bytes(b"of somebody who lost its meta.json")
    writer = saver(tmp_path)
    writer.save(meta(4), {}, {})
    writer.finished(wait=True)
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000003", "step-00000004"]
