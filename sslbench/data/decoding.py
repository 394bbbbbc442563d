"""Worker processes that decode images and cut them into views; on a CPU they also give large views their colours.

Pixels come back through memory that all processes share, in slots that are used again and again: no batch is
copied through a queue, and no page is mapped twice.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslbench.cores import own_cores
from sslbench.data.cache import read_or_reason
from sslbench.data.cropping import Geometry, crop_image, side_of
from sslbench.data.photometric import changes_colors
from sslbench.data.retouch import Retouch, plan, retouch
from sslbench.data.store import next_sample
from sslbench.data.views import ViewExecutor
from sslbench.errors import DataError
from sslbench.plugin.api import Source
from sslbench.plugin.viewspec import ViewSpec
from sslbench.rng import Draws

_MOST_WORKERS = 8
_SMALLEST_TASK = 8
_TASK_BYTES = 16 << 20
_SMALLEST_RETOUCHED = 96
_SHM = "/dev/shm"


class Chunk(NamedTuple):
    """One rank's part of a batch."""

    step: int
    positions: Tensor
    """int64 ``[B]``: positions in the global batch."""
    samples: Tensor
    """int64 ``[B]``: numbers of the samples in the source."""


class Decoded(NamedTuple):
    """The views of a chunk."""

    crops: list[Tensor]
    """Per view uint8 ``[B,3,S,S]``."""
    colored: list[bool]
    """Per view, whether it has its colours already."""
    sizes: Tensor
    """int64 ``[B,2]``: heights and widths of the source images."""
    samples: Tensor
    """int64 ``[B]``: the samples shown, which differ from those asked for where images are unreadable."""
    unreadable: dict[int, str]


class _Task(NamedTuple):
    """What one worker does at a time. No tensors: a queue hands over the memory of each as an open file."""

    slot: int
    step: int
    positions: NDArray[np.int64]
    samples: NDArray[np.int64]
    start: int
    """First of these rows in the batch."""
    total: int
    """Rows of the batch."""


class _Report(NamedTuple):
    """What a worker tells about a task it has done."""

    task: _Task
    sizes: NDArray[np.int64]
    samples: NDArray[np.int64]
    unreadable: dict[int, str]


def default_workers() -> int:
    """One worker per core of this process's share of the machine, 8 at most."""
    return min(_MOST_WORKERS, own_cores())


class Decoder:
    """Chunk to views; a pure function of (seed, chunk) and the source, each row of its own position alone.

    Args:
        source: the images.
        samples: int64 ``[M]``, those in use; unreadable ones are replaced by others of them.
        views: supplies the geometry; only its CPU side is used.
        seed: the run's seed.
    """

    def __init__(self, source: Source, samples: Tensor, views: ViewExecutor, seed: int) -> None:
        self.source = source
        self.samples = samples.sort().values
        self.seed = seed
        self.pinned = views.device.type == "cuda"
        by_workers = views.device.type == "cpu" and views.colors == "exact"
        self.colored = [by_workers and _is_retouched(spec) for spec in views.specs]
        # A copy on the CPU, so that no worker touches an accelerator.
        self.views = ViewExecutor(views.specs, size=1, mean=(0.0,) * 3, std=(1.0,) * 3, device=torch.device("cpu"))

    def room(self, *shape: int, pinned: bool = False) -> list[Tensor]:
        """Memory for the pixels of ``shape`` images: per view uint8 ``[*shape,3,S,S]``."""
        sides = [side_of(spec) for spec in self.views.specs]
        return [torch.empty(*shape, 3, side, side, dtype=torch.uint8, pin_memory=pinned) for side in sides]

    def fill(self, chunk: Chunk, room: list[Tensor]) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Write the views of a chunk into ``room``; the rest of what :class:`Decoded` says is returned."""
        unreadable: dict[int, str] = {}
        shown, images = zip(*(self._read(number, unreadable) for number in chunk.samples.tolist()), strict=True)
        sizes = torch.tensor([image.shape[-2:] for image in images])
        draws = Draws(self.seed, chunk.step, chunk.positions)
        geometry = self.views.geometry(draws, sizes)
        colors = [
            plan(spec, draws, f"view{number}") if colored else [None] * len(images)
            for number, (spec, colored) in enumerate(zip(self.views.specs, self.colored, strict=True))
        ]
        with torch.inference_mode():  # spares bookkeeping; only what is written into the room outlives it
            for row, image in enumerate(images):
                crops = crop_image(image, self.views.specs, [_row(where, row) for where in geometry])
                for spec, crop, what, out in zip(self.views.specs, crops, colors, room, strict=True):
                    _write(crop, spec, what[row], out[row])
        return sizes, torch.tensor(shown), unreadable

    def _read(self, number: int, unreadable: dict[int, str]) -> tuple[int, Tensor]:
        """The image, or the next readable one."""
        image = read_or_reason(self.source, number)
        while isinstance(image, str):
            unreadable[number] = image
            number = next_sample(number, self.samples, unreadable)
            image = read_or_reason(self.source, number)
        return number, image


def _is_retouched(spec: ViewSpec) -> bool:
    """Whether workers give such a view its colours: small ones gain more by operations on the whole batch."""
    return changes_colors(spec) and side_of(spec) >= _SMALLEST_RETOUCHED


def _write(crop: Tensor, spec: ViewSpec, what: Retouch | None, out: Tensor) -> None:
    if what is None:
        out.copy_(crop)
    else:
        retouch(crop, spec, what, out)


def _row(geometry: Geometry, row: int) -> Geometry:
    return Geometry(*(part[row : row + 1] for part in geometry))


def decode(decoder: Decoder, batches: Iterable[Chunk], workers: int) -> Iterator[Decoded]:
    """Decode batches in order, in worker processes (``workers=0``: in this one).

    The workers end when the iterator is exhausted or closed.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = itertools.chain([first], batches)
    if workers == 0:
        yield from (_decode_here(decoder, chunk) for chunk in batches)
    else:
        yield from _decode_elsewhere(decoder, batches, workers, len(first.samples))


