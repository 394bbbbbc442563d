"""The command line ``sslbench``, with views made the slow way: image by image, with Pillow and torchvision.

    python benchmarks/reference_views.py pretrain --method simclr ...

Everything else is the program's own: the order of samples, the training loop, the evaluations. Each image is
decoded by Pillow whenever it is shown; its views are torchvision's transforms of the same specifications, applied
to Pillow images (tests/reference.py). Made to compare with; methods that use the geometry of crops get none.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from sslbench.cli import main
from sslbench.data.decoding import Chunk
from sslbench.data.encoded import EncodedSource
from sslbench.data.loader import TrainLoader
from sslbench.engine import setup
from sslbench.plugin.api import Batch, Source, View
from sslbench.plugin.viewspec import ViewSpec
from sslbench.rng import Draws, derive_seed

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from reference import reference_view, seeded, to_pil

ANNOUNCEMENT = "views: one image at a time, by Pillow and torchvision"
"""A line in the log of each run of this program."""

logger = logging.getLogger("sslbench.reference_views")


class ReferenceViews(Dataset[tuple[list[Tensor], Tensor]]):
    """From a chunk of samples to their views, float ``[B,3,S,S]`` in [0, 1] each, and image sizes ``[B,2]``."""

    def __init__(self, source: Source, specs: Sequence[ViewSpec], seed: int) -> None:
        self.source = source
        self.specs = specs
        self.seed = seed

    def __getitem__(self, chunk: Chunk) -> tuple[list[Tensor], Tensor]:
        images = [decoded(self.source, number) for number in chunk.samples.tolist()]
        with seeded(derive_seed(self.seed, "reference", chunk.step)):
            rows = [[reference_view(image, spec) for spec in self.specs] for image in images]
        sizes = torch.tensor([(image.width, image.height) for image in images])
        return [torch.stack(view) for view in zip(*rows, strict=True)], sizes


def decoded(source: Source, number: int) -> Image.Image:
    """An image as Pillow decodes it; one that has no file of its own as the source has it."""
    if isinstance(source, EncodedSource):
        return Image.open(io.BytesIO(source.encoded(number).tobytes())).convert("RGB")
    return to_pil(source.image(number))


class ReferenceLoader(TrainLoader):
    """The training loader's samples in its order, seen through the reference's views."""

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """As the training loader's."""
        logger.info(ANNOUNCEMENT)
        chunks = [self._chunk(step) for step in range(start_step, stop_step)]
        made = iter(
            DataLoader(
                ReferenceViews(self.source, self.views.specs, self.seed),
                sampler=chunks,
                batch_size=None,
                num_workers=self._workers,
                collate_fn=list,
                generator=torch.Generator(),
            )
        )
        for chunk in chunks:
            views, sizes = next(made)
            draws = Draws(self.seed, chunk.step, chunk.positions)
            yield self._batch(tuple(self._view(images, sizes) for images in views), chunk.samples, draws)

    def _view(self, images: Tensor, sizes: Tensor) -> View:
        executor = self.views
        mean, std = (values.tolist() for values in executor.normalization)
        images = TF.normalize(images.to(self.device), mean, std)
        unknown = torch.full((len(images), 4), torch.nan, device=self.device)
        flip = torch.zeros(len(images), dtype=torch.bool, device=self.device)
        images = images.contiguous(memory_format=executor.memory_format)
        return View(images, unknown, flip, sizes.float().to(self.device))


if __name__ == "__main__":
    with patch.object(setup, "TrainLoader", ReferenceLoader):
        main()
