"""CIFAR and STL-10 read from files of the published layout that the tests write themselves."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sslbench_plugins.datasets.cifar10 import Cifar10
from sslbench_plugins.datasets.cifar100 import Cifar100
from sslbench_plugins.datasets.stl10 import Stl10
from sslbench_plugins.datasets.supercifar100 import SuperCifar100

from sslbench.data.downloads import DownloadOptions
from sslbench.errors import DataError

# Superclass to its five classes, as published with CIFAR-100.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
COARSE = list(SUPERCLASSES)
FINE = sorted(name for names in SUPERCLASSES.values() for name in names.split())
COARSE_OF_FINE = [
    next(c for c, names in enumerate(SUPERCLASSES.values()) if name in names.split()) for name in FINE
]


def _dump(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def _pixels(total: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (total, 3072), dtype=np.uint8)


@pytest.fixture
def cifar10_root(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        _dump(folder / name, {"data": _pixels(20, number), "labels": [(n + number) % 10 for n in range(20)]})
    _dump(folder / "batches.meta", {"label_names": [f"class{n}" for n in range(10)]})
    return tmp_path


@pytest.fixture
def cifar100_root(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-100-python"
    for name, total in (("train", 200), ("test", 100)):
        fine = [n % 100 for n in range(total)]
        coarse = [COARSE_OF_FINE[label] for label in fine]
        _dump(folder / name, {"data": _pixels(total, total), "fine_labels": fine, "coarse_labels": coarse})
    _dump(folder / "meta", {"fine_label_names": FINE, "coarse_label_names": COARSE})
    return tmp_path


def test_cifar10_keeps_the_order_of_files_and_channels(cifar10_root):
    dataset = Cifar10(DownloadOptions(root=cifar10_root))
    assert (dataset.info.size, dataset.info.splits) == (32, ("train", "test"))
    assert dataset.info.classes == tuple(f"class{n}" for n in range(10))
    train = dataset.split("train")
    assert train.pixels().shape == (100, 3, 32, 32)
    assert torch.equal(train.image(45), torch.from_numpy(_pixels(20, 2)[5].reshape(3, 32, 32)))
    assert train.targets[45] == 7
    assert len(dataset.split("test")) == 20


def test_cifar_reads_what_torchvision_reads(cifar10_root, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda _self: None)
    theirs = CIFAR10(cifar10_root, train=True)
    ours = Cifar10(DownloadOptions(root=cifar10_root)).split("train")
    assert np.array_equal(ours.pixels().permute(0, 2, 3, 1).numpy(), theirs.data)
    assert ours.targets.tolist() == theirs.targets


def test_superclasses_group_the_published_five_classes(cifar100_root):
    options = DownloadOptions(root=cifar100_root)
    fine, coarse = Cifar100(options), SuperCifar100(options)
    assert (len(fine.info.classes), len(coarse.info.classes)) == (100, 20)
    assert torch.equal(fine.split("train").pixels(), coarse.split("train").pixels())
    members: dict[str, set[str]] = {}
    for split in ("train", "test"):
        pairs = zip(fine.split(split).targets.tolist(), coarse.split(split).targets.tolist(), strict=True)
        for small, large in pairs:
            members.setdefault(coarse.info.classes[large], set()).add(fine.info.classes[small])
    assert members == {name: set(names.split()) for name, names in SUPERCLASSES.items()}
    assert fine.fingerprint() != coarse.fingerprint()


def test_cifar_fingerprint_follows_pixels_and_labels(cifar10_root):
    def fingerprint() -> str:
        return Cifar10(DownloadOptions(root=cifar10_root)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    path = cifar10_root / "cifar-10-batches-py" / "test_batch"
    content = {"data": _pixels(20, 5), "labels": [(n + 5) % 10 for n in range(20)]}
    _dump(path, {**content, "labels": [0] * 20})
    relabelled = fingerprint()
    _dump(path, {**content, "data": _pixels(20, 6)})
    assert len({first, relabelled, fingerprint()}) == 3


def test_missing_files_name_the_layout_and_the_option(tmp_path):
    for cls, name in ((Cifar10, "cifar-10-batches-py"), (Cifar100, "cifar-100-python"), (Stl10, "stl10_binary")):
        with pytest.raises(DataError, match=name) as caught:
            cls(DownloadOptions(root=tmp_path))
        assert "dataset.download=true" in caught.value.hint


def test_a_single_missing_file_is_named(cifar10_root):
    (cifar10_root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"missing under .*: data_batch_3;"):
        Cifar10(DownloadOptions(root=cifar10_root))


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused(cifar10_root):
    target = cifar10_root / "touched"
    _dump(cifar10_root / "cifar-10-batches-py" / "batches.meta", {"label_names": _Bomb(target)})
    with pytest.raises(DataError, match="does not contain"):
        _ = Cifar10(DownloadOptions(root=cifar10_root)).info
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"data": 1})])
def test_damaged_cifar_files_are_named(cifar10_root, content):
    (cifar10_root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        Cifar10(DownloadOptions(root=cifar10_root)).split("test")


@pytest.fixture
def stl10_root(tmp_path: Path) -> Path:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, total in (("train", 20), ("test", 10), ("unlabeled", 5)):
        images = np.random.default_rng(total).integers(0, 256, (total, 3, 96, 96), dtype=np.uint8)
        images.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(total, dtype=np.uint8) % 10 + 1).tofile(folder / f"{name}_y.bin")
    return tmp_path


def test_stl10_splits_and_orientation(stl10_root):
    dataset = Stl10(DownloadOptions(root=stl10_root))
    info = dataset.info
    assert (info.pretrain_split, info.size, len(info.classes)) == ("unlabeled", 96, 10)
    assert {split: len(dataset.split(split)) for split in info.splits} == {"train": 20, "test": 10, "unlabeled": 5}
    assert dataset.split("unlabeled").targets is None
    assert dataset.split("train").targets.tolist() == [n % 10 for n in range(20)]
    stored = np.fromfile(stl10_root / "stl10_binary" / "test_X.bin", np.uint8).reshape(10, 3, 96, 96)
    assert torch.equal(dataset.split("test").image(3), torch.from_numpy(stored[3].swapaxes(1, 2).copy()))
    assert dataset.split("test").image_sizes().tolist() == [[96, 96]] * 10


def test_statistics_are_those_of_relational_reasoning(cifar10_root, cifar100_root, stl10_root):
    published = {
        Cifar10(DownloadOptions(root=cifar10_root)): ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        Cifar100(DownloadOptions(root=cifar100_root)): ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
        SuperCifar100(DownloadOptions(root=cifar100_root)): ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
        Stl10(DownloadOptions(root=stl10_root)): ((0.5,) * 3, (0.5,) * 3),
    }
    for dataset, statistics in published.items():
        assert (dataset.info.mean, dataset.info.std) == statistics


def test_stl10_fingerprint_and_damage(stl10_root):
    first = Stl10(DownloadOptions(root=stl10_root)).fingerprint()
    labels = stl10_root / "stl10_binary" / "test_y.bin"
    labels.write_bytes(bytes([1] * 10))
    assert Stl10(DownloadOptions(root=stl10_root)).fingerprint() != first
    labels.write_bytes(bytes([0] * 10))
    with pytest.raises(DataError, match="do not belong together"):
        Stl10(DownloadOptions(root=stl10_root)).split("test")
    with (stl10_root / "stl10_binary" / "unlabeled_X.bin").open("ab") as file:
        file.write(b"1")
    labels.write_bytes(bytes([1] * 10))
    with pytest.raises(DataError, match="cut off"):
        Stl10(DownloadOptions(root=stl10_root)).split("unlabeled")
