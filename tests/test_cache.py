"""Kept pixels: complete or absent, never stale, shared by processes that start at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets_kit import DECODER_WARNING
from faults_kit import make_images

from sslbench.config.schema import DataOptions
from sslbench.data import cache as cache_module
from sslbench.data.cache import ABOUT, CHECKS, PIXELS, MappedPixels, PixelCache
from sslbench.data.encoded import FileSource
from sslbench.data.paths import find_images
from sslbench.data.sources import ArraySource, ConcatSource
from sslbench.data.store import ResidentStore, open_store
from sslbench.errors import DataError

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)
CPU = torch.device("cpu")
SIZE = (12, 12)


def quiet(_line: str) -> None:
    pass


def open_images(root: Path) -> FileSource:
    paths = find_images(root / "train")
    return FileSource(paths, torch.from_numpy(paths.numbered(("a", "b"))))


def entry(root: Path, folder: Path, log: Callable[[str], None] = quiet) -> PixelCache:
    source = open_images(root)
    return PixelCache(source, source.revision(), SIZE, folder, log)


def decoded(root: Path) -> torch.Tensor:
    source = open_images(root)
    return torch.stack([source.image(index) for index in range(len(source))])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_images(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def built(root: Path, folder: Path) -> MappedPixels:
    kept = entry(root, folder).find_or_build()
    assert kept is not None
    return kept


def test_the_second_start_maps_what_the_first_decoded(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entry(root, folder).find() is None
    first = built(root, folder)
    monkeypatch.setattr(FileSource, "image", None)  # nothing is decoded any more
    second = built(root, folder)
    monkeypatch.undo()
    assert torch.equal(first.pixels, decoded(root))
    assert torch.equal(second.pixels, first.pixels)
    assert second.pixels.dtype == torch.uint8
    assert not second.unreadable


def replace_alike(path: Path) -> None:
    """Another image of the same size in bytes and of the same date."""
    about, content = path.stat(), path.read_bytes()
    other = path.parent / "new.tmp"
    other.write_bytes(content[:-20] + bytes(20))
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    other.replace(path)


def rewrite_in_place(path: Path) -> None:
    about = path.stat()
    with path.open("r+b") as file:
        file.write(b"\x89")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        replace_alike,
        rewrite_in_place,
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("zz.png")),
        lambda path: shutil.copy(path, path.with_name("99.png")),
    ],
    ids=["replaced", "rewritten", "removed", "renamed", "added"],
)
def test_a_changed_file_makes_another_entry(root: Path, folder: Path, change: Callable[[Path], None]) -> None:
    before = entry(root, folder)
    assert before.find_or_build()
    change(root / "train/a/03.png")
    after = entry(root, folder)
    assert after.path != before.path
    assert after.find() is None


def test_a_linked_file_counts_as_the_file_it_names(root: Path, tmp_path: Path) -> None:
    original = tmp_path / "other.png"
    (root / "train/a/00.png").rename(original)
    (root / "train/a/00.png").symlink_to(original)
    before = open_images(root).revision()
    rewrite_in_place(original)
    assert open_images(root).revision() != before


def test_the_same_files_elsewhere_are_other_files(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    assert open_images(root).revision() != open_images(tmp_path / "copy").revision()
    assert open_images(root).revision() == open_images(root).revision()


def test_a_file_that_changes_while_it_is_read_leaves_no_entry(root: Path, folder: Path) -> None:
    lines: list[str] = []
    cache = entry(root, folder, lines.append)
    rewrite_in_place(root / "train/b/01.png")
    assert cache.find_or_build() is None
    assert "changed while" in lines[-1]
    assert not list(folder.glob("images-*/"))


def cut(path: Path) -> None:
    os.truncate(path / PIXELS, 1000)


def flip(path: Path) -> None:
    with (path / PIXELS).open("r+b") as file:
        file.seek(700)
        byte = file.read(1)
        file.seek(700)
        file.write(bytes([byte[0] ^ 1]))


def forget(path: Path) -> None:
    (path / ABOUT).unlink()


def scramble(path: Path) -> None:
    (path / ABOUT).write_text("[]")


def shorten(path: Path) -> None:
    os.truncate(path / CHECKS, 0)


@pytest.mark.parametrize("damage", [cut, flip, forget, scramble, shorten])
def test_a_damaged_entry_is_replaced(root: Path, folder: Path, damage: Callable[[Path], None]) -> None:
    lines: list[str] = []
    cache = entry(root, folder, lines.append)
    assert cache.find_or_build()
    damage(cache.path)
    assert cache.find() is None
    assert torch.equal(built(root, folder).pixels, decoded(root))
    assert not list(folder.glob("*.partial"))
    damage(cache.path)
    assert cache.find_or_build()
    assert "damaged" in lines[-1]


FORKED = multiprocessing.get_context("fork")  # importing torch four times would take longer than all else here


def build_slowly(root: Path, folder: Path, seconds: float, decodings: Any, sums: Any) -> None:
    cache = entry(root, folder)
    original = cache.source.image

    def slow(index: int) -> torch.Tensor:
        decodings.put(index)
        time.sleep(seconds)
        return original(index)

    cache.source.image = slow  # type: ignore[method-assign]
    kept = cache.find_or_build()
    sums.put(None if kept is None else int(kept.pixels.sum()))


def start_builder(*arguments: Any) -> Any:
    process = FORKED.Process(target=build_slowly, args=arguments)
    process.start()
    return process


def test_processes_that_start_at_once_decode_once(root: Path, folder: Path) -> None:
    decodings, sums = FORKED.SimpleQueue(), FORKED.SimpleQueue()
    processes = [start_builder(root, folder, 0.02, decodings, sums) for _ in range(4)]
    assert {sums.get() for _ in processes} == {int(decoded(root).sum())}
    for process in processes:
        process.join(timeout=60)
    indices = []
    while not decodings.empty():
        indices.append(decodings.get())
    assert sorted(indices) == list(range(16))
    assert len(list(folder.glob("images-*/"))) == 1


def test_what_a_killed_process_leaves_is_never_read_and_is_removed(root: Path, folder: Path) -> None:
    decodings = FORKED.SimpleQueue()
    process = start_builder(root, folder, 5.0, decodings, FORKED.SimpleQueue())
    decodings.get()
    process.kill()
    process.join(timeout=60)
    assert len(list(folder.glob("*.partial"))) == 1
    assert entry(root, folder).find() is None
    assert torch.equal(built(root, folder).pixels, decoded(root))
    assert not list(folder.glob("*.partial"))


def test_a_full_disk_is_said_and_training_goes_on(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    options = DataOptions(resident="mmap", cache_dir=folder)
    store = open_store(open_images(root), options, CPU, lines.append)
    assert isinstance(store, ResidentStore)
    assert torch.equal(store.pixels, decoded(root))
    assert any("too full" in line for line in lines)
    assert "resident on" in lines[-1]
    assert not list(folder.glob("images-*/"))


def test_a_disk_that_becomes_full_is_said_and_leaves_nothing(root: Path, folder: Path) -> None:
    lines: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        assert entry(root, folder, lines.append).find_or_build() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "larger than allowed" in lines[-1]
    assert not list(folder.glob("images-*/"))
    assert built(root, folder)


def test_a_folder_that_cannot_be_made_is_said(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    options = DataOptions(resident="mmap", cache_dir=tmp_path / "file/cache")
    store = open_store(open_images(root), options, CPU, lines.append)
    assert isinstance(store, ResidentStore)
    assert any("not a folder" in line and "file/cache" in line for line in lines)


def test_unreadable_images_keep_their_meaning(root: Path, folder: Path) -> None:
    (root / "train/a/02.png").write_bytes(b"no image")
    for _ in range(2):
        lines: list[str] = []
        options = DataOptions(resident="mmap", cache_dir=folder, max_unreadable=1)
        store = open_store(open_images(root), options, CPU, lines.append)
        assert set(store.unreadable.reasons) == {2}
        assert sum("skipping" in line and "02.png" in line for line in lines) == 1
    with pytest.raises(DataError, match=r"02\.png"):
        open_store(open_images(root), DataOptions(resident="mmap", cache_dir=folder), CPU, quiet)


def test_an_image_that_can_be_read_again_is(root: Path, folder: Path) -> None:
    """What kept it from being read, a full table of open files perhaps, is not seen in the file."""
    cache = entry(root, folder)
    about = cache.find_or_build()
    assert about is not None
    content = json.loads((cache.path / ABOUT).read_text()) | {"unreadable": [5]}
    (cache.path / ABOUT).write_text(json.dumps(content))
    assert cache.find() is None
    assert not built(root, folder).unreadable


def test_sources_without_files_are_not_kept(root: Path, folder: Path) -> None:
    memory = ArraySource(torch.zeros(4, 3, *SIZE, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert memory.revision() is None
    files = open_images(root)
    assert ConcatSource(files, memory).revision() is None
    assert ConcatSource(files, files).revision() not in (None, files.revision())
    lines: list[str] = []
    open_store(memory, DataOptions(resident="mmap", cache_dir=folder), CPU, lines.append)
    assert "resident on" in lines[-1]
    assert not folder.exists()


def test_small_data_sets_are_not_kept_unless_asked(root: Path, folder: Path) -> None:
    open_store(open_images(root), DataOptions(cache_dir=folder), CPU, quiet)
    assert not folder.exists()
    open_store(open_images(root), DataOptions(cache_dir=folder, resident="mmap"), CPU, quiet)
    assert len(list(folder.glob("images-*/"))) == 1


def test_a_large_entry_is_looked_through_in_samples(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_GROUP_BYTES", 3 * 12 * 12)
    monkeypatch.setattr(cache_module, "_CHECKED_GROUPS", 4)
    kept = built(root, folder)
    assert torch.equal(kept.pixels, decoded(root))
    assert len(np.fromfile(entry(root, folder).path / CHECKS, np.uint32)) == 16
