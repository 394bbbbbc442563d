"""ImageNet: class folders, flat validation images, subsets of few labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets_kit import DECODER_WARNING, link_images, write_image
from scipy.io import savemat
from sslbench_plugins.datasets.imagenet import ImageNet, ImageNetOptions

from sslbench.data.paths import PathTable
from sslbench.data.splits import eval_split
from sslbench.data.subsets import balanced_subset
from sslbench.errors import DataError

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)

WNIDS = ("n01440764", "n02084071", "n09999999")
PER_CLASS = 40
VAL = [2, 0, 1, 1, 2, 0]
"""Class of each validation image in the order of names."""


def _name(number: int) -> str:
    return f"ILSVRC2012_val_{number + 1:08d}.JPEG"


def _train(root: Path) -> Path:
    original = write_image(root / "original.jpg", size=(16, 12))
    for wnid in WNIDS:
        link_images(original, (root / "train" / wnid / f"{wnid}_{n}.JPEG" for n in range(PER_CLASS)))
    return original


def _folders(root: Path) -> Path:
    original = _train(root)
    for number, label in enumerate(VAL):
        link_images(original, [root / "val" / WNIDS[label] / _name(number)])
    return root


def _flat(root: Path) -> Path:
    link_images(_train(root), (root / "val" / _name(number) for number in range(len(VAL))))
    return root


def _devkit(root: Path) -> None:
    """Ids of ILSVRC 2012 are not in the order of WordNet ids, and inner nodes follow the leaves."""
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    ids = {WNIDS[1]: 1, WNIDS[2]: 2, WNIDS[0]: 3, "n00001740": 4}
    synsets = np.array(
        [(number, wnid, "words", int(number == 4)) for wnid, number in ids.items()],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")],
    )
    savemat(folder / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{ids[WNIDS[label]]}\n" for label in VAL)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def _torchvision_meta(root: Path) -> None:
    torch.save(({wnid: (wnid,) for wnid in WNIDS}, [WNIDS[label] for label in VAL]), root / "meta.bin")


def _kaggle(root: Path) -> None:
    rows = [f"{_name(n).removesuffix('.JPEG')},{WNIDS[label]} 1 2 3 4 \n" for n, label in enumerate(VAL)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows[::-1]))


def _dataset(root: Path, **options) -> ImageNet:
    return ImageNet(ImageNetOptions(root=root, **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return _folders(tmp_path_factory.mktemp("imagenet"))


def test_class_folders(root):
    dataset = _dataset(root, std=(0.228, 0.224, 0.225))
    info = dataset.info
    assert (info.classes, info.size, info.splits) == (WNIDS, None, ("train", "test"))
    assert info.std == (0.228, 0.224, 0.225)
    assert dataset.key == "imagenet"
    assert dataset.split("train").targets.bincount().tolist() == [PER_CLASS] * 3
    assert dataset.split("test").targets.tolist() == VAL
    assert dataset.split("test").describe(0).endswith(f"val/{WNIDS[2]}/{_name(0)}")
    assert dataset.split("train").image(0).shape == (3, 12, 16)
    lengths = {name: len(eval_split(dataset, name, 0.1)[1]) for name in ("train", "val", "trainval", "test")}
    assert lengths == {"train": 108, "val": 12, "trainval": 120, "test": 6}


@pytest.mark.parametrize("tell", [_devkit, _torchvision_meta, _kaggle])
def test_validation_images_in_one_folder(tmp_path, root, tell):
    tell(_flat(tmp_path))
    dataset = _dataset(tmp_path)
    assert dataset.split("test").targets.tolist() == VAL
    assert dataset.fingerprint() == _dataset(root).fingerprint(), "the same images in another layout"


def test_kaggle_folders_are_found(tmp_path):
    _folders(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    _kaggle(tmp_path)
    assert _dataset(tmp_path).split("test").targets.tolist() == VAL


def test_train_alone_has_no_test_split(tmp_path):
    _train(tmp_path)
    assert _dataset(tmp_path).info.splits == ("train",)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match="ROOT/train/n01440764"):
        _dataset(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="does not hold class folders"):
        _dataset(tmp_path)
    _flat(tmp_path)
    with pytest.raises(DataError, match="nothing tells the classes"):
        _dataset(tmp_path).split("test")
    _kaggle(tmp_path)
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text(table.read_text().replace(_name(3)[:-5], "another"))
    with pytest.raises(DataError, match=f"does not tell the class of {_name(3)[:-5]}"):
        _dataset(tmp_path).split("test")
    table.unlink()
    _devkit(tmp_path)
    (tmp_path / "val" / _name(0)).unlink()
    with pytest.raises(DataError, match="holds 5 images, the development kit tells 6"):
        _dataset(tmp_path).split("test")
    (tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"?" * 200)
    with pytest.raises(DataError, match="cannot read ImageNet's development kit"):
        _dataset(tmp_path).split("test")


def test_a_validation_class_without_training_images(tmp_path):
    _folders(tmp_path)
    (tmp_path / "train" / WNIDS[2]).rename(tmp_path / "train" / "n00000000")
    with pytest.raises(DataError, match=f"holds {WNIDS[2]}"):
        _dataset(tmp_path).split("test")


# --- few labels --------------------------------------------------------------------------------------------------


def _names(dataset: ImageNet) -> list[str]:
    return list(dataset.split("train").paths.basenames())


def test_ten_percent_is_balanced_reproducible_and_leaves_the_test_split_alone(root):
    dataset = _dataset(root, subset="10%")
    assert dataset.key == "imagenet-10pct"
    assert dataset.split("train").targets.bincount().tolist() == [4, 4, 4]
    assert _names(dataset) == _names(_dataset(root, subset="10%"))
    assert set(_names(dataset)) < set(_names(_dataset(root)))
    assert dataset.split("test").targets.tolist() == VAL
    assert dataset.fingerprint() != _dataset(root).fingerprint()
    numbers = [int(name.split("_")[1].split(".")[0]) for name in _names(dataset)]
    assert numbers[:4] != numbers[4:8], "each class has a choice of its own"


def test_one_percent_of_few_images_is_one_of_each_class(root):
    assert _dataset(root, subset="1%").split("train").targets.tolist() == [0, 1, 2]


@pytest.mark.slow
def test_subsets_of_the_real_counts_have_the_published_sizes():
    """732 to 1,300 images of each class, 1,281,167 in all, as ImageNet has."""
    counts = np.full(1000, 1300)
    counts[:66] = np.linspace(732, 1299, 66).astype(int)
    counts[-1] -= counts.sum() - 1_281_167
    assert counts.sum() == 1_281_167
    classes = [f"n{number:08d}" for number in range(1000)]
    listing = [
        (label, [f"{label}_{n}.JPEG" for n in range(count)]) for label, count in zip(classes, counts, strict=True)
    ]
    paths = PathTable(Path("train"), listing)
    targets = paths.numbered(classes)
    for percent, total, each in ((1, 12_811, {12, 13}), (10, 128_116, {128, 129})):
        chosen = balanced_subset(paths, targets, classes, percent)
        assert len(chosen) == total
        assert set(np.bincount(targets[chosen]).tolist()) == each
    one, ten = (set(balanced_subset(paths, targets, classes, percent).tolist()) for percent in (1, 10))
    assert one < ten, "the images with 1 % of the labels are among those with 10 %"


def test_the_choice_depends_on_names_alone(tmp_path):
    listing = [("b", [f"b_{n}.JPEG" for n in range(30)]), ("a", [f"a_{n}.JPEG" for n in range(50)])]
    turned = [(label, names[::-1]) for label, names in listing[::-1]]
    found = []
    for tables in (listing, turned):
        paths = PathTable(tmp_path, tables)
        chosen = balanced_subset(paths, paths.numbered(["a", "b"]), ["a", "b"], 10)
        found.append(set(paths.select(chosen).names()))
    assert found[0] == found[1]
    assert Counter(name[0] for name in found[0]) == {"a": 4, "b": 4}


def test_a_list_of_names(root, tmp_path):
    names = [f"{WNIDS[0]}_7.JPEG", f"{WNIDS[2]}_0.JPEG", f"{WNIDS[2]}_31.JPEG"]
    file = tmp_path / "1percent.txt"
    file.write_text("\n".join(names[::-1]) + "\n\n")
    dataset = _dataset(root, subset=str(file))
    assert (sorted(_names(dataset)), dataset.key) == (names, "imagenet-1percent")
    assert dataset.split("train").targets.tolist() == [0, 2, 2]
    file.write_text("\n".join([*names, f"{WNIDS[1]}_77.JPEG", "n05_1.JPEG"]))
    with pytest.raises(DataError, match=rf"lists 2 images .*: {WNIDS[1]}/{WNIDS[1]}_77.JPEG, n05/n05_1.JPEG"):
        _dataset(root, subset=str(file)).split("train")
    file.write_text("")
    with pytest.raises(DataError, match="lists 0 images"):
        _dataset(root, subset=str(file)).split("train")
    with pytest.raises(DataError, match="cannot read the list") as caught:
        _dataset(root, subset="2%").split("train")
    assert "1%, 10%" in caught.value.hint
