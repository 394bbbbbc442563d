"""The kit passes every built-in data set, and names each defect that is put into one."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets_kit import DECODER_WARNING, write_classes, write_noise
from PIL import Image
from torch import Tensor

from sslbench.config.options import cosmetic
from sslbench.errors import ConfigError, DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options, Published, Source
from sslbench.plugin.catalog import Catalog
from sslbench.testing import ConformanceError, check_dataset
from sslbench.testing.dataset import DatasetSubject
from sslbench.testing.dataset_files import FILE_RULES
from sslbench.testing.datasets import RULES
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import Checkup, check_up

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)


# --- the built-in ones, on files of their layouts


def _cifar10(root: Path) -> dict[str, Any]:
    return _cifar(
        root / "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], "labels"
    )


def _cifar100(root: Path) -> dict[str, Any]:
    return _cifar(root / "cifar-100-python", ["train", "test"], "fine_labels", "coarse_labels")


def _cifar(folder: Path, files: list[str], *keys: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (10, 3072), dtype=np.uint8)
        content: dict[str, Any] = {"data": pixels} | {key: list(range(10)) for key in keys}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    names = {"label_names": 10, "fine_label_names": 100, "coarse_label_names": 20}
    meta = {key: [f"class {n}" for n in range(count)] for key, count in names.items()}
    (folder / ("batches.meta" if keys == ("labels",) else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return {"root": folder.parent}


def _stl10(root: Path) -> dict[str, Any]:
    folder = root / "stl10_binary"
    folder.mkdir()
    for split, count in (("train", 10), ("test", 8), ("unlabeled", 6)):
        pixels = np.random.default_rng(count).integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8)
        (folder / f"{split}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(1 + n % 10 for n in range(count)))
    (folder / "unlabeled_y.bin").unlink()
    (folder / "class_names.txt").write_text("airplane\n")
    return {"root": root}


def _tiny_imagenet(root: Path) -> dict[str, Any]:
    base, wnids = root / "tiny-imagenet-200", ["n01443537", "n01629819"]
    write_classes(base, {f"train/{wnid}/images/{wnid}_{{}}.JPEG": 4 for wnid in wnids}, (64, 64))
    write_classes(base, {"val/images/val_{}.JPEG": 4}, (64, 64), first=100)
    (base / "wnids.txt").write_text("\n".join(wnids))
    rows = "".join(f"val_{n}.JPEG\t{wnids[n % 2]}\t0\t0\t1\t1\n" for n in range(4))
    (base / "val" / "val_annotations.txt").write_text(rows)
    return {"root": root}


def _slimagenet64(root: Path) -> dict[str, Any]:
    write_classes(root / "SlimageNet64", {"a/{:03}.png": 162, "b/{:03}.png": 162}, (64, 64))
    return {"root": root}


def _imagenet(root: Path) -> dict[str, Any]:
    write_classes(root, {"train/n01440764/{}.JPEG": 4, "train/n01443537/{}.JPEG": 4}, (20, 16))
    write_classes(root, {"val/n01440764/{}.JPEG": 2, "val/n01443537/{}.JPEG": 2}, (16, 20), first=50)
    return {"root": root}


def _coco(root: Path) -> dict[str, Any]:
    write_classes(root, {"train2017/{:012}.jpg": 4}, (20, 16))
    return {"root": root}


def _voc(root: Path, year: str, splits: tuple[str, ...]) -> dict[str, Any]:
    from sslbench_plugins.datasets.voc import CLASSES

    base = root / "VOCdevkit" / f"VOC{year}"
    lists = base / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for first, split in enumerate(splits):
        numbers = range(10 * first, 10 * first + 4)
        (lists / f"{split}.txt").write_text("".join(f"{n:06d}\n" for n in numbers))
        for c, label in enumerate(CLASSES):
            rows = "".join(f"{n:06d} {1 if n % 4 == c else -1:2d}\n" for n in numbers)
            (lists / f"{label}_{split}.txt").write_text(rows)
        for n in numbers:
            write_noise(base / "JPEGImages" / f"{n:06d}.jpg", n, (20, 16))
    return {"root": root}


def _voc2007(root: Path) -> dict[str, Any]:
    return _voc(root, "2007", ("train", "val", "test"))


def _voc2012(root: Path) -> dict[str, Any]:
    return _voc(root, "2012", ("train", "val"))


def _folder(root: Path) -> dict[str, Any]:
    write_classes(root, {f"{split}/{name}/{{}}.png": 4 for split in ("train", "val", "test") for name in "ab"})
    return {"root": root}


def _shards(root: Path) -> dict[str, Any]:
    for split, first in (("train", 0), ("test", 50)):
        with tarfile.open(root / f"{split}-0.tar", "w") as archive:
            for number in range(first, first + 6):
                image = write_noise(root / "made" / f"{number}.png", number)
                label = image.with_suffix(".cls")
                label.write_text(str(number % 3))
                archive.add(image, image.name)
                archive.add(label, label.name)
    for path in (root / "made").iterdir():
        path.unlink()
    (root / "made").rmdir()
    return {"shards": f"{root}/train-{{0..0}}.tar", "test": f"{root}/test-*.tar"}


def _nothing(root: Path) -> dict[str, Any]:
    return {}


BUILTIN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "supercifar100": _cifar100,
    "stl10": _stl10,
    "tiny-imagenet": _tiny_imagenet,
    "slimagenet64": _slimagenet64,
    "imagenet": _imagenet,
    "coco": _coco,
    "voc2007": _voc2007,
    "voc2012": _voc2012,
    "folder": _folder,
    "shards": _shards,
    "digits": _nothing,
    "mnist5k": _nothing,
}
QUICK = ("folder", "digits")
#: What does not apply to some: those without files of their own, and published sizes without all the files.
EXPECTED_NOT_TRIED = {
    "published size is true",
    "a copy in another folder is the same",
    "fingerprint follows images and targets",
    "damaged files are errors that name them",
    "missing files are errors that tell the layout",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BUILTIN]
)
def test_built_in_data_sets_pass(name: str, tmp_path: Path) -> None:
    options = BUILTIN[name](tmp_path)
    checkup = check_dataset(name, options=options, processes=name not in QUICK)
    checkup.raise_if_broken()
    skipped = {verdict.rule for verdict in checkup.verdicts if verdict.outcome == "not tried"}
    assert skipped <= (EXPECTED_NOT_TRIED if not options else {"published size is true"})


def test_no_data_set_is_left_out() -> None:
    installed = {entry.name for entry in Catalog().entries("dataset") if entry.distribution == "sslbench"}
    assert installed - {"hf"} == BUILTIN.keys()  # a bridge has no layout of its own


# --- a correct one of our own, and what can be wrong with it


class Files(Source):
    def __init__(self, paths: list[Path], targets: list[int]) -> None:
        self.paths = paths
        self._targets = torch.tensor(targets)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        try:
            with Image.open(self.paths[index]) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        except (OSError, SyntaxError) as error:
            raise DataError(f"{self.paths[index]} cannot be decoded: {error}") from error

    @property
    def targets(self) -> Tensor:
        return self._targets

    def image_sizes(self) -> Tensor:
        return torch.tensor([self.image(n).shape[1:] for n in range(len(self))])

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class RootOptions(Options):
    root: Path = cosmetic(...)
    """The folder."""


class Good(Dataset):
    """root/{train,test}/CLASS/*.png"""

    name = "good"
    Config = RootOptions
    source: ClassVar[type[Files]] = Files
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __init__(self, cfg: RootOptions) -> None:
        super().__init__(cfg)
        self.root = cfg.root
        if not (self.root / "train").is_dir():
            raise DataError(
                f"nothing in {self.root}; expected layout: train/CLASS/*.png", hint="dataset.root=PATH"
            )

    def files(self, split: str) -> list[Path]:
        return sorted(path for folder in (self.root / split).iterdir() for path in folder.iterdir())

    @property
    def info(self) -> DatasetInfo:
        names = tuple(sorted(path.name for path in (self.root / "train").iterdir()))
        return DatasetInfo(names, 16, (0.5,) * 3, (0.25,) * 3, self.splits)

    def split(self, name: str) -> Files:
        if name not in self.splits:
            raise DataError(f"no split '{name}' (there are {', '.join(self.splits)})")
        paths = self.files(name)
        return self.source(paths, [self.info.classes.index(path.parent.name) for path in paths])

    def fingerprint(self) -> str:
        state = hashlib.sha256()
        for split in self.splits:
            for path in self.files(split):
                state.update(str(path.relative_to(self.root)).encode() + path.read_bytes())
        return state.hexdigest()


def _made(root: Path) -> Path:
    counts = {f"{split}/{name}/{{}}.png": 6 for split in ("train", "test") for name in ("cat", "dog")}
    return write_classes(root, counts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory.mktemp("good"))


def verdicts(dataset: type[Dataset], root: Path, **changes: Any) -> Checkup:
    return check_dataset(dataset, options={"root": root}, **({"processes": False} | changes))


def test_a_good_one_passes(root: Path) -> None:
    checkup = verdicts(Good, root)
    assert not checkup.broken
    assert [v.rule for v in checkup.verdicts if v.outcome == "not tried"] == ["published size is true"]


class Augmenting(Files):
    def image(self, index: int) -> Tensor:
        image = super().image(index)
        return image.flip(2) if random.random() < 0.5 else image


class Floats(Files):
    def image(self, index: int) -> Tensor:
        return super().image(index) / 255


class ChannelsLast(Files):
    def image(self, index: int) -> Tensor:
        return super().image(index).permute(1, 2, 0)


class FromOne(Files):
    @property
    def targets(self) -> Tensor:
        return super().targets + 1


class Narrow(Files):
    @property
    def targets(self) -> Tensor:
        return super().targets.to(torch.uint8)


class WidthFirst(Files):
    def image_sizes(self) -> Tensor:
        return torch.tensor([[16, 18]] * len(self))


class Forgiving(Files):
    def image(self, index: int) -> Tensor:
        try:
            return super().image(index)
        except DataError:
            return torch.zeros(3, 16, 16, dtype=torch.uint8)


class Substituting(Files):
    def image(self, index: int) -> Tensor:
        try:
            return super().image(index)
        except DataError:
            return self.image((index + 1) % len(self))


class Nameless(Files):
    def image(self, index: int) -> Tensor:
        try:
            return super().image(index)
        except DataError as error:
            raise DataError("an image cannot be decoded") from error


class Raw(Files):
    def image(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(Image.open(self.paths[index]))).permute(2, 0, 1).contiguous()


class OneHandle(Files):
    """All readers share the position of one open file."""

    def __init__(self, paths: list[Path], targets: list[int]) -> None:
        super().__init__(paths, targets)
        self.file = (paths[0].parent / paths[0].name).open("rb")


class OneName(Files):
    def describe(self, index: int) -> str:
        return "an image"


class Dated(Files):
    def revision(self) -> str:
        return str(random.random())


class Stale(Files):
    def revision(self) -> str:
        return "always the same"


class WithAugmenting(Good):
    source = Augmenting


class WithFloats(Good):
    source = Floats


class WithChannelsLast(Good):
    source = ChannelsLast


class WithFromOne(Good):
    source = FromOne


class WithNarrow(Good):
    source = Narrow


class WithWidthFirst(Good):
    source = WidthFirst


class WithForgiving(Good):
    source = Forgiving


class WithSubstituting(Good):
    source = Substituting


class WithNameless(Good):
    source = Nameless


class WithRaw(Good):
    source = Raw


class WithOneHandle(Good):
    source = OneHandle


class WithOneName(Good):
    source = OneName


class WithDated(Good):
    source = Dated


class WithStale(Good):
    source = Stale


class Bytes(Good):
    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(super().info.classes, 16, (127.0,) * 3, (64.0,) * 3, self.splits)


class WrongSize(Good):
    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(super().info.classes, 32, (0.5,) * 3, (0.25,) * 3, self.splits)


class AnySplit(Good):
    def split(self, name: str) -> Files:
        return super().split(name if name in self.splits else "train")


class Overlapping(Good):
    def files(self, split: str) -> list[Path]:
        return super().files(split) + (super().files("train")[:1] if split == "test" else [])


class Unsorted(Good):
    def files(self, split: str) -> list[Path]:
        return [path for folder in sorted((self.root / split).iterdir()) for path in folder.iterdir()]


class Shuffled(Good):
    def files(self, split: str) -> list[Path]:
        return random.sample(found := super().files(split), len(found))


class TestOnly(Good):
    """Test images are chosen anew each time."""

    __test__ = False

    def files(self, split: str) -> list[Path]:
        return random.sample(found := super().files(split), len(found) - 3)


class NamesOnly(Good):
    def fingerprint(self) -> str:
        names = [str(path.relative_to(self.root)) for split in self.splits for path in self.files(split)]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


class ContentsOnly(Good):
    """Which class an image is of does not matter to it."""

    def fingerprint(self) -> str:
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for s in self.splits for p in self.files(s)]
        return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


class Placed(Good):
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.root}{super().fingerprint()}".encode()).hexdigest()


class Hashed(Good):
    def fingerprint(self) -> str:
        return f"{abs(hash(super().fingerprint())):x}"


class Careless(Good):
    """Files that are not there are found out about by the operating system."""

    def __init__(self, cfg: RootOptions) -> None:
        Dataset.__init__(self, cfg)
        self.root = cfg.root


class Silent(Good):
    def __init__(self, cfg: RootOptions) -> None:
        Dataset.__init__(self, cfg)
        self.root = cfg.root
        if not (self.root / "train").is_dir():
            raise DataError("wrong folder")


class Undocumented(Good):
    class Config(RootOptions):
        colour: bool = True


class TooMany(Good):
    published = Published(3, (16, 16), 2)


class OtherSize(Good):
    published = Published(12, (32, 32), 2, same_size=True)


DEFECTS: dict[type[Dataset], tuple[str, str]] = {
    WithAugmenting: ("same item, same bits", "augmentation"),
    WithFloats: ("images are uint8 [3,H,W] of the size it tells", "not normalised"),
    WithChannelsLast: ("images are uint8 [3,H,W] of the size it tells", "channels come first"),
    WithFromOne: ("targets fit the task", "numbered from 0"),
    WithNarrow: ("targets fit the task", "int64"),
    WithWidthFirst: ("sizes are those of decoded images", "heights come first"),
    WithForgiving: ("damaged files are errors that name them", "decode_image"),
    WithSubstituting: ("damaged files are errors that name them", "max_unreadable"),
    WithNameless: ("damaged files are errors that name them", "decode_image"),
    WithRaw: ("damaged files are errors that name them", "decode_image"),
    WithOneHandle: ("several readers at once get the same", "open files in image()"),
    WithOneName: ("each image has a name", "paths"),
    WithDated: ("revision is stable", "dates and sizes"),
    WithStale: ("fingerprint follows images and targets", "return None"),
    Bytes: ("its facts are consistent", "255"),
    WrongSize: ("images are uint8 [3,H,W] of the size it tells", "None where sizes vary"),
    AnySplit: ("its facts are consistent", "DataError"),
    Overlapping: ("splits share no images", "divide the images"),
    Unsorted: ("same files, same order", "sorted("),
    Shuffled: ("same files, same order", "sorted("),
    TestOnly: ("same files, same order", "fixed seed"),
    NamesOnly: ("fingerprint follows images and targets", "hash the contents"),
    ContentsOnly: ("fingerprint follows images and targets", "in the order of the data set"),
    Placed: ("a copy in another folder is the same", "path of the root"),
    Careless: ("missing files are errors that tell the layout", "DataError"),
    Silent: ("missing files are errors that tell the layout", "expected layout"),
    Undocumented: ("options are documented and survive a round trip", "string under each field"),
    TooMany: ("published size is true", "count the images"),
    OtherSize: ("published size is true", "Published"),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda cls: cls.__name__)
def test_each_defect_is_found_and_named(defect: type[Dataset], root: Path) -> None:
    name, hint = DEFECTS[defect]
    rule = next(rule for rule in (*RULES, *FILE_RULES) if rule.name == name)
    subject = DatasetSubject(PluginReference.of("dataset", defect), defect, defect.Config(root=root), 300)
    (verdict,) = check_up("dataset", "wrong", subject, [rule]).broken
    assert hint in verdict.hint
    assert verdict.detail


@pytest.mark.slow
def test_a_fingerprint_that_differs_between_processes_is_found(root: Path) -> None:
    broken = verdicts(Hashed, root, processes=True).broken
    assert [verdict.rule for verdict in broken] == ["another process reads the same"]
    assert "hashlib" in broken[0].hint


def test_one_that_cannot_be_opened_is_told_once(tmp_path: Path) -> None:
    checkup = verdicts(Good, tmp_path)
    assert [verdict.rule for verdict in checkup.broken] == ["can be opened"]
    assert "expected layout" in checkup.broken[0].detail
    with pytest.raises(ConformanceError, match="'good': can be opened"):
        checkup.raise_if_broken()


class Lists(Good):
    def split(self, name: str) -> Any:
        return [1, 2, 3]


def test_a_split_that_is_no_source_is_told_once(root: Path) -> None:
    checkup = verdicts(Lists, root)
    assert [verdict.detail for verdict in checkup.broken] == ["split('train') must return a Source, got a list"]


def test_missing_options_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match="root"):
        check_dataset(Good)


def test_large_folders_are_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslbench.testing.elsewhere.MOST_FILES", 5)
    untried = [v for v in verdicts(Good, root).verdicts if v.outcome == "not tried"]
    assert any("try a small folder" in verdict.detail for verdict in untried)
