"""Data sets of the library ``datasets``: folders of every kind, columns, labels, contents, runs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from sslbench.errors import DataError, MissingExtraError
from sslbench.plugin.api import Dataset
from sslbench.plugin.catalog import Catalog

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CLASSES = ("ant", "bee", "cow")
SIDE = 12


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def encoded(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    stream = io.BytesIO()
    Picture.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def table(count: int, first: int = 0, labels: bool = True, **more: list) -> object:
    features = {"img": datasets.Image()}
    columns: dict[str, list] = {"img": [{"bytes": encoded(first + n), "path": None} for n in range(count)]}
    if labels:
        features["kind"] = datasets.ClassLabel(names=list(CLASSES))
        columns["kind"] = [n * 3 // count for n in range(count)]  # by class, as folders are read
    for name, values in more.items():
        columns[name] = values
        features[name] = datasets.Value("int64" if isinstance(values[0], int | type(None)) else "string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def both(**more: list) -> object:
    return datasets.DatasetDict({"train": table(12), "test": table(6, first=100)})


def hf(path: object, **options: object) -> Dataset:
    cls = Catalog().load("dataset", "hf")
    return cls(cls.Config(path=str(path), **options))


def saved(content: object, folder: Path) -> Path:
    content.save_to_disk(str(folder))
    return folder


def in_parquet(content: object, folder: Path) -> Path:
    folder.mkdir()
    for split, part in content.items():
        part.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def in_folders(content: object, folder: Path) -> Path:
    for split, part in content.items():
        for number, row in enumerate(part.cast_column("img", datasets.Image(decode=False))):
            file = folder / split / CLASSES[row["kind"]] / f"{number:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["img"]["bytes"])
    return folder


@pytest.mark.parametrize("write", [saved, in_parquet, pytest.param(in_folders, marks=pytest.mark.slow)])
def test_every_kind_of_folder_gives_the_images_of_the_plugin_folder(write: object, tmp_path: Path) -> None:
    path = write(both(), tmp_path / "insects")
    cls = Catalog().load("dataset", "folder")
    plain = cls(cls.Config(root=in_folders(both(), tmp_path / "plain")))
    ours = hf(path)
    assert ours.key == "hf-insects"
    assert (ours.info.classes, ours.info.splits, ours.info.size) == (CLASSES, ("train", "test"), SIDE)
    for split in ("train", "test"):
        a, b = ours.split(split), plain.split(split)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.image_sizes(), b.image_sizes())
        assert all(torch.equal(a.image(number), b.image(number)) for number in range(len(b)))
        assert a.describe(1).startswith(f"hf-insects/{split}[1]")


def test_the_fingerprint_is_of_contents_not_of_formats_and_places(tmp_path: Path) -> None:
    one = hf(saved(both(), tmp_path / "a")).fingerprint()
    assert hf(in_parquet(both(), tmp_path / "b")).fingerprint() == one
    other = both()
    other["test"] = table(6, first=101)
    assert hf(saved(other, tmp_path / "c")).fingerprint() != one
    renamed = both()
    features = renamed["train"].features.copy()
    features["kind"] = datasets.ClassLabel(names=["ant", "bee", "dog"])
    assert hf(saved(renamed.cast(features), tmp_path / "d")).fingerprint() != one
    swapped = both()
    swapped["train"] = swapped["train"].map(lambda row: {"kind": 2 - row["kind"]})
    assert hf(saved(swapped, tmp_path / "e")).fingerprint() != one


def test_the_revision_follows_the_files(tmp_path: Path) -> None:
    path = saved(both(), tmp_path / "a")
    before = hf(path).split("train").revision()
    assert before == hf(path).split("train").revision()
    arrow = next((path / "train").glob("*.arrow"))
    os.utime(arrow, (1, 1))
    assert hf(path).split("train").revision() != before


def test_columns_are_found_by_type_or_named(tmp_path: Path) -> None:
    more = {"page": list(range(9)), "word": ["x", "y", "z"] * 3}
    path = saved(table(9, **more), tmp_path / "a")
    assert hf(path).info.classes == CLASSES
    assert hf(path, label_column="word").info.classes == ("x", "y", "z")
    assert hf(path, label_column="word").split("train").targets.tolist() == [0, 1, 2] * 3
    assert len(hf(path, label_column="page").info.classes) == 9
    with pytest.raises(DataError, match="no column 'wrd'; did you mean 'word'"):
        hf(path, label_column="wrd")
    with pytest.raises(DataError, match=r"column 'page' .* holds no images"):
        hf(path, image_column="page")
    with pytest.raises(DataError, match="is no single class per image"):
        hf(path, label_column="img")


def test_two_columns_of_images_must_be_told_apart(tmp_path: Path) -> None:
    two = table(4).add_column("back", [{"bytes": encoded(50 + n), "path": None} for n in range(4)])
    path = saved(two.cast_column("back", datasets.Image()), tmp_path / "a")
    with pytest.raises(DataError, match="2 columns of type Image") as caught:
        hf(path)
    assert caught.value.hint == "dataset.image_column=img"
    first = hf(path, image_column="img").split("train").image(0)
    assert not torch.equal(first, hf(path, image_column="back").split("train").image(0))


def test_splits_are_found_by_their_usual_names_or_named(tmp_path: Path) -> None:
    names = {"training": table(6), "validation": table(3, 10), "holdout": table(3, 20)}
    path = saved(datasets.DatasetDict(names), tmp_path / "a")
    with pytest.raises(DataError, match="no split 'train'; did you mean 'training'"):
        hf(path)
    found = hf(path, train_split="training", test_split="holdout")
    assert found.info.splits == ("train", "val", "test")
    assert hf(path, train_split="training", test_split="validation").info.splits == ("train", "test")
    with pytest.raises(DataError, match="has no split 'test'"):
        hf(path, train_split="training").split("test")


@pytest.mark.parametrize("only", ["test", "validation"])
def test_no_image_is_both_trained_on_and_tested_with(only: str, tmp_path: Path) -> None:
    path = saved(datasets.DatasetDict({only: table(6)}), tmp_path / "one")
    assert hf(path).info.splits == ("train",)
    option = {"test": "test_split", "validation": "val_split"}[only]
    with pytest.raises(DataError, match=f"{option}={only}: .* is trained on that split"):
        hf(path, **{option: only})
    path = saved(both(), tmp_path / "two")
    assert hf(path, train_split="test").info.splits == ("train",)
    assert hf(path, val_split="test").info.splits == ("train", "val")
    with pytest.raises(DataError, match=r"test_split=train: .* is trained on that split"):
        hf(path, test_split="train")


def renumbered(count: int, names: list[str]) -> object:
    """The same images and words as :func:`table`, the classes in another order."""
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    columns = table(count).to_dict()
    columns["kind"] = [names.index(CLASSES[number]) for number in columns["kind"]]
    return datasets.Dataset.from_dict(columns, features=features)


def test_each_split_numbers_its_classes_in_its_own_order(tmp_path: Path) -> None:
    content = datasets.DatasetDict({"train": table(12), "test": renumbered(6, ["cow", "ant", "bee"])})
    found = hf(saved(content, tmp_path / "a"))
    assert found.split("test").targets.tolist() == table(6)["kind"]
    content["test"] = renumbered(6, ["cow", "ant", "bee", "dog"])
    with pytest.raises(DataError, match=r"split 'test' .* has other classes than its training split: dog"):
        hf(saved(content, tmp_path / "b")).split("test")


def test_columns_of_labels_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslbench_plugins.datasets.huggingface.WORTH_KEEPING", 1)
    content = table(9).add_column("noisy", [2, 2, 0, 0, 0, 1, 1, 1, 2])
    path = saved(content.cast_column("noisy", content.features["kind"]), tmp_path / "a")
    clean = hf(path, label_column="kind").fingerprint()
    assert hf(path, label_column="noisy").fingerprint() != clean
    assert hf(path, label_column="kind").fingerprint() == clean


def test_a_split_without_the_column_of_labels(tmp_path: Path) -> None:
    content = datasets.DatasetDict({"train": table(6), "test": table(3, labels=False)})
    path = saved(content, tmp_path / "a")
    assert hf(path).info.splits == ("train",)
    with pytest.raises(DataError, match=r"split 'test' .* has no column 'kind' \(it has img\)"):
        hf(path, test_split="test").split("test")


def test_hidden_and_missing_labels(tmp_path: Path) -> None:
    hidden = datasets.DatasetDict({"train": table(6), "test": table(6).map(lambda row: {"kind": -1})})
    path = saved(hidden, tmp_path / "a")
    assert hf(path).info.splits == ("train",)
    with pytest.raises(DataError, match="labels that are none of its 3 classes"):
        hf(path, test_split="test").split("test")
    path = saved(table(3, page=[1, None, 2]), tmp_path / "b")
    with pytest.raises(DataError, match=r"1 of 3 images in split 'train' .* have no label"):
        _ = hf(path, label_column="page").info
    path = saved(table(4, labels=False), tmp_path / "c")
    found = hf(path)
    assert (found.info.task, found.split("train").targets) == ("unlabelled", None)


def test_unreadable_and_missing_images_are_named(tmp_path: Path) -> None:
    bad = table(3).to_dict()
    bad["img"][1] = {"bytes": encoded(1)[:40], "path": None}
    bad["img"][2] = None
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    source = hf(saved(datasets.Dataset.from_dict(bad, features=features), tmp_path / "a")).split("train")
    with pytest.raises(DataError, match=r"hf-a/train\[1\]\.jpg"):
        source.image(1)
    with pytest.raises(DataError, match=r"hf-a/train\[2\] has no image"):
        source.image(2)
    assert source.image_sizes().tolist() == [[SIDE, SIDE], [0, 0], [0, 0]]
    assert len(source.digest()) == 32


def test_what_cannot_be_opened_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no folder /no/such"):
        hf("/no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be opened") as caught:
        hf(tmp_path / "empty")
    assert "save_to_disk" in str(caught.value.hint)
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('code of a data set was run')\n")
    with pytest.raises(DataError, match="cannot be opened"):
        hf(tmp_path / "script")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'me/flowers' cannot be opened") as caught:
        hf("me/flowers")
    assert "--dataset hf:FOLDER" in str(caught.value.hint)


def test_without_the_library_only_its_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="needs the package 'datasets'") as caught:
        hf("/no/such")
    assert caught.value.hint == "pip install 'sslbench[huggingface]'"


@pytest.mark.slow
@pytest.mark.parametrize("write", [saved, in_parquet])
def test_a_run_trains_in_workers_and_is_evaluated(write: object, tmp_path: Path) -> None:
    content = datasets.DatasetDict({"train": table(90), "test": table(30, first=200)})
    path = write(content, tmp_path / "insects")

    def sslbench(*words: str) -> str:
        command = [sys.executable, "-m", "sslbench", "--runs", str(tmp_path / "runs"), *words]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    quick = [
        "train.epochs=2",
        "train.batch_size=30",
        "probe.every=0",
        "evals.linear.epochs=1",
        "run.evals=[linear,test]",
        "run.name=mine",
    ]
    place = f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    workers = ["data.resident=off", "data.workers=2"]
    sslbench(
        *("pretrain", "--method", "simclr", "--backbone", "conv4", "--dataset", f"hf:{path}"),
        *(*quick, place, *workers),
    )
    assert "hf-insects" in sslbench("list", "runs")
    sslbench("eval", "transfer", "mine", f"datasets=[hf:{path}]", "protocols=[knn]")
    assert "transfer" in sslbench("compare")
