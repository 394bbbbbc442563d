"""Tiny ImageNet, SlimageNet64, COCO: published layouts, splits, fixed sizes, damaged files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets_kit import DECODER_WARNING, link_images, write_image
from sslbench_plugins.datasets.coco import Coco, CocoOptions
from sslbench_plugins.datasets.slimagenet64 import SlimageNet64
from sslbench_plugins.datasets.tiny_imagenet import TinyImageNet

from sslbench.config.schema import DataOptions
from sslbench.data.filesets import RootOptions
from sslbench.data.paths import PathTable, find_images
from sslbench.data.splits import eval_split
from sslbench.data.store import DecodedStore, ResidentStore, open_store
from sslbench.errors import DataError

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)

CPU = torch.device("cpu")
WNIDS = ("n02", "n01")


def _store(source, **options):
    return open_store(source, DataOptions(**options), CPU, lambda _line: None)


# --- tables of paths ---------------------------------------------------------------------------------------------


def test_a_table_lists_what_is_there_in_a_fixed_order(tmp_path):
    names = ["b/x/2.JPG", "a/1.png", "a/0.jpeg", "0.webp", "a/ü.png"]
    for name in [*names, "a/notes.txt", ".hidden/0.png", "a/.0.png", "empty"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    table = find_images(tmp_path)
    assert list(table.names()) == ["0.webp", "a/0.jpeg", "a/1.png", "a/ü.png", "b/x/2.JPG"]
    assert list(table) == [tmp_path / name for name in table.names()]
    assert list(table.basenames()) == ["0.webp", "0.jpeg", "1.png", "ü.png", "2.JPG"]
    assert table[1:4:2] == [tmp_path / "a/0.jpeg", tmp_path / "a/ü.png"]
    assert table[-1] == tmp_path / "b/x/2.JPG"
    assert table.tops() == ["", "a", "b"]
    assert list(table.select(table.folder == 1).names()) == ["a/0.jpeg", "a/1.png", "a/ü.png"]
    assert list(table.sorted_by_basename().basenames()) == sorted(table.basenames())


def test_a_table_numbers_files_by_their_top_folder(tmp_path):
    table = PathTable(tmp_path, [("b/deep", ["0.png"]), ("a", ["0.png", "1.png"])])
    assert table.numbered(["a", "b"]).tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="holds b, which is no class"):
        table.numbered(["a"])
    empty = PathTable(tmp_path, [])
    assert (len(empty), list(empty.names()), empty.numbered([]).tolist()) == (0, [], [])


def test_names_that_are_not_utf8_survive(tmp_path):
    name = os.fsdecode(b"\xff.png")
    table = PathTable(tmp_path, [("", [name])])
    assert os.fsencode(table[0]).endswith(b"\xff.png")


# --- Tiny ImageNet -----------------------------------------------------------------------------------------------


def _tiny(root: Path) -> Path:
    base = root / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        for image in range(3):
            path = base / "train" / wnid / "images" / f"{wnid}_{image}.JPEG"
            write_image(path, 40 * number + image, (64, 64))
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t10\t10\n")
    rows = []
    for image in range(4):
        write_image(base / "val" / "images" / f"val_{image}.JPEG", 100 + image, (64, 64))
        rows.append(f"val_{image}.JPEG\t{WNIDS[image % 2]}\t0\t0\t9\t9\n")
    write_image(base / "test" / "images" / "test_0.JPEG", size=(64, 64))
    (base / "val" / "val_annotations.txt").write_text("".join(rows[::-1]))
    (base / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    return base


def _sort_val(base: Path) -> None:
    for image in range(4):
        folder = base / "val" / WNIDS[image % 2]
        folder.mkdir(exist_ok=True)
        shutil.move(base / "val" / "images" / f"val_{image}.JPEG", folder)
    (base / "val" / "images").rmdir()


def test_tiny_imagenet_as_published_and_sorted_into_folders(tmp_path):
    base = _tiny(tmp_path)
    dataset = TinyImageNet(RootOptions(root=tmp_path))
    info = dataset.info
    assert (info.classes, info.size, info.splits) == (WNIDS, 64, ("train", "test"))
    assert (info.mean, info.std) == ((0.5,) * 3, (0.25,) * 3)
    assert dataset.split("train").targets.tolist() == [1, 1, 1, 0, 0, 0]
    assert dataset.split("test").targets.tolist() == [0, 1, 0, 1]
    assert [len(eval_split(dataset, name, 0.4)[1]) for name in ("train", "val", "test")] == [4, 2, 4]
    store = _store(dataset.split("train"))
    assert isinstance(store, ResidentStore)
    assert store.pixels.shape == (6, 3, 64, 64)
    published = [dataset.split("test").image(number) for number in range(4)]
    first = dataset.fingerprint()
    _sort_val(base)
    again = TinyImageNet(RootOptions(root=base))
    assert again.split("test").targets.tolist() == [0, 1, 0, 1]
    assert all(torch.equal(again.split("test").image(number), image) for number, image in enumerate(published))
    assert again.fingerprint() == first


def test_tiny_imagenet_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"expected layout:\n.*wnids\.txt") as caught:
        TinyImageNet(RootOptions(root=tmp_path))
    assert "dataset.root" in caught.value.hint
    base = _tiny(tmp_path)
    with pytest.raises(DataError, match=r"no split 'val' \(it has train, test\)"):
        TinyImageNet(RootOptions(root=tmp_path)).split("val")
    file = base / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace("val_2.JPEG", "val_9.JPEG"))
    with pytest.raises(DataError, match=r"nothing about 'val_2\.JPEG'"):
        TinyImageNet(RootOptions(root=tmp_path)).split("train")
    file.unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt"):
        TinyImageNet(RootOptions(root=tmp_path)).split("train")


def test_damaged_images_of_a_fixed_size_set_are_counted_and_named(tmp_path):
    base = _tiny(tmp_path)
    images = base / "train" / "n01" / "images"
    (images / "n01_1.JPEG").write_bytes(b"")
    write_image(images / "n01_2.JPEG", size=(64, 60))
    source = TinyImageNet(RootOptions(root=tmp_path)).split("train")
    with pytest.raises(DataError, match=r"(?s)2 unreadable.*n01_1.JPEG: it is empty.*n01_2.JPEG: decoded to"):
        _store(source)
    assert set(_store(source, max_unreadable=2).unreadable.reasons) == {1, 2}


# --- SlimageNet64 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slim_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("slim")
    original = write_image(root / "original.jpg", size=(64, 64))
    for label in ("n2", "n1"):
        link_images(original, (root / "SlimageNet64" / label / f"{n:03d}.jpg" for n in range(200)))
    original.unlink()
    return root


def test_slimagenet_is_cut_in_the_order_of_names(slim_root):
    dataset = SlimageNet64(RootOptions(root=slim_root))
    assert (dataset.info.classes, dataset.info.size) == (("n1", "n2"), 64)
    assert (dataset.info.mean, dataset.info.std) == ((0.5,) * 3, (0.25,) * 3)
    train, test = dataset.split("train"), dataset.split("test")
    assert train.targets.bincount().tolist() == [160, 160]
    assert test.targets.bincount().tolist() == [40, 40]
    assert train.describe(159).endswith("n1/159.jpg")
    assert test.describe(0).endswith("n1/160.jpg")
    assert test.describe(40).endswith("n2/160.jpg")
    assert train.common_side() == 64


def test_slimagenet_sorted_by_hand(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for number in range(count):
            write_image(tmp_path / split / "n1" / f"{number}.png", size=(64, 64))
    dataset = SlimageNet64(RootOptions(root=tmp_path))
    assert [len(dataset.split(split)) for split in ("train", "test")] == [3, 1]


def test_slimagenet_refuses_what_cannot_be_it(tmp_path):
    with pytest.raises(DataError, match="expected layout"):
        SlimageNet64(RootOptions(root=tmp_path / "nowhere"))
    with pytest.raises(DataError, match="expected layout"):
        SlimageNet64(RootOptions(root=tmp_path))
    write_image(tmp_path / "n1" / "0.png")
    with pytest.raises(DataError, match=r"more than 160 images.*n1"):
        SlimageNet64(RootOptions(root=tmp_path))


# --- COCO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "images"])
def test_coco_is_unlabelled_and_of_many_sizes(tmp_path, below):
    for number in range(6):
        write_image(tmp_path / below / "train2017" / f"{number:012d}.jpg", number, (20 + number, 24))
    write_image(tmp_path / below / "val2017" / "0.jpg")
    dataset = Coco(CocoOptions(root=tmp_path))
    info = dataset.info
    assert (info.task, info.classes, info.size, info.splits) == ("unlabelled", (), None, ("train",))
    source = dataset.split("train")
    assert (len(source), source.targets, dataset.key) == (6, None, "coco")
    assert isinstance(_store(source), DecodedStore)
    assert source.image(3).shape == (3, 24, 23)
    other = Coco(CocoOptions(root=tmp_path, images="val2017"))
    assert (len(other.split("train")), other.key) == (1, "coco-val2017")
    assert other.fingerprint() != dataset.fingerprint()
    with pytest.raises(DataError, match=r"ROOT/unlabeled2017/\*\.jpg"):
        Coco(CocoOptions(root=tmp_path, images="unlabeled2017"))
