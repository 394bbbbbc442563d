"""Images in folders: layouts, formats, damaged files, fingerprints."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sslbench_plugins.datasets.folder import Folder, FolderOptions
from torch import Tensor

from sslbench.config.schema import DataOptions
from sslbench.data import imagefile
from sslbench.data.imagefile import decode_image, digest_files, image_size, read_bytes
from sslbench.data.paths import find_images
from sslbench.data.splits import eval_split
from sslbench.data.store import ResidentStore, open_store
from sslbench.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

COLOUR = (200, 40, 120)


def _write(path: Path, colour: tuple[int, int, int] = COLOUR, size: tuple[int, int] = (12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def _folder(root: Path, **options) -> Folder:
    return Folder(FolderOptions(root=root, **options))


def test_split_layout(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for label in ("cat", "ant"):
            for number in range(count):
                _write(tmp_path / split / label / f"{number}.png")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    _write(tmp_path / "train" / "loose.png")
    _write(tmp_path / "train" / ".cache" / "0.png")
    _write(tmp_path / "train" / "ant" / ".hidden.png")
    dataset = _folder(tmp_path)
    info = dataset.info
    assert (info.classes, info.splits, info.size) == (("ant", "cat"), ("train", "val", "test"), 12)
    assert info.task == "classification"
    assert {split: dataset.split(split).targets.tolist() for split in info.splits} == {
        "train": [0, 0, 0, 1, 1, 1],
        "val": [0, 0, 1, 1],
        "test": [0, 1],
    }
    assert dataset.split("train").describe(3).endswith("train/cat/0.png")
    assert len(eval_split(dataset, "trainval", 0.1)[1]) == 10


def test_class_layout_has_no_test_split(tmp_path):
    for label in ("b", "a"):
        for number in range(4):
            _write(tmp_path / label / "deeper" / f"{number}.JPG")
    dataset = _folder(tmp_path)
    assert (dataset.info.classes, dataset.info.splits) == (("a", "b"), ("train",))
    with pytest.raises(DataError, match=r"no split 'test'.*no images under .*test"):
        dataset.split("test")
    assert [len(eval_split(dataset, name, 0.25)[1]) for name in ("train", "val")] == [6, 2]


@pytest.mark.parametrize("below", ["", "train"])
def test_flat_layout_is_unlabelled(tmp_path, below):
    for number in range(3):
        _write(tmp_path / below / f"{number}.jpeg")
    dataset = _folder(tmp_path)
    assert (dataset.info.task, dataset.info.classes) == ("unlabelled", ())
    assert dataset.split("train").targets is None
    assert len(dataset.split("train")) == 3
    with pytest.raises(DataError, match="no labels"):
        eval_split(dataset, "train", 0.1)


def test_named_folders(tmp_path):
    for split in ("fit", "val"):
        _write(tmp_path / split / "x" / "0.png")
    info = _folder(tmp_path, train="fit", test="val").info
    assert info.splits == ("train", "test")


def test_missing_or_empty_root_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match="no folder") as caught:
        _folder(tmp_path / "nowhere")
    assert "dataset.root" in caught.value.hint
    with pytest.raises(DataError, match=r"ROOT/train/CLASS"):
        _folder(tmp_path)
    _write(tmp_path / "test" / "x" / "0.png")
    with pytest.raises(DataError, match="no training images"):
        _folder(tmp_path)


def test_a_class_that_train_lacks_is_an_error(tmp_path):
    _write(tmp_path / "train" / "a" / "0.png")
    _write(tmp_path / "test" / "z" / "0.png")
    with pytest.raises(DataError, match="holds z"):
        _folder(tmp_path).split("test")


def test_linked_folders_are_followed(tmp_path):
    _write(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "root" / "train").mkdir(parents=True)
    (tmp_path / "root" / "train" / "a").symlink_to(tmp_path / "elsewhere")
    assert len(_folder(tmp_path / "root").split("train")) == 1


def test_size_is_known_only_if_common_and_square(tmp_path):
    _write(tmp_path / "a" / "0.png", size=(12, 10))
    assert _folder(tmp_path).info.size is None
    _write(tmp_path / "a" / "0.png", size=(12, 12))
    _write(tmp_path / "a" / "1.png", size=(14, 14))
    dataset = _folder(tmp_path)
    assert dataset.info.size is None
    assert dataset.split("train").image_sizes().tolist() == [[12, 12], [14, 14]]


def _gradient(high: int) -> np.ndarray:
    return np.linspace(0, high, 12 * 8).reshape(12, 8)


def _save(path: Path) -> Tensor:
    """Write a picture in one of the awkward modes and return what should be read."""
    grey = _gradient(255).astype(np.uint8)
    colours = np.stack([grey, grey[::-1], 255 - grey], axis=2)
    kind = path.stem
    if kind == "grey":
        Image.fromarray(grey).save(path)
        colours = np.repeat(grey[..., None], 3, axis=2)
    elif kind == "deep":
        Image.fromarray((grey.astype(np.uint16) << 8) + 7).save(path)
        colours = np.repeat(grey[..., None], 3, axis=2)
    elif kind == "alpha":
        Image.fromarray(np.dstack([colours, grey]), "RGBA").save(path)
    elif kind == "palette":
        image = Image.fromarray(colours).quantize(64)
        image.save(path)
        colours = np.asarray(image.convert("RGB"))
    elif kind == "cmyk":
        image = Image.fromarray(colours).convert("CMYK")
        image.save(path, quality=100)
    else:
        Image.fromarray(colours).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return torch.from_numpy(colours.copy()).permute(2, 0, 1)


def _read(path: Path) -> Tensor:
    return decode_image(read_bytes(path), str(path))


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((f"rgb{suffix}", 0) for suffix in (".png", ".PNG", ".bmp", ".ppm", ".tif", ".tiff", ".webp")),
        *((f"grey{suffix}", 0) for suffix in (".png", ".pgm", ".tif", ".bmp")),
        *((f"deep{suffix}", 0) for suffix in (".png", ".tif", ".pgm")),
        *((f"alpha{suffix}", 0) for suffix in (".png", ".tif")),
        ("palette.png", 0),
        ("palette.bmp", 0),
        ("grey.jpg", 4),
        ("cmyk.jpg", 12),
        ("cmyk.tif", 1),
    ],
)
def test_every_format_and_mode_becomes_rgb(tmp_path, name, tolerance):
    expected = _save(tmp_path / name)
    image = _read(tmp_path / name)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 12, 8)
    assert (image.int() - expected.int()).abs().max() <= tolerance
    assert image_size(tmp_path / name) == (12, 8)


def test_a_format_under_a_wrong_name_is_read(tmp_path):
    _write(tmp_path / "0.bmp").rename(tmp_path / "0.jpg")
    assert _read(tmp_path / "0.jpg")[:, 0, 0].tolist() == list(COLOUR)


def _damaged(root: Path) -> Folder:
    for number in range(6):
        _write(root / "a" / f"{number}.jpg", (40 * number, 0, 0))
    (root / "a" / "1.jpg").write_bytes(b"")
    whole = (root / "a" / "3.jpg").read_bytes()
    (root / "a" / "3.jpg").write_bytes(whole[: len(whole) // 3])
    return _folder(root)


def test_unreadable_files_are_named(tmp_path):
    source = _damaged(tmp_path).split("train")
    for number in (1, 3):
        with pytest.raises(DataError, match=rf"cannot read image .*a/{number}\.jpg"):
            source.image(number)
    with pytest.raises(DataError, match=r"(?s)2 unreadable image.*1\.jpg.*3\.jpg"):
        open_store(source, DataOptions(), torch.device("cpu"), lambda _line: None)


def test_unreadable_files_are_skipped_on_request(tmp_path):
    dataset = _damaged(tmp_path)
    assert dataset.info.size == 12
    lines: list[str] = []
    store = open_store(dataset.split("train"), DataOptions(max_unreadable=2), torch.device("cpu"), lines.append)
    assert isinstance(store, ResidentStore)
    assert set(store.unreadable.reasons) == {1, 3}
    assert sum("skipping" in line for line in lines) == 2


def test_fingerprint_follows_contents_names_and_nothing_else(tmp_path):
    for place in ("one", "two"):
        for number in range(3):
            _write(tmp_path / place / "a" / f"{number}.png", (number, 0, 0))
    prints = [_folder(tmp_path / place).fingerprint() for place in ("one", "two")]
    assert prints[0] == prints[1]
    os.utime(tmp_path / "two" / "a" / "0.png", (1, 1))
    assert _folder(tmp_path / "two").fingerprint() == prints[0]
    _write(tmp_path / "two" / "a" / "0.png", (9, 0, 0))
    assert _folder(tmp_path / "two").fingerprint() != prints[0]
    (tmp_path / "one" / "a").rename(tmp_path / "one" / "b")
    assert _folder(tmp_path / "one").fingerprint() != prints[0]


def _digest(folder: Path) -> str:
    return digest_files({"train": find_images(folder)})


def test_fingerprint_of_a_large_set_samples_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr(imagefile, "_MANY_FILES", 1)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(bytes(100_000))
    first = _digest(tmp_path)
    paths[0].write_bytes(bytes(99_999) + b"1")
    assert _digest(tmp_path) == first
    paths[0].write_bytes(b"1" + bytes(99_999))
    assert _digest(tmp_path) != first
    paths[0].write_bytes(bytes(100_001))
    assert _digest(tmp_path) != first


def test_fingerprint_of_a_huge_set_samples_some_files_and_all_names(tmp_path, monkeypatch):
    monkeypatch.setattr(imagefile, "_MANY_FILES", 1)
    monkeypatch.setattr(imagefile, "_MOST_FILES", 2)
    monkeypatch.setattr(imagefile, "_SAMPLED_FILES", 3)
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"0")
    first = _digest(tmp_path)
    (tmp_path / "1.png").write_bytes(b"1")
    assert _digest(tmp_path) == first, "every second file is a sample"
    (tmp_path / "2.png").write_bytes(b"1")
    changed = _digest(tmp_path)
    assert changed != first
    (tmp_path / "5.png").rename(tmp_path / "6.png")
    assert _digest(tmp_path) != changed


@pytest.mark.slow
@pytest.mark.skipif("SSLBENCH_TEST_DATA" not in os.environ, reason="SSLBENCH_TEST_DATA is not set")
def test_cifar10_as_jpeg_files(tmp_path):
    with tarfile.open(Path(os.environ["SSLBENCH_TEST_DATA"], "cifar10-jpeg.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    dataset = _folder(tmp_path)
    info = dataset.info
    assert (len(info.classes), info.size, info.splits) == (10, 32, ("train", "test"))
    assert [len(dataset.split(split)) for split in info.splits] == [50_000, 10_000]
    assert dataset.split("train").targets.bincount().tolist() == [5000] * 10
    assert dataset.fingerprint() == _folder(tmp_path).fingerprint()
    store = open_store(dataset.split("train"), DataOptions(), torch.device("cpu"), lambda _line: None)
    assert isinstance(store, ResidentStore)
    means = store.pixels[::7].float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.491, 0.482, 0.447]), atol=5e-3, rtol=0)
