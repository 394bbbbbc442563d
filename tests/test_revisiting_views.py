"""Large and small crops, some near others, some with AutoAugment, through the loader (arXiv 2106.05967)."""

from __future__ import annotations

import pytest
import torch
from reference import photo_tiles

from sslbench.config.schema import DataOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.sources import ArraySource
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.plugin.api import Batch
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec

COLORS = {"jitter": Jitter(), "gray": 0.2, "blur": Blur(kernel=0.375), "interpolation": "bilinear"}
VIEWS = (
    ViewSpec(size=32, scale=(0.2, 1.0), autoaugment=0.5, **COLORS),
    ViewSpec(size=32, scale=(0.2, 1.0), **COLORS),
    ViewSpec(count=4, size=20, scale=(0.05, 0.14), near=1, autoaugment=0.5, **COLORS),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return ArraySource(photo_tiles(48, 64)[:40], torch.zeros(40, dtype=torch.long))


def batches(source: ArraySource, resident: str, rank: int = 0, world: int = 1, workers: int = 0) -> list[Batch]:
    store = open_store(source, DataOptions(resident=resident), CPU, lambda _line: None)
    views = ViewExecutor(VIEWS, size=32, mean=(0.5,) * 3, std=(0.25,) * 3, device=CPU)
    loader = TrainLoader(
        source, store, views, seed=1, global_batch=16, rank=rank, world=world, workers=workers, device=CPU
    )
    return list(loader.batches(0, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_resident_and_decoded_images_are_cut_alike(source, workers):
    pairs = zip(batches(source, "host"), batches(source, "off", workers=workers), strict=True)
    for resident, decoded in pairs:
        assert [tuple(view.images.shape[1:]) for view in decoded.views] == [(3, 32, 32)] * 2 + [(3, 20, 20)] * 4
        for a, b in zip(resident.views, decoded.views, strict=True):
            assert torch.equal(a.box, b.box)
            # Rescaling differs by a level of 255 at most, which thresholds and histograms can enlarge.
            assert (a.images - b.images).abs().median() < 0.02


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_ranks_changes_neither_crops_nor_colours(source, world):
    whole = batches(source, "off")
    shares = [batches(source, "off", rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        for v, view in enumerate(batch.views):
            parts = [share[step].views[v] for share in shares]
            assert torch.equal(view.box, torch.cat([part.box for part in parts]))
            assert torch.allclose(view.images, torch.cat([part.images for part in parts]), atol=1e-4)
