"""Training step to batch, and evaluation splits in order.

The global batch of a step is a pure function of (seed, step): the loader has no position to save, any step can be
the first one, and the number of ranks changes only who computes which rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import tee

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench.config.schema import DataOptions
from sslbench.data.cache import MappedPixels
from sslbench.data.decoding import Chunk, Decoded, Decoder, decode, default_workers
from sslbench.data.prefetch import Batches, prefetched
from sslbench.data.store import ResidentStore, Store, Unreadable, mapped_pixels, next_sample, rows, to_device
from sslbench.data.views import ViewExecutor
from sslbench.errors import ConfigError, DataError
from sslbench.plugin.api import Batch, Source, View
from sslbench.plugin.viewspec import ViewSpec
from sslbench.rng import Draws, derive_seed

logger = logging.getLogger(__name__)

OPEN_BLOCKS = 8
"""How many archives training reads at a time. Eight of the usual 1 GB fit into the page cache of a machine that
trains on so many images, and hold some 70,000 of ImageNet, 17 batches of 4,096: well mixed, and read once."""


def rank_share(total: int, rank: int, world: int) -> range:
    """The contiguous rows of ``total`` that belong to a rank; the first ranks get one more if it is uneven."""
    base, extra = divmod(total, world)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


class TrainLoader:
    """Batches of augmented views by step.

    Args:
        source: the images.
        store: where their pixels are, from :func:`sslbench.data.store.open_store`.
        views: executes the method's view specs.
        seed: the run's seed.
        global_batch: images per step over all ranks; the last partial batch of an epoch is dropped.
        rank, world: this process and how many there are.
        labels: whether batches carry labels.
        indices: int64 ``[M]``, the samples to use; None: all.
        workers: decoding processes; None: one per core, 8 at most; 0: decode in this process.
        device: where batches go.

    Raises:
        ConfigError: the batch is larger than the data set, or has fewer rows than ranks.
        DataError: labels are asked for and there are none.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        views: ViewExecutor,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        labels: bool = False,
        indices: Tensor | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source = source
        self.store = store
        self.views = views
        self.seed = seed
        self.device = torch.device(device)
        self.wait_seconds = 0.0
        """Time that training waited for batches, not what is done for them beside the step before."""
        self._samples = torch.arange(len(source)) if indices is None else indices
        self.num_images = len(self._samples)
        """Training images over all ranks."""
        self.steps_per_epoch = self.num_images // global_batch
        """Full global batches in an epoch."""
        self._workers = default_workers() if workers is None else workers
        self._targets = source.targets if labels else None
        self._global_batch = global_batch
        self._rank, self._world = rank, world
        self._rows = rank_share(global_batch, rank, world)
        blocks = source.blocks
        self._blocks = None if blocks is None else _numbered(blocks[self._samples])
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)
        self._check(labels, world)

    def _check(self, labels: bool, world: int) -> None:
        if self.num_images < self._global_batch:
            raise ConfigError(
                f"train.batch_size={self._global_batch} exceeds the {self.num_images} training images",
                hint=f"train.batch_size={max(2, self.num_images // 4)}",
            )
        if self._global_batch < world:
            raise ConfigError(
                f"train.batch_size={self._global_batch} gives some of {world} processes no image",
                hint=f"train.batch_size={world} or more",
            )
        if labels and self._targets is None:
            raise DataError(
                "this method learns from labels, and the training split has none",
                hint="choose a labelled data set (sslbench list datasets)",
            )

    def epoch_of(self, step: int) -> int:
        """Zero-based epoch of a zero-based step."""
        return step // self.steps_per_epoch

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps ``start_step`` to ``stop_step - 1``.

        Worker processes, if any, end when the iterator is exhausted or closed.

        Raises:
            DataError: more than ``data.max_unreadable`` images are unreadable.
        """
        chunks = (self._chunk(step) for step in range(start_step, stop_step))
        forks = not isinstance(self.store, ResidentStore)
        with closing(prefetched(self._produce(chunks, self.views), self.device, forks=forks)) as batches:
            while (batch := self._timed_next(batches)) is not None:
                yield batch

    @property
    def images(self) -> ImagePasses:
        """Passes over all training images, outside the order of training."""
        return ImagePasses(self)

    def ordered(self, views: ViewExecutor, step: int) -> Iterator[Batch]:
        """This rank's share of all training images in order, in batches of about the global batch's size.

        Args:
            views: what each image is shown in.
            step: of the draws; negative, so that no training step has the same.
        """
        return self._whole_pass(torch.arange(self.num_images), views, step)

    def shuffled(self, views: ViewExecutor, step: int) -> Iterator[Batch]:
        """As :meth:`ordered`, in an order that is a pure function of the seed and ``step``."""
        return self._whole_pass(self._draw_permutation(step, "pass"), views, step)

    def _whole_pass(self, order: Tensor, views: ViewExecutor, step: int) -> Iterator[Batch]:
        chunks = (self._pass_chunk(step, positions) for positions in order.tensor_split(self.steps_per_epoch))
        return self._in_full_precision(self._produce(chunks, views))

    def _in_full_precision(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Views are made in fp32, also for whoever asks for them under autocast."""
        while True:
            with torch.autocast(self.device.type, enabled=False):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _pass_chunk(self, step: int, positions: Tensor) -> Chunk:
        rows = rank_share(len(positions), self._rank, self._world)
        positions = positions[rows.start : rows.stop]
        return Chunk(step, positions, self._samples[positions])

    def _produce(self, chunks: Iterable[Chunk], views: ViewExecutor) -> Batches:
        return (self._resident if isinstance(self.store, ResidentStore) else self._decoded)(chunks, views)

    def _timed_next(self, batches: Iterator[Batch]) -> Batch | None:
        began = time.perf_counter()
        try:
            return next(batches, None)
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _chunk(self, step: int) -> Chunk:
        """This rank's rows of the global batch of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        positions = torch.arange(self._rows.start, self._rows.stop)
        order = self._permutation(epoch)
        return Chunk(step, positions, self._samples[order[number * self._global_batch + positions]])

    def _draw_permutation(self, number: int, kind: str = "epoch") -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, kind, number))
        order = torch.randperm(self.num_images, generator=generator)
        if self._blocks is None:
            return order
        window = _windows(int(self._blocks.max()) + 1, generator)
        return order[window[self._blocks[order]].argsort(stable=True)]

    def _resident(self, chunks: Iterable[Chunk], views: ViewExecutor) -> Batches:
        store = self.store
        assert isinstance(store, ResidentStore)
        shown = _replacements(self._samples, set(store.unreadable.reasons), len(self.source))
        for step, positions, samples in chunks:
            samples = samples if shown is None else shown[samples]
            draws = Draws(self.seed, step, positions)
            sizes = torch.tensor(store.image_size).expand(len(samples), 2)
            geometry = views.geometry(draws, sizes)
            crops = views.crop(store.take(samples), geometry)
            yield self._batch(views.finish(crops, geometry, draws, sizes), samples, draws)

    def _decoded(self, chunks: Iterable[Chunk], views: ViewExecutor) -> Batches:
        decoder = Decoder(self.source, self._samples, views, self.seed)
        asked, decoding = tee(chunks)
        for chunk, decoded in zip(asked, decode(decoder, decoding, self._workers), strict=True):
            self.store.unreadable.add(decoded.unreadable)
            draws = Draws(self.seed, chunk.step, chunk.positions)
            yield self._batch(finish_decoded(views, decoded, draws, self.device), decoded.samples, draws)

    def _batch(self, views: tuple[View, ...], index: Tensor, draws: Draws) -> Batch:
        # A blocking copy would wait until the device has finished the step before.
        labels = None if self._targets is None else self._targets[index].to(self.device, non_blocking=True)
        return Batch(views, index.to(self.device, non_blocking=True), draws, labels)


def _numbered(blocks: Tensor) -> Tensor:
    """The same blocks with numbers from 0, none left out."""
    return torch.from_numpy(np.unique(blocks.numpy(), return_inverse=True)[1])


def _windows(blocks: int, generator: torch.Generator) -> Tensor:
    """int64 ``[blocks]``: the part of the epoch each block is in; at most ``OPEN_BLOCKS``."""
    windows = -(-blocks // OPEN_BLOCKS)
    return torch.randperm(blocks, generator=generator) * windows // blocks


class ImagePasses:
    """Passes over a training loader's images, for methods that look at all of them before an epoch."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def clean(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Un-augmented images ``[b,3,S,S]`` in the size of the first view, and their sample numbers ``[b]``."""
        views = self._loader.views
        spec = ViewSpec(size=views.specs[0].size, crop="none", center=self._center(), flip=0.0)
        for batch in self._loader.ordered(views.like([spec]), step=-1):
            yield batch.views[0].images, batch.index

    def _center(self) -> float:
        """As evaluations cut: images of varying size lose their border."""
        return 1.0 if self._loader.source.common_size() else 0.875

    def augmented(self, number: int) -> Iterator[Batch]:
        """All images in the method's own views; another ``number`` gives other views and another order."""
        return self._loader.shuffled(self._loader.views, step=-2 - number)


