"""Smaller copies of photographs in one file: what they show, when they are made, and when they are refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets_kit import DECODER_WARNING
from PIL import Image
from torch import Tensor

from sslbench.config.compose import Layer, compose
from sslbench.config.registry import find_registry, load_registry
from sslbench.config.schema import DataOptions
from sslbench.config.tree import parse_overrides
from sslbench.data.encoded import FileSource
from sslbench.data.loader import TrainLoader
from sslbench.data.packed import PackedSource, pack, shrink
from sslbench.data.paths import find_images
from sslbench.data.sources import ArraySource
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.engine.setup import build_parts
from sslbench.errors import DataError
from sslbench.plugin.api import Source
from sslbench.plugin.catalog import Catalog
from sslbench.plugin.viewspec import ViewSpec

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)
CPU = torch.device("cpu")
SIZES = ((96, 64), (64, 96), (40, 80), (30, 24), (64, 64), (50, 70), (128, 40), (33, 99))
"""Widths and heights."""


def _photo(number: int, width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width] / 20
    waves = [np.sin(x * (1 + number % 3) + channel + y) for channel in range(3)]
    return Image.fromarray(((np.stack(waves, 2) + 1) * 127).astype(np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        file = tmp_path / f"photos/train/{'ab'[number % 2]}/{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        _photo(number, *size).save(file, quality=95)
    return tmp_path


def _open(root: Path) -> FileSource:
    paths = find_images(root / "photos/train")
    return FileSource(paths, torch.from_numpy(paths.numbered(("a", "b"))))


def _pack(root: Path, source: Source | None = None, lines: list[str] | None = None, **options: int) -> Source:
    data = DataOptions.model_validate({"packed_size": 32, "cache_dir": root / "cache"} | options)
    return pack(source or _open(root), data, (lines if lines is not None else []).append)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def test_a_packed_image_is_the_original_resized(root: Path) -> None:
    source, packed = _open(root), _pack(root)
    assert isinstance(packed, PackedSource)
    assert len(packed) == len(source) == len(SIZES)
    assert torch.equal(packed.targets, source.targets)
    sizes = packed.image_sizes()
    for index in range(len(source)):
        whole, small = source.image(index), packed.image(index)
        assert tuple(sizes[index].tolist()) == small.shape[1:]
        assert min(small.shape[1:]) == min(32, *whole.shape[1:])
        assert _difference(small, shrink(whole, 32)) < 4
        assert packed.describe(index) == source.describe(index)
    assert packed.common_size() is None


def test_shrinking_is_what_pillow_does() -> None:
    photo = _photo(1, 90, 60)
    ours = shrink(torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1).contiguous(), 32)
    theirs = np.asarray(photo.resize((48, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_images_that_are_small_already_are_kept_to_the_byte(root: Path) -> None:
    source, packed = _open(root), _pack(root)
    small = [index for index in range(len(source)) if min(source.image(index).shape[1:]) <= 32]
    assert small
    assert isinstance(packed, PackedSource)
    for index in small:
        assert np.array_equal(packed.encoded(index), source.encoded(index))


def test_they_are_made_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = _pack(root)
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "image", None)
        second = _pack(root, lines=lines)
    assert all(torch.equal(first.image(index), second.image(index)) for index in range(len(SIZES)))
    assert "short side 32" in lines[-1]
    assert len(list((root / "cache").glob("packed-32-*/"))) == 1


@pytest.mark.parametrize("options", [{"packed_size": 48}, {"packed_quality": 80}])
def test_another_size_or_quality_is_another_file(root: Path, options: dict[str, int]) -> None:
    _pack(root)
    _pack(root, **options)
    assert len(list((root / "cache").glob("packed-*/"))) == 2


def test_a_replaced_photo_is_packed_again(root: Path) -> None:
    before = _pack(root).image(0)
    file = Path(_open(root).describe(0))
    about = file.stat()
    _photo(5, *SIZES[0]).save(file, quality=95)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert _difference(_pack(root).image(0), before) > 5


@pytest.mark.parametrize("name", ["files", "index.npz", "about.json"])
def test_a_cut_file_is_made_again(root: Path, name: str) -> None:
    wanted = _pack(root).image(3)
    (folder,) = (root / "cache").glob("packed-*/")
    os.truncate(folder / name, 10)
    lines: list[str] = []
    assert torch.equal(_pack(root, lines=lines).image(3), wanted)
    assert any("damaged" in line for line in lines)


def _flip(root: Path, place: int = -1) -> Path:
    (file,) = (root / "cache").glob("packed-*/files")
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    return file


def test_a_changed_byte_is_noticed_at_the_next_start(root: Path) -> None:
    wanted = _pack(root).image(len(SIZES) - 1)
    _flip(root)
    lines: list[str] = []
    assert torch.equal(_pack(root, lines=lines).image(len(SIZES) - 1), wanted)
    assert any("damaged" in line for line in lines)


def test_an_image_that_is_damaged_meanwhile_is_made_again(root: Path) -> None:
    packed = _pack(root)
    last = len(SIZES) - 1
    wanted = packed.image(last)
    file = _flip(root)
    assert torch.equal(packed.image(last), wanted)
    file.unlink()
    assert torch.equal(packed.image(last), wanted)
    lines: list[str] = []
    again = _pack(root, lines=lines)
    assert any("damaged" in line for line in lines)
    assert torch.equal(again.image(last), wanted)


def test_damage_that_is_not_looked_for_at_the_start_is_remembered(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslbench.data.packed._CHECKED_IMAGES", 1)
    wanted = _pack(root).image(len(SIZES) - 1)
    _flip(root)
    packed = _pack(root)
    assert torch.equal(packed.image(len(SIZES) - 1), wanted)
    lines: list[str] = []
    _pack(root, lines=lines)
    assert any("damaged" in line for line in lines)


def test_damage_that_cannot_be_repaired_is_an_error(root: Path) -> None:
    packed = _pack(root)
    file = _flip(root)
    _photo(99, 300, 200).save(_open(root).describe(len(SIZES) - 1))
    with pytest.raises(DataError, match="damaged") as caught:
        packed.image(len(SIZES) - 1)
    assert str(file.parent) in str(caught.value.hint)


def test_unreadable_photos_stay_unreadable(root: Path) -> None:
    broken = Path(_open(root).describe(2))
    broken.write_bytes(b"no image")
    for _ in range(2):
        packed = _pack(root)
        with pytest.raises(DataError, match=broken.name):
            packed.image(2)
        assert packed.image_sizes()[2].tolist() == [0, 0]
        store = open_store(packed, DataOptions(max_unreadable=1), CPU, lambda _line: None)
        views = ViewExecutor([ViewSpec(size=16)], size=16, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU)
        loader = TrainLoader(packed, store, views, seed=1, global_batch=8, workers=0)
        (batch,) = loader.batches(0, 1)
        assert sorted(batch.index.tolist()) == [0, 1, 3, 3, 4, 5, 6, 7]


def test_worker_processes_take_the_table_not_the_pixels(root: Path) -> None:
    packed = _pack(root)
    copy = pickle.loads(pickle.dumps(packed))
    assert torch.equal(copy.image(1), packed.image(1))


def test_without_room_the_run_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
    lines: list[str] = []
    with pytest.raises(DataError, match="cannot be kept") as caught:
        _pack(root, lines=lines)
    assert "data.cache_dir" in str(caught.value.hint)
    assert any("too full" in line for line in lines)


def test_images_in_memory_are_left_alone() -> None:
    source = ArraySource(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), None)
    assert pack(source, DataOptions(packed_size=32), print) is source


def test_pretraining_sees_packed_images_and_evaluation_the_originals(root: Path) -> None:
    items = ["method.name=simclr", "backbone.name=conv4", "dataset.name=folder", f"dataset.root={root / 'photos'}"]
    items += ["train.batch_size=4", "data.packed_size=32", f"data.cache_dir={root / 'cache'}", "data.workers=0"]
    registry = load_registry(find_registry(Path(__file__).parents[1] / "registry.yaml"))
    composed = compose(Catalog(), registry, recipe=None, layers=[Layer("test", parse_overrides(items))])
    parts = build_parts(composed, lambda _line: None)
    assert parts.loader is not None
    (batch,) = parts.loader.batches(0, 1)
    packed_sizes = _pack(root).image_sizes()[batch.index].flip(1).float()
    assert torch.equal(batch.views[0].source_size, packed_sizes)
    assert isinstance(parts.dataset.split("train"), FileSource)