def _decode_here(decoder: Decoder, chunk: Chunk) -> Decoded:
    room = decoder.room(len(chunk.samples), pinned=decoder.pinned)
    return Decoded(room, decoder.colored, *decoder.fill(chunk, room))


def _decode_elsewhere(decoder: Decoder, batches: Iterable[Chunk], workers: int, usual: int) -> Iterator[Decoded]:
    """Decode in worker processes, which stay about two batches of the usual size ahead."""
    bytes_per_image = sum(view.numel() for view in decoder.room(1))
    rows = max(_SMALLEST_TASK, min(-(-usual // workers), _TASK_BYTES // bytes_per_image))
    ahead = max(2, -(-2 * usual // (rows * workers)))
    # The loader hands out tasks up to ahead*workers beyond the one it returns, which is copied before the next.
    slots = ahead * workers + 1
    shared = [shared_pixels(slots, *view.shape) for view in decoder.room(rows)]
    loader = DataLoader(
        _Workshop(decoder, shared),
        sampler=_cut(batches, rows, slots),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        prefetch_factor=ahead,
        generator=torch.Generator(),  # without one, each loader would advance torch's global generator
    )
    yield from _assemble(decoder, shared, loader)


def shared_pixels(*shape: int) -> Tensor:
    """uint8 memory that worker processes write to.

    Processes that are forked share any memory that is mapped for sharing. What torch shares is a file in /dev/shm,
    which containers make small (64 MiB in Docker): without room for a page, whoever writes to it gets a bus error.

    Raises:
        DataError: processes are not forked here, and /dev/shm is too small.
    """
    size = math.prod(shape)
    if torch.multiprocessing.get_start_method() == "fork":
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(shape)
    free = shutil.disk_usage(_SHM).free if os.path.isdir(_SHM) else size
    if free < size:
        raise DataError(
            f"{_SHM} has {free >> 20} MiB free, and decoding processes hand over images in {-(-size >> 20)} MiB",
            hint="docker run --shm-size=8g, or data.workers=0 to decode in the training process",
        )
    return torch.empty(shape, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call,no-any-return]


class _Workshop(Dataset[_Report]):
    """The workers' side: tasks to filled slots."""

    def __init__(self, decoder: Decoder, shared: list[Tensor]) -> None:
        self.decoder = decoder
        self.shared = shared

    def __getitem__(self, task: _Task) -> _Report:
        chunk = Chunk(task.step, torch.from_numpy(task.positions), torch.from_numpy(task.samples))
        sizes, samples, unreadable = self.decoder.fill(chunk, _filled(self.shared, task))
        return _Report(task, sizes.numpy(), samples.numpy(), unreadable)


def _filled(shared: list[Tensor], task: _Task) -> list[Tensor]:
    return [view[task.slot, : len(task.samples)] for view in shared]


def _cut(batches: Iterable[Chunk], rows: int, slots: int) -> Iterator[_Task]:
    """Cut each batch so that all workers share it: the first one arrives sooner than with a batch per worker."""
    slot = itertools.cycle(range(slots))
    for step, positions, samples in batches:
        for start in range(0, len(samples), rows):
            part = slice(start, start + rows)
            yield _Task(
                next(slot), step, positions[part].numpy(), samples[part].numpy(), start, total=len(samples)
            )


def _assemble(decoder: Decoder, shared: list[Tensor], reports: Iterable[_Report]) -> Iterator[Decoded]:
    """Copy the tasks' rows out of their slots into whole batches."""
    parts: list[_Report] = []
    crops: list[Tensor] = []
    for report in reports:
        start, total = report.task.start, report.task.total
        crops = crops if parts else decoder.room(total, pinned=decoder.pinned)
        for batch, view in zip(crops, _filled(shared, report.task), strict=True):
            batch[start : start + len(view)] = view
        parts.append(report)
        if start + len(report.samples) == total:
            yield _whole(decoder, crops, parts)
            parts = []


def _whole(decoder: Decoder, crops: list[Tensor], parts: Sequence[_Report]) -> Decoded:
    unreadable: dict[int, str] = {}
    for part in parts:
        unreadable |= part.unreadable
    sizes, samples = (
        torch.from_numpy(np.concatenate(values))
        for values in ([part.sizes for part in parts], [part.samples for part in parts])
    )
    return Decoded(crops, decoder.colored, sizes, samples, unreadable)


def _unchanged(report: Any) -> Any:
    return report


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # The training process decides what a signal means; a worker that died of it would turn a stop into an error.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
