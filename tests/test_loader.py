"""Loaders: a global batch is a function of (seed, step), whoever computes it and however pixels are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslbench.config.schema import DataOptions
from sslbench.data.loader import EvalLoader, TrainLoader, rank_share
from sslbench.data.sources import ArraySource
from sslbench.data.store import DecodedStore, ResidentStore, Unreadable, open_store
from sslbench.data.views import ViewExecutor
from sslbench.errors import ConfigError, DataError
from sslbench.plugin.api import Batch, Source
from sslbench.plugin.viewspec import Jitter, ViewSpec

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.25, 0.25)


def _smooth(number: int, height: int, width: int) -> Tensor:
    """An image whose rescaling is benign, different for each number."""
    y = torch.linspace(0, 3, height)[:, None]
    x = torch.linspace(0, 4, width)[None]
    waves = [torch.sin(x * (1 + number % 5) + y * channel + number) for channel in range(3)]
    return ((torch.stack(waves) + 1) * 127).to(torch.uint8)


class VariedSource(Source):
    """Images of several sizes that are decoded one at a time; ``broken`` ones cannot be."""

    def __init__(self, total: int, broken: frozenset[int] = frozenset(), *, varied: bool = True) -> None:
        self.total, self.broken, self.varied = total, broken, varied

    def __len__(self) -> int:
        return self.total

    def _size(self, index: int) -> tuple[int, int]:
        return (20 + index % 7, 24 + index % 5) if self.varied else (20, 24)

    def image(self, index: int) -> Tensor:
        if index in self.broken:
            raise DataError(f"cannot read image {index}")
        return _smooth(index, *self._size(index))

    @property
    def targets(self) -> Tensor:
        return torch.arange(self.total) % 10

    def image_sizes(self) -> Tensor:
        return torch.tensor([self._size(index) for index in range(self.total)])


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return ArraySource(torch.stack([_smooth(n, 24, 24) for n in range(53)]), torch.arange(53) % 10)


def _views(*specs: ViewSpec) -> ViewExecutor:
    return ViewExecutor(specs or (ViewSpec(count=2, size=16),), size=16, mean=MEAN, std=STD, device=CPU)


def _loader(source: Source, resident: str = "auto", views: ViewExecutor | None = None, **kwargs) -> TrainLoader:
    kwargs = {"seed": 3, "global_batch": 12, "workers": 0} | kwargs
    options = DataOptions(resident=resident, max_unreadable=kwargs.pop("max_unreadable", 0))
    store = open_store(source, options, CPU, lambda _line: None)
    return TrainLoader(source, store, views or _views(), **kwargs)


def _same(first: Batch, second: Batch) -> bool:
    pairs = zip(first.views, second.views, strict=True)
    tensors = [(a, b) for view in pairs for a, b in zip(*view, strict=True)]
    return torch.equal(first.index, second.index) and all(torch.equal(a, b) for a, b in tensors)


def test_an_epoch_shows_each_image_at_most_once_and_epochs_differ(source):
    loader = _loader(source)
    assert (loader.num_images, loader.steps_per_epoch) == (53, 4)
    assert [loader.epoch_of(step) for step in (0, 3, 4, 11)] == [0, 0, 1, 2]
    index = [batch.index for batch in loader.batches(0, 8)]
    for epoch in (index[:4], index[4:]):
        assert len(set(torch.cat(epoch).tolist())) == 48
    assert not torch.equal(torch.cat(index[:4]), torch.cat(index[4:]))


def test_seed_changes_order_and_crops(source):
    first, second = (next(_loader(source, seed=seed).batches(0, 1)) for seed in (3, 4))
    assert not torch.equal(first.index, second.index)
    assert not torch.equal(first.views[0].box, second.views[0].box)
    assert not torch.equal(first.views[0].box, first.views[1].box)


def test_any_step_can_be_the_first(source):
    whole = list(_loader(source).batches(0, 9))
    for step in (1, 4, 7):
        rest = list(_loader(source).batches(step, 9))
        assert len(rest) == 9 - step
        assert all(_same(a, b) for a, b in zip(whole[step:], rest, strict=True))


@pytest.mark.parametrize("resident", ["auto", "off"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_global_batch_does_not_depend_on_the_world(source, resident, world):
    views = _views(ViewSpec(size=16), ViewSpec(count=2, size=12, jitter=Jitter(), gray=0.3))
    (whole,) = _loader(source, resident, views).batches(5, 6)
    shares = [next(_loader(source, resident, views, rank=r, world=world).batches(5, 6)) for r in range(world)]
    assert [len(share) for share in shares] == [len(rank_share(12, r, world)) for r in range(world)]
    assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
    for number, view in enumerate(whole.views):
        torch.testing.assert_close(
            torch.cat([s.views[number].images for s in shares]), view.images, atol=2e-5, rtol=0
        )
        assert torch.equal(torch.cat([s.views[number].box for s in shares]), view.box)
    assert torch.equal(torch.cat([share.uniform(3) for share in shares]), whole.uniform(3))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_resident_and_decoded_pixels_give_the_same_batch(source, workers, crop):
    views = _views(ViewSpec(size=16, crop=crop), ViewSpec(size=20, crop=crop))
    resident = list(_loader(source, "auto", views).batches(2, 5))
    decoded = list(_loader(source, "off", views, workers=workers).batches(2, 5))
    assert len(resident) == len(decoded) == 3
    for a, b in zip(resident, decoded, strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in zip(a.views, b.views, strict=True):
            assert torch.equal(x.box, y.box)
            assert torch.equal(x.flip, y.flip)
            assert ((x.images - y.images).abs() * STD[0] * 255).max() < 1.6  # two 8-bit roundings


def test_images_of_many_sizes_are_decoded_by_workers_in_order():
    source = VariedSource(40)
    inline = list(_loader(source, workers=0).batches(0, 5))
    parallel = list(_loader(source, workers=2).batches(0, 5))
    assert all(_same(a, b) for a, b in zip(inline, parallel, strict=True))
    sizes = source.image_sizes()[inline[0].index].flip(1).float()
    assert torch.equal(inline[0].views[0].source_size, sizes)


def test_batches_of_a_thread_are_those_made_inline(source):
    views = _views(ViewSpec(count=2, size=16, jitter=Jitter(), gray=0.3), ViewSpec(size=12))
    inline = list(_loader(source, views=views).batches(2, 9))
    torch.set_num_threads(2)
    try:
        ahead = list(_loader(source, views=views).batches(2, 9))
    finally:
        torch.set_num_threads(1)
    assert all(_same(a, b) for a, b in zip(inline, ahead, strict=True))


def test_workers_leave_the_global_generator_alone(source):
    before = torch.get_rng_state()
    list(_loader(source, "off", workers=1).batches(0, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_a_closed_iterator_ends_its_workers(source):
    import multiprocessing

    before = set(multiprocessing.active_children())
    batches = _loader(source, "off", workers=2).batches(0, 1000)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert not set(multiprocessing.active_children()) - before


def test_labels_only_on_request(source):
    assert next(_loader(source).batches(0, 1)).labels is None
    batch = next(_loader(source, labels=True).batches(0, 1))
    assert torch.equal(batch.labels, batch.index % 10)
    with pytest.raises(DataError, match="none"):
        _loader(ArraySource(source.pixels(), None), labels=True)


def test_a_subset_of_the_samples(source):
    indices = torch.arange(1, 53, 3)
    loader = _loader(source, indices=indices, global_batch=6, labels=True)
    assert (loader.num_images, loader.steps_per_epoch) == (18, 3)
    seen = torch.cat([batch.index for batch in loader.batches(0, 3)])
    assert torch.equal(seen.sort().values, indices)


def test_too_large_a_batch_says_what_to_type(source):
    with pytest.raises(ConfigError, match="exceeds the 53 training images") as caught:
        _loader(source, global_batch=64)
    assert "train.batch_size=" in caught.value.hint
    with pytest.raises(ConfigError, match="no image"):
        _loader(source, global_batch=2, world=3)


def test_waiting_is_measured(source):
    loader = _loader(source)
    list(loader.batches(0, 2))
    first = loader.wait_seconds
    assert first > 0
    list(loader.batches(2, 4))
    assert loader.wait_seconds > first


@pytest.mark.parametrize(("resident", "workers"), [("auto", 0), ("off", 0), ("off", 2)])
def test_an_unreadable_image_gives_its_slot_to_the_next_one_in_use(resident, workers):
    broken = frozenset({10, 12, 39})
    kwargs = {"labels": True, "indices": torch.arange(0, 40, 2), "global_batch": 10, "max_unreadable": 3}
    whole = VariedSource(40, varied=False)
    damaged = VariedSource(40, broken, varied=False)
    expected = list(_loader(whole, resident, **kwargs).batches(0, 2))
    found = list(_loader(damaged, resident, workers=workers, **kwargs).batches(0, 2))
    for a, b in zip(expected, found, strict=True):
        replaced = torch.where((a.index == 10) | (a.index == 12), 14, a.index)
        assert torch.equal(b.index, replaced)
        assert torch.equal(b.labels, replaced % 10)
        kept = a.index == replaced
        assert torch.equal(a.views[0].images[kept], b.views[0].images[kept])
    index, images = (torch.cat(parts) for parts in ([b.index for b in found], [b.views[0].box for b in found]))
    assert (index == 14).sum() == 3
    assert len(images) == 20


@pytest.mark.parametrize(("resident", "workers"), [("auto", 0), ("off", 0), ("off", 2)])
def test_too_many_unreadable_images_are_named(resident, workers):
    source = VariedSource(24, frozenset({3, 4, 5}), varied=False)
    with pytest.raises(DataError, match=r"cannot read image [345]") as caught:
        list(_loader(source, resident, workers=workers, max_unreadable=1).batches(0, 2))
    assert "data.max_unreadable=" in caught.value.hint


def _evaluate(source: Source, indices: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    kwargs = {"size": 16, "center": 0.875, "batch_size": 7, "workers": 0, "mean": MEAN, "std": STD} | kwargs
    batches = list(EvalLoader(source, indices, device=CPU, **kwargs))
    assert all(len(images) == len(index) > 0 for images, index in batches)
    return torch.cat([images for images, _ in batches]), torch.cat([index for _, index in batches])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_in_order_complete_and_unpadded(source, world):
    indices = torch.arange(0, 53, 2)
    parts = [_evaluate(source, indices, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.cat([index for _, index in parts]), indices)
    alone, _ = _evaluate(source, indices)
    torch.testing.assert_close(torch.cat([images for images, _ in parts]), alone, atol=2e-5, rtol=0)


def test_evaluation_shows_the_normalised_image_itself(source):
    images, index = _evaluate(source, torch.tensor([5, 2]), size=24, center=1.0)
    assert index.tolist() == [5, 2]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = (source.image(5).float() / 255 - mean) / std
    torch.testing.assert_close(images[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_files_equals_evaluation_of_resident_pixels(workers):
    source = VariedSource(20, varied=False)
    resident = ArraySource(torch.stack([source.image(n) for n in range(20)]), None)
    a, _ = _evaluate(source, torch.arange(20), workers=workers, interpolation="bilinear")
    b, _ = _evaluate(resident, torch.arange(20), interpolation="bilinear")
    assert ((a - b).abs() * STD[0] * 255).max() < 1.6


def test_evaluation_neither_skips_nor_replaces_unless_told():
    with pytest.raises(DataError, match="cannot read image 3"):
        _evaluate(VariedSource(9, frozenset({3})), torch.arange(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_as_many_unreadable_images_as_allowed(workers):
    source, lines = VariedSource(9, frozenset({3, 8})), []
    whole, _ = _evaluate(VariedSource(9), torch.arange(9))
    images, index = _evaluate(
        source, torch.arange(9), workers=workers, batch_size=1, unreadable=Unreadable(source, 2, lines.append)
    )
    assert index.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.allclose(images, whole[index], atol=1e-5)
    assert len(lines) == 2
    with pytest.raises(DataError, match="2 unreadable"):
        _evaluate(source, torch.arange(9), unreadable=Unreadable(source, 1, lines.append))


def test_an_empty_share_yields_nothing(source):
    loader = EvalLoader(
        source, torch.arange(2), size=16, center=1.0, mean=MEAN, std=STD, batch_size=4, device=CPU, rank=2, world=3
    )
    assert list(loader) == []


def test_store_choice_and_its_reason():
    varied, even = VariedSource(8), VariedSource(8, varied=False)
    lines: list[str] = []

    def choose(source: Source, **options) -> type:
        return type(open_store(source, DataOptions(**options), CPU, lines.append))

    assert choose(varied) is DecodedStore
    assert "sizes differ" in lines[-1]
    assert choose(even) is ResidentStore
    assert choose(even, resident="off") is DecodedStore
    assert "data.resident=off" in lines[-1]
    big = VariedSource(800, varied=False)
    assert choose(big, resident_limit_mb=1) is DecodedStore
    assert "resident_limit_mb=1" in lines[-1]
    with pytest.raises(ConfigError, match="one size"):
        choose(varied, resident="host")


def test_resident_store_holds_the_images():
    source = VariedSource(8, varied=False)
    store = open_store(source, DataOptions(), CPU, lambda _line: None)
    assert store.image_size == (20, 24)
    assert torch.equal(store.take(torch.tensor([6, 1])), torch.stack([source.image(6), source.image(1)]))


def test_skipped_images_are_named_once():
    lines: list[str] = []
    source = VariedSource(24, frozenset({3}), varied=False)
    store = open_store(source, DataOptions(max_unreadable=1, resident="off"), CPU, lines.append)
    loader = TrainLoader(source, store, _views(), seed=1, global_batch=8, workers=0)
    list(loader.batches(0, 9))
    assert [line for line in lines if "unreadable" in line] == [
        "skipping an unreadable image: cannot read image 3"
    ]


def test_off_may_be_written_as_yaml_understands_it():
    assert DataOptions.model_validate({"resident": False}).resident == "off"
