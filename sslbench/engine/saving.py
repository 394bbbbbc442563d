"""When and where a checkpoint is written: beside training, in turn, and old ones removed."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslbench.engine import checkpoint
from sslbench.engine.checkpoint import CheckpointMeta


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk, and those that made room for it."""

    path: Path
    meta: CheckpointMeta
    removed: list[Path]


class Saver:
    """Writes the checkpoints of a run, one after the other.

    Args:
        background: copy the state to host memory and write it in a thread, so that training goes on meanwhile. The
            next checkpoint waits for it. A failure is reported by whatever is called next.
    """

    def __init__(self, run_dir: Path, *, keep: int, keep_epochs: int | None, background: bool) -> None:
        self.run_dir = run_dir
        self._retention = Retention(run_dir, keep, keep_epochs)
        self._on_host = HostCopy()
        self._thread = ThreadPoolExecutor(1, "sslbench-checkpoint") if background else None
        self._pending: Future[Saved] | None = None
        self._saved: list[Saved] = []

    def save(self, meta: CheckpointMeta, backbone: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint.

        Raises:
            CheckpointError: this one, or the one before, could not be written.
        """
        self._settle()
        if self._thread is None:
            self._saved.append(self._write(meta, backbone, state))
            return
        copied = self._on_host({"backbone": backbone, "state": state})
        self._pending = self._thread.submit(self._write, meta, copied["backbone"], copied["state"])

    def finished(self, *, wait: bool = False) -> list[Saved]:
        """Those that were completed since the last call.

        Args:
            wait: until nothing is being written.

        Raises:
            CheckpointError: one could not be written.
        """
        if wait or (self._pending is not None and self._pending.done()):
            self._settle()
        done, self._saved = self._saved, []
        return done

    def make_room(self, step: int) -> None:
        """Delete what the checkpoint of a step makes superfluous, if the process that wrote it could not."""
        written = [path for path in checkpoint.list_checkpoints(self.run_dir) if checkpoint.step_of(path) == step]
        for path in written:
            self._retention.add(path, None)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._saved.append(pending.result())

    def _write(self, meta: CheckpointMeta, backbone: Mapping[str, Any], state: Mapping[str, Any]) -> Saved:
        path = checkpoint.save(self.run_dir, meta, backbone, state)
        return Saved(path, meta, self._retention.add(path, meta.epoch))

    def close(self) -> None:
        """End the thread; what it is writing is completed first."""
        if self._thread is not None:
            self._thread.shutdown()


class HostCopy:
    """Copies of tensors in host memory, in which the next call puts its own: new memory costs as much as copying.

    Tensors that are in several places are copied once. On CUDA the memory is page-locked, and all copies are under
    way at the same time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, tree: Any) -> Any:
        """The same mapping with copies in place of tensors."""
        self._copied = {}
        found = self._copy(tree, "")
        if any(buffer.is_pinned() for buffer in self._copied.values()):
            torch.cuda.synchronize()
        return found

    def _copy(self, tree: Any, path: str) -> Any:
        if isinstance(tree, Mapping):
            return {key: self._copy(value, f"{path}/{key}") for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value, f"{path}/{number}") for number, value in enumerate(tree))
        return self._tensor(tree, path) if isinstance(tree, Tensor) else tree

    def _tensor(self, tensor: Tensor, path: str) -> Tensor:
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._copied or not tensor.numel():
            self._copied[key] = self._buffer(tensor, path).copy_(tensor, non_blocking=True)
        return self._copied[key]

    def _buffer(self, tensor: Tensor, path: str) -> Tensor:
        known = self._buffers.get(path)
        if known is None or (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
            known = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[path] = known
        return known


class Retention:
    """Decides which checkpoints stay. Each is looked at once, however many are kept.

    Args:
        keep: how many of the newest stay.
        keep_epochs: those whose epoch is a multiple of this stay as well.
    """

    def __init__(self, run_dir: Path, keep: int, keep_epochs: int | None) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.keep_epochs = keep_epochs
        self._newest: deque[tuple[Path, int | None]] | None = None

    def add(self, path: Path, epoch: int | None) -> list[Path]:
        """Take note of a new checkpoint and delete what it makes superfluous; returns the deleted folders.

        Args:
            epoch: None: read it when it is needed.
        """
        if self._newest is None:
            _sweep(path.parent)
            self._newest = deque((old, None) for old in checkpoint.list_checkpoints(self.run_dir))
        # Later ones are what a resumed run has passed over as damaged: they must not crowd out good ones.
        while self._newest and self._newest[-1][0].name >= path.name:
            self._newest.pop()
        self._newest.append((path, epoch))
        old = [self._newest.popleft() for _ in range(len(self._newest) - self.keep)]
        deleted = [path for path, epoch in old if not self._stays(path, epoch)]
        for path in deleted:
            _delete(path)
        return deleted

    def _stays(self, path: Path, epoch: int | None) -> bool:
        if not self.keep_epochs:
            return False
        epoch = checkpoint.epoch_of(path) if epoch is None else epoch
        return epoch is not None and epoch % self.keep_epochs == 0


def _sweep(folder: Path) -> None:
    """Remove what killed processes left: checkpoints not completed, and deleted ones whose folder remained."""
    for begun in folder.glob("step-????????.partial"):
        shutil.rmtree(begun, ignore_errors=True)
    for left in folder.glob("step-????????"):
        with suppress(OSError):  # it is not empty
            left.rmdir()


def _delete(path: Path) -> None:
    """meta.json last: whoever is killed half way leaves something that still counts as a checkpoint to delete."""
    with suppress(OSError):
        for name in (checkpoint.STATE, checkpoint.BACKBONE):
            (path / name).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
