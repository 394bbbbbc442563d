"""Where pixels live: the rule, free memory, and the same batches from everywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets_kit import DECODER_WARNING
from faults_kit import make_images
from torch import Tensor

from sslbench.config.schema import DataOptions
from sslbench.data import store as store_module
from sslbench.data.encoded import FileSource
from sslbench.data.loader import EvalLoader, TrainLoader
from sslbench.data.memory import free_host_memory
from sslbench.data.paths import find_images
from sslbench.data.placing import WORTH_KEEPING, Images, Place, Room, choose_place
from sslbench.data.sources import ArraySource
from sslbench.data.store import ResidentStore, Unreadable, open_store, rows
from sslbench.data.views import ViewExecutor
from sslbench.errors import DataError
from sslbench.plugin.api import Batch
from sslbench.plugin.viewspec import Jitter, ViewSpec
from sslbench.rng import Draws

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)
CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.25, 0.25)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("images", "room", "options", "place", "reason"),
    [
        # On a CPU: what is in memory stays, files are mapped, without a cache each process has a copy.
        (Images(GIB, in_memory=True), Room(GIB), {}, Place.DEVICE, "1024 MiB"),
        (Images(GIB, cacheable=True), Room(4 * GIB), {}, Place.MAPPED, "once for all processes"),
        (Images(GIB, cacheable=True), Room(4 * GIB, processes=8), {}, Place.MAPPED, "once"),
        (Images(GIB, cacheable=True), Room(GIB), {}, Place.WORKERS, "half of the 1024 MiB free"),
        (Images(GIB), Room(4 * GIB), {}, Place.DEVICE, "of 4096 MiB free"),
        (Images(GIB), Room(4 * GIB, processes=8), {}, Place.WORKERS, "in each of 8 processes"),
        (Images(WORTH_KEEPING - 1, cacheable=True), Room(GIB), {}, Place.DEVICE, "16 MiB"),
        (Images(None), Room(GIB), {}, Place.WORKERS, "sizes differ"),
        # With an accelerator: there if a quarter of its free memory is enough.
        (Images(GIB, cacheable=True), Room(4 * GIB, device=8 * GIB), {}, Place.DEVICE, "of 8192 MiB free"),
        (Images(GIB, cacheable=True), Room(4 * GIB, device=2 * GIB), {}, Place.MAPPED, "once"),
        (Images(GIB), Room(4 * GIB, device=2 * GIB), {}, Place.HOST, "of 4096 MiB free"),
        (Images(GIB, in_memory=True), Room(GIB, device=2 * GIB), {}, Place.HOST, "1024 MiB"),
        (Images(GIB), Room(GIB, device=2 * GIB), {}, Place.WORKERS, "exceed half"),
        # Options.
        (Images(GIB), Room(9 * GIB), {"resident": "off"}, Place.WORKERS, "data.resident=off"),
        (Images(GIB), Room(1), {"resident": "device"}, Place.DEVICE, "data.resident=device"),
        (Images(GIB), Room(1), {"resident": "host"}, Place.HOST, "data.resident=host"),
        (Images(GIB, cacheable=True), Room(1), {"resident": "mmap"}, Place.MAPPED, "data.resident=mmap"),
        (Images(GIB), Room(1), {"resident": "mmap"}, Place.HOST, "data.resident=mmap"),
        (Images(GIB, cacheable=True), Room(9 * GIB), {"resident_limit_mb": 9}, Place.WORKERS, "limit_mb=9"),
        (Images(GIB), Room(9 * GIB, device=9 * GIB), {"resident_limit_mb": 2000}, Place.DEVICE, "free"),
    ],
)
def test_the_rule(images: Images, room: Room, options: dict[str, Any], place: Place, reason: str) -> None:
    found, why = choose_place(images, DataOptions(**options), room)
    assert found is place
    assert reason in why


def _system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    1000000 kB\n", "proc/self/cgroup": cgroup} | files
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_free_memory_without_limits(tmp_path: Path) -> None:
    assert free_host_memory(_system(tmp_path, "0::/\n", {})) == 1_000_000 << 10
    assert free_host_memory(tmp_path / "nothing") == 8 << 30


def test_free_memory_within_a_limit_of_the_group_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/job"
    files = {
        f"{group}/memory.max": "500000000",
        f"{group}/memory.current": "300000000",
        f"{group}/memory.stat": "anon 5\ninactive_file 100000000\n",
        f"{group}/step/memory.max": "max",
        f"{group}/step/memory.current": "1",
        f"{group}/step/memory.stat": "inactive_file 0\n",
    }
    assert free_host_memory(_system(tmp_path, "0::/job/step\n", files)) == 300_000_000


def test_free_memory_within_a_limit_of_the_first_version(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    files = {
        f"{group}/memory.limit_in_bytes": "400000000",
        f"{group}/memory.usage_in_bytes": "390000000",
        f"{group}/memory.stat": "cache 7\ntotal_inactive_file 0\n",
    }
    # In a container the group's path names a folder that is not mounted there.
    assert free_host_memory(_system(tmp_path, "4:memory:/docker/abc\n0::/\n", files)) == 10_000_000


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    make_images(tmp_path / "data", splits=("train",), count=10, side=20)
    return _open(tmp_path)


def _open(root: Path) -> FileSource:
    paths = find_images(root / "data/train")
    return FileSource(paths, torch.from_numpy(paths.numbered(("a", "b"))))


def _loader(source: FileSource, root: Path, resident: str, **options: Any) -> TrainLoader:
    data = DataOptions(resident=resident, cache_dir=root / "cache", **options)
    specs = [ViewSpec(count=2, size=16, jitter=Jitter(), gray=0.2), ViewSpec(size=12, crop="padded")]
    views = ViewExecutor(specs, size=16, mean=MEAN, std=STD, device=CPU)
    store = open_store(source, data, CPU, lambda _line: None)
    return TrainLoader(source, store, views, seed=3, global_batch=8, workers=0, labels=True)


def _tensors(batches: list[Batch]) -> list[Tensor]:
    return [t for b in batches for t in (b.index, b.labels, *(part for view in b.views for part in view))]


@pytest.mark.parametrize("unreadable", [False, True])
def test_all_tensors_of_a_batch_are_the_same_from_every_store(
    source: FileSource, tmp_path: Path, unreadable: bool
) -> None:
    if unreadable:
        (tmp_path / "data/train/a/04.png").write_bytes(b"no image")
    wanted = _tensors(list(_loader(source, tmp_path, "host", max_unreadable=1).batches(0, 5)))
    for resident in ("device", "mmap", "mmap", "auto"):
        found = _tensors(list(_loader(_open(tmp_path), tmp_path, resident, max_unreadable=1).batches(0, 5)))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_pixels_on_the_device_or_the_host_are_apart_from_the_file(source: FileSource, tmp_path: Path) -> None:
    mapped = _loader(source, tmp_path, "mmap").store
    assert isinstance(mapped, ResidentStore)
    for resident in ("device", "host"):
        store = _loader(source, tmp_path, resident).store
        assert isinstance(store, ResidentStore)
        assert store.pixels.data_ptr() != mapped.pixels.data_ptr()
        store.pixels.zero_()
    assert mapped.pixels.any()


def test_rows_are_those_asked_for() -> None:
    pixels = torch.randint(0, 255, (9, 3, 4, 5), dtype=torch.uint8)
    index = torch.tensor([7, 0, 7])
    assert torch.equal(rows(pixels, index, pinned=False), pixels[index])


def _eval_loader(source: Any, indices: Tensor, **kwargs: Any) -> EvalLoader:
    return EvalLoader(source, indices, **({"mean": MEAN, "std": STD, "batch_size": 6, "device": CPU} | kwargs))


def _evaluate(source: Any, data: DataOptions | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    kwargs = {"size": 16, "center": 0.875, "interpolation": "bicubic", "workers": 0} | kwargs
    unreadable = Unreadable(source, data.max_unreadable if data else 0, lambda _line: None)
    loader = _eval_loader(source, torch.arange(19, -1, -1), data=data, unreadable=unreadable, **kwargs)
    images, index = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(index)


@pytest.mark.parametrize("shown", [{}, {"size": 20, "center": 1.0}, {"size": 27, "interpolation": "bilinear"}])
def test_evaluation_of_kept_images_changes_no_bit(
    source: FileSource, tmp_path: Path, shown: dict[str, Any]
) -> None:
    decoded = _evaluate(source, None, **shown)
    data = DataOptions(resident="mmap", cache_dir=tmp_path / "cache")
    for _ in range(2):
        kept = _evaluate(_open(tmp_path), data, **shown)
        assert all(torch.equal(a, b) for a, b in zip(decoded, kept, strict=True))
    assert len(list((tmp_path / "cache").glob("images-*/"))) == 1


def test_evaluation_of_kept_images_leaves_out_unreadable_ones(source: FileSource, tmp_path: Path) -> None:
    (tmp_path / "data/train/b/03.png").write_bytes(b"no image")
    data = DataOptions(resident="mmap", cache_dir=tmp_path / "cache", max_unreadable=1)
    images, index = _evaluate(source, data)
    assert index.tolist() == [n for n in range(19, -1, -1) if n != 13]
    decoded, _ = _evaluate(_open(tmp_path), DataOptions(resident="off", max_unreadable=1))
    assert torch.equal(images, decoded)
    with pytest.raises(DataError, match=r"03\.png"):
        _evaluate(_open(tmp_path), DataOptions(resident="mmap", cache_dir=tmp_path / "cache"))


def test_images_of_the_right_size_are_shown_as_resampling_would_show_them() -> None:
    pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    loader = _eval_loader(ArraySource(pixels, None), torch.arange(20), size=16, center=1.0, batch_size=20)
    ((images, _),) = loader
    draws, sizes = Draws(0, 0, torch.arange(20)), torch.tensor([[16, 16]]).expand(20, 2)
    geometry = loader.views.geometry(draws, sizes)
    (view,) = loader.views.finish(loader.views.crop(pixels, geometry), geometry, draws, sizes)
    assert torch.equal(images, view.images)


def test_a_few_images_are_no_reason_to_decode_all(source: FileSource, tmp_path: Path) -> None:
    data = DataOptions(resident="mmap", cache_dir=tmp_path / "cache")
    loader = _eval_loader(source, torch.arange(5), size=16, center=1.0, data=data, workers=0)
    assert len(list(loader)) == 1
    assert not (tmp_path / "cache").exists()
    open_store(source, data, CPU, lambda _line: None)
    assert store_module.mapped_pixels(source, data, print, build=False) is not None


@pytest.mark.parametrize("resident", ["off", "host"])
def test_making_batches_inline_counts_as_waiting(
    source: FileSource, tmp_path: Path, resident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return finish(*arguments)

    loader = _loader(source, tmp_path, resident)
    finish = loader.views.finish
    monkeypatch.setattr(loader.views, "finish", slow)
    for _ in loader.batches(0, 2):
        time.sleep(0.2)  # the step does not count
    assert loader.wait_seconds >= 0.1
    began = time.perf_counter()
    loader.wait_seconds = 0.0
    list(loader.batches(0, 2))
    assert loader.wait_seconds <= time.perf_counter() - began
