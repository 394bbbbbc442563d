"""Worker processes that decode and crop images and leave everything else to the training process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslbench.data.cache import read_or_reason
from sslbench.data.cropping import Geometry, crop_image
from sslbench.data.imagefile import cores
from sslbench.data.store import next_sample
from sslbench.data.views import ViewExecutor
from sslbench.plugin.api import Source
from sslbench.rng import Draws

_MOST_WORKERS = 8
_SMALLEST_CHUNK = 8


class Chunk(NamedTuple):
    """Part of one rank's batch: what one worker does at a time."""

    step: int
    positions: Tensor
    """int64 ``[B]``: positions in the global batch."""
    samples: Tensor
    """int64 ``[B]``: numbers of the samples in the source."""
    last: bool = True
    """Whether it completes the batch."""


class Decoded(NamedTuple):
    """A decoded and cropped chunk."""

    crops: list[Tensor]
    """Per view uint8 ``[B,3,S,S]``."""
    sizes: Tensor
    """int64 ``[B,2]``: heights and widths of the source images."""
    samples: Tensor
    """int64 ``[B]``: the samples shown, which differ from those asked for where images are unreadable."""
    unreadable: dict[int, str]
    last: bool = True


def default_workers() -> int:
    """One worker per core of this process's share of the machine, 8 at most."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, cores() // processes))


class Decoder(Dataset[Decoded]):
    """Chunk to decoded crops; a pure function of (seed, chunk) and the source.

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
        # A copy on the CPU, so that no worker touches an accelerator.
        self.views = ViewExecutor(views.specs, size=1, mean=(0.0,) * 3, std=(1.0,) * 3, device=torch.device("cpu"))

    def __getitem__(self, chunk: Chunk) -> Decoded:
        unreadable: dict[int, str] = {}
        shown, images = [], []
        for number in chunk.samples.tolist():
            number, image = self._read(number, unreadable)
            shown.append(number)
            images.append(image)
        sizes = torch.tensor([image.shape[-2:] for image in images])
        geometry = self.views.geometry(Draws(self.seed, chunk.step, chunk.positions), sizes)
        crops = [crop_image(image, self.views.specs, _row(geometry, row)) for row, image in enumerate(images)]
        stacked = [torch.stack(view) for view in zip(*crops, strict=True)]
        return Decoded(stacked, sizes, torch.tensor(shown), unreadable, chunk.last)

    def _read(self, number: int, unreadable: dict[int, str]) -> tuple[int, Tensor]:
        """The image, or the next readable one."""
        image = read_or_reason(self.source, number)
        while isinstance(image, str):
            unreadable[number] = image
            number = next_sample(number, self.samples, unreadable)
            image = read_or_reason(self.source, number)
        return number, image


def _row(geometry: Sequence[Geometry], row: int) -> list[Geometry]:
    return [Geometry(*(part[row : row + 1] for part in view)) for view in geometry]


def decode(decoder: Decoder, batches: Iterable[Chunk], workers: int) -> Iterator[Decoded]:
    """Decode batches in order, in worker processes (``workers=0``: in this one).

    The workers end when the iterator is exhausted or closed.
    """
    if workers == 0:
        yield from map(decoder.__getitem__, batches)
        return
    loader = DataLoader(
        decoder,
        sampler=_cut(batches, workers),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        prefetch_factor=4,
        generator=torch.Generator(),  # without one, each loader would advance torch's global generator
    )
    parts: list[Decoded] = []
    for part in loader:
        parts.append(part)
        if part.last:
            yield _join(parts)
            parts = []


def _cut(batches: Iterable[Chunk], workers: int) -> Iterator[Chunk]:
    """Cut each batch so that all workers share it: the first one arrives sooner than with a batch per worker."""
    for step, positions, samples, _ in batches:
        rows = max(_SMALLEST_CHUNK, -(-len(samples) // workers))
        starts = range(0, len(samples), rows)
        for start in starts:
            part = slice(start, start + rows)
            yield Chunk(step, positions[part], samples[part], last=start == starts[-1])


def _join(parts: list[Decoded]) -> Decoded:
    views = zip(*(part.crops for part in parts), strict=True)
    unreadable: dict[int, str] = {}
    for part in parts:
        unreadable |= part.unreadable
    sizes, samples = torch.cat([part.sizes for part in parts]), torch.cat([part.samples for part in parts])
    return Decoded([torch.cat(view) for view in views], sizes, samples, unreadable)


def _unchanged(decoded: Any) -> Any:
    return decoded


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # The training process decides what a signal means; a worker that died of it would turn a stop into an error.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