def _replacements(samples: Tensor, unreadable: set[int], total: int) -> Tensor | None:
    """int64 ``[total]``: the sample each sample's slot shows; None if all are readable."""
    if not unreadable:
        return None
    shown, ordered = torch.arange(total), samples.sort().values
    for number in unreadable & set(samples.tolist()):
        shown[number] = next_sample(number, ordered, unreadable)
    return shown


def finish_decoded(views: ViewExecutor, decoded: Decoded, draws: Draws, device: torch.device) -> tuple[View, ...]:
    """Bring decoded crops to the device and give them their colours. The geometry is recomputed, not sent."""
    geometry = views.geometry(draws, decoded.sizes)
    crops = [to_device(crop, device) for crop in decoded.crops]
    return views.finish(crops, geometry, draws, decoded.sizes, decoded.colored)


class EvalLoader:
    """Un-augmented images of a split in order, without padding; ranks get uneven shares.

    An unreadable image is left out, never replaced: a result must not count another image in its place.

    Args:
        source: the images.
        indices: int64 ``[M]``, the samples to use, in this order.
        size: side S of the images it yields.
        center: side of the centred square that is resized to S, as a fraction of the short side.
        mean, std: per channel, for normalisation.
        batch_size: images per batch of this rank.
        device: where images go.
        data: where decoded images are kept, to use those instead of decoding them again; None: nowhere.
        workers: decoding processes where images are not in memory; None: one per core, 8 at most.
        channels_last: memory layout of the images.
        interpolation: ``bilinear`` or ``bicubic``.
        rank, world: this process and how many there are.
        unreadable: takes note of unreadable images; None: none is tolerated.
        total: how many samples all loaders of the evaluation show; None: those of ``indices``.
    """

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        *,
        size: int,
        center: float,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device | str,
        data: DataOptions | None = None,
        workers: int | None = None,
        channels_last: bool = False,
        interpolation: str = "bicubic",
        rank: int = 0,
        world: int = 1,
        unreadable: Unreadable | None = None,
        total: int | None = None,
    ) -> None:
        self.source = source
        self.device = torch.device(device)
        self.unreadable = unreadable or Unreadable(source, 0, logger.info)
        self._data = data
        self._total = len(indices) if total is None else total
        share = rank_share(len(indices), rank, world)
        self._parts = torch.split(indices[share.start : share.stop], batch_size)
        self._workers = default_workers() if workers is None else workers
        self._spec = ViewSpec.model_validate(
            {"size": size, "crop": "none", "center": center, "interpolation": interpolation, "flip": 0.0}
        )
        self.views = ViewExecutor(
            [self._spec], size=size, mean=mean, std=std, device=self.device, channels_last=channels_last
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images ``[B,3,S,S]`` and their int64 sample numbers ``[B]``, both on the device.

        Raises:
            DataError: more images are unreadable than tolerated.
        """
        parts = [part for part in self._parts if len(part)]
        pixels = self.source.pixels()
        if pixels is not None:
            return (self._resident(pixels, part) for part in parts)
        mapped = self._mapped() if parts else None
        return self._decoded(parts) if mapped is None else self._kept(mapped, parts)

    def _mapped(self) -> MappedPixels | None:
        """The images as decoded before; decoding them all for later pays if most are shown now."""
        if self._data is None:
            return None
        build = 2 * self._total >= len(self.source)
        return mapped_pixels(self.source, self._data, self.unreadable.log, build=build)

    def _resident(self, pixels: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        images = to_device(rows(pixels, part, pinned=self.device.type == "cuda"), self.device)
        if self._shown_whole(pixels):
            return self._finished(images, pixels, part)
        geometry = self.views.geometry(Draws(0, 0, part), _sizes(pixels, part))
        return self._finished(self.views.crop(images, geometry)[0], pixels, part)

    def _kept(self, mapped: MappedPixels, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut and resized in 8 bits, as images are that workers decode: a cache changes no feature."""
        for part in parts:
            reasons = {index: mapped.unreadable[index] for index in part.tolist() if index in mapped.unreadable}
            self.unreadable.add(reasons)
            readable = part[~torch.isin(part, torch.tensor(list(reasons), dtype=torch.int64))]
            if len(readable):
                images = self._cut(rows(mapped.pixels, readable, pinned=False))
                yield self._finished(to_device(images, self.device), mapped.pixels, readable)

    def _cut(self, images: Tensor) -> Tensor:
        """All alike, since nothing is random here and images are of one size."""
        if self._shown_whole(images):
            return images
        one = torch.zeros(1, dtype=torch.int64)
        (geometry,) = self.views.geometry(Draws(0, 0, one), _sizes(images, one))
        x0, y0, x1, y1 = (int(edge) for edge in geometry.box[0].tolist())
        mode, side = self._spec.interpolation, (self.views.size, self.views.size)
        return F.interpolate(images[:, :, y0:y1, x0:x1], side, mode=mode, antialias=True, align_corners=False)

    def _shown_whole(self, pixels: Tensor) -> bool:
        """Whether images are of the right size already; resizing them would change no value."""
        return self._spec.center == 1 and pixels.shape[-2:] == (self.views.size, self.views.size)

    def _finished(self, crops: Tensor, pixels: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        draws, sizes = Draws(0, 0, part), _sizes(pixels, part)
        geometry = self.views.geometry(draws, sizes)
        return self.views.finish([crops], geometry, draws, sizes)[0].images, part.to(self.device)

    def _decoded(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        decoder = Decoder(self.source, torch.cat(self._parts), self.views, seed=0)
        chunks = (Chunk(0, part, part) for part in parts)
        for part, decoded in zip(parts, decode(decoder, chunks, self._workers), strict=True):
            self.unreadable.add(decoded.unreadable)
            view = finish_decoded(self.views, decoded, Draws(0, 0, part), self.device)[0]
            shown = (decoded.samples == part).to(self.device)
            if bool(shown.any()):
                yield view.images[shown], part.to(self.device)[shown]


def _sizes(pixels: Tensor, part: Tensor) -> Tensor:
    """int64 ``[B,2]`` heights and widths of images of one size."""
    return torch.tensor(pixels.shape[-2:]).expand(len(part), 2)
