"""Passes over all training images, which methods with memory make before an epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslbench.config.schema import CoreOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.sources import ArraySource
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.engine.loop import Loop, Plan
from sslbench.engine.optim import build_optimizer
from sslbench.plugin.api import Batch, MethodConfig, TrainingImages, ViewSpec

CPU = torch.device("cpu")
COUNT = 29


def _loader(resident: str = "auto", **kwargs: Any) -> TrainLoader:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8, generator=generator)
    source = ArraySource(pixels, torch.arange(COUNT) % 3)
    specs = [ViewSpec(size=12), ViewSpec(size=8, gray=0.5)]
    views = ViewExecutor(specs, size=16, mean=(0.5,) * 3, std=(0.25,) * 3, device=CPU)
    core = CoreOptions.model_validate({"data": {"resident": resident}})
    store = open_store(source, core.data, CPU, lambda _line: None)
    return TrainLoader(source, store, views, **{"seed": 3, "global_batch": 8, "workers": 0, **kwargs})


def _by_index(batches: list[Batch]) -> Tensor:
    """Boxes of the first view, in the order of the images."""
    order = torch.cat([batch.index for batch in batches]).argsort()
    return torch.cat([batch.views[0].box for batch in batches])[order]


@pytest.mark.parametrize("resident", ["auto", "off"])
def test_clean_shows_every_image_once_and_unchanged(resident):
    loader = _loader(resident)
    passes = [list(loader.images.clean()) for _ in range(2)]
    assert torch.cat([index for _, index in passes[0]]).tolist() == list(range(COUNT))
    shown = torch.cat([images for images, _ in passes[0]])
    assert shown.shape == (COUNT, 3, 12, 12)
    assert torch.equal(shown, torch.cat([images for images, _ in passes[1]]))
    assert [len(index) for _, index in passes[0]] == [10, 10, 9]


def test_clean_images_do_not_depend_on_where_pixels_live():
    resident, decoded = (torch.cat([shown for shown, _ in _loader(r).images.clean()]) for r in ("auto", "off"))
    torch.testing.assert_close(resident, decoded, atol=0.03, rtol=0)  # two roundings to 8 bits


def test_augmented_shows_every_image_once_in_the_methods_views():
    loader = _loader()
    first, again, other = (list(loader.images.augmented(number)) for number in (0, 0, 1))
    assert sorted(torch.cat([batch.index for batch in first]).tolist()) == list(range(COUNT))
    assert [tuple(view.images.shape[1:]) for view in first[0].views] == [(3, 12, 12), (3, 8, 8)]
    boxes = [_by_index(batches) for batches in (first, again, other)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])
    trained = list(loader.batches(0, 3))
    seen = torch.cat([batch.index for batch in trained])
    assert not torch.equal(boxes[0][seen], torch.cat([batch.views[0].box for batch in trained]))


def test_augmented_is_in_an_order_of_its_own_that_the_seed_and_the_number_decide():
    def order(seed: int, number: int) -> list[int]:
        return torch.cat([batch.index for batch in _loader(seed=seed).images.augmented(number)]).tolist()

    trained = torch.cat([batch.index for batch in _loader().batches(0, 3)]).tolist()
    assert order(3, 0) == order(3, 0), "a resumed run repeats the pass"
    others = [order(3, 1), order(4, 0), list(range(COUNT)), trained]
    assert all(order(3, 0)[: len(other)] != other for other in others)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_augmented_batches_mix_classes_that_are_sorted(world: int):
    """As ``ImageFolder`` lists them; in that order, batches of ten hold one or two of three classes."""
    ranks = [list(_loader(rank=rank, world=world).images.augmented(0)) for rank in range(world)]
    for parts in zip(*ranks, strict=True):
        classes = torch.cat([part.index for part in parts]) // 10
        assert len(classes.unique()) == 3, classes.tolist()


def test_views_are_made_in_full_precision_under_autocast():
    loader = _loader()
    with torch.autocast("cpu", torch.bfloat16):
        under = [batch.views[0].images for batch in loader.images.augmented(0)]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    plain = [batch.views[0].images for batch in loader.images.augmented(0)]
    assert all(torch.equal(*pair) for pair in zip(under, plain, strict=True))


@pytest.mark.parametrize("resident", ["auto", "off"])
def test_ranks_share_every_pass(resident):
    whole = list(_loader(resident).images.augmented(2))
    shares = [list(_loader(resident, rank=rank, world=3).images.augmented(2)) for rank in range(3)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        assert torch.equal(torch.cat([part.views[1].box for part in parts]), batch.views[1].box)


class _Recorder(nn.Module):
    """Stands in for a method: notes when epochs start and what it can see then."""

    name = "recorder"
    cfg = MethodConfig()

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(()))
        self.started: list[tuple[int, int, float]] = []

    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        seen = sum(len(index) for _, index in images.clean())
        self.started.append((epoch, seen, float(torch.rand(()))))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.weight * batch.views[0].images.mean()}

    def before_step(self, _progress: object) -> None: ...

    def after_step(self, _progress: object) -> None: ...


class _Silent:
    def metrics(self, *_: object) -> None: ...
    def probe(self, *_: object) -> None: ...
    def save(self, *_: object) -> None: ...
    def should_stop(self) -> bool:
        return False


def _train(start_step: int) -> _Recorder:
    method, loader = _Recorder(), _loader()
    core = CoreOptions.model_validate({"train": {"epochs": 3, "batch_size": 8}, "optim": {"name": "sgd"}})
    plan = Plan(core, loader.steps_per_epoch, start_step)
    optimizer = build_optimizer(core.optim, None, method, 8)
    parts = {"model": method, "method": method, "optimizer": optimizer, "loader": loader}
    Loop(**parts, plan=plan, observer=_Silent(), device=CPU).run()  # type: ignore[arg-type]
    return method


def test_each_epoch_starts_once_with_the_images_and_its_own_random_state():
    whole = _train(0).started
    assert [(epoch, seen) for epoch, seen, _ in whole] == [(0, COUNT), (1, COUNT), (2, COUNT)]
    assert len({drawn for _, _, drawn in whole}) == 3
    assert _train(3).started == whole[1:]
    assert _train(4).started == whole[2:], "an epoch that has begun does not start again"
