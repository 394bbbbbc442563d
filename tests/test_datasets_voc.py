"""PASCAL VOC: several labels per image, from the lists to the protocols that refuse them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets_kit import DECODER_WARNING, write_image
from faults_kit import METHOD, Command, command
from sslbench_plugins.backbones.conv4 import Conv4
from sslbench_plugins.datasets.digits import Digits, DigitsOptions
from sslbench_plugins.datasets.voc import CLASSES, Voc2007, Voc2012

from sslbench.config.schema import DataOptions
from sslbench.data.downloads import DownloadOptions
from sslbench.data.splits import eval_split
from sslbench.errors import ConfigError, DataError
from sslbench.evaluation.job import EvaluationJob
from sslbench.plugin.api import Dataset, EvalProtocol, Job, Options

__all__ = ["command"]

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)

SPLITS = {"train": 8, "val": 4, "test": 3}


def _voc(base: Path, splits: dict[str, int] = SPLITS) -> Path:
    """Image n shows class n; class n+1 is difficult in it; all others are absent."""
    lists = base / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    first = 0
    for split, count in splits.items():
        numbers = range(first, first + count)
        first += count
        (lists / f"{split}.txt").write_text("".join(f"{n:06d}\n" for n in numbers))
        for c, label in enumerate(CLASSES):
            rows = [f"{n:06d} {1 if n == c else 0 if n + 1 == c else -1:2d}\n" for n in numbers]
            (lists / f"{label}_{split}.txt").write_text("".join(rows))
        for n in numbers:
            write_image(base / "JPEGImages" / f"{n:06d}.jpg", 10 * n, (20 + n, 16))
    return base


@pytest.mark.parametrize("below", ["VOCdevkit/VOC2007", "VOC2007", ""])
def test_voc2007(tmp_path, below):
    _voc(tmp_path / below)
    dataset = Voc2007(DownloadOptions(root=tmp_path))
    info = dataset.info
    assert (info.task, info.classes, info.splits) == ("multilabel", CLASSES, ("train", "val", "test"))
    train = dataset.split("train")
    assert train.targets.shape == (8, 20)
    assert train.targets[2].tolist() == [0, 0, 1, -1] + 16 * [0]
    assert train.describe(2).endswith("JPEGImages/000002.jpg")
    assert dataset.split("test").image(0).shape == (3, 16, 32)
    both, index = eval_split(dataset, "trainval", 0.1)
    assert both.targets.shape == (12, 20)
    assert torch.equal(both.targets.argmax(1), torch.arange(12))
    assert len(index) == 12
    assert [len(eval_split(dataset, name, 0.1)[1]) for name in ("train", "val", "test")] == [8, 4, 3]


def test_voc2012_has_no_test_labels(tmp_path):
    _voc(tmp_path / "VOCdevkit" / "VOC2012", {"train": 3, "val": 2})
    dataset = Voc2012(DownloadOptions(root=tmp_path))
    assert dataset.info.splits == ("train", "val")
    with pytest.raises(DataError, match=r"'voc2012' has no split 'test'"):
        dataset.split("test")


def test_labels_are_part_of_the_fingerprint(tmp_path):
    base = _voc(tmp_path)
    first = Voc2007(DownloadOptions(root=tmp_path)).fingerprint()
    file = base / "ImageSets" / "Main" / "cow_val.txt"
    file.write_text(file.read_text().replace("-1", " 0", 1))
    assert Voc2007(DownloadOptions(root=tmp_path)).fingerprint() != first


def test_missing_and_damaged_lists_are_named(tmp_path):
    with pytest.raises(DataError, match=r"VOCdevkit/VOC2007.*ImageSets/Main/train\.txt") as caught:
        Voc2007(DownloadOptions(root=tmp_path))
    assert "download" in caught.value.hint
    lists = _voc(tmp_path) / "ImageSets" / "Main"
    for content, message in (("000000 1\n", "about '000001'"), ("000000 7\n", "'7'"), ("0\n", "cannot read")):
        (lists / "cow_train.txt").write_text(content)
        with pytest.raises(DataError, match=rf"cow_train\.txt.*{message}|{message}.*cow_train\.txt"):
            Voc2007(DownloadOptions(root=tmp_path)).split("train")
    (lists / "cow_train.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*cow_train\.txt"):
        Voc2007(DownloadOptions(root=tmp_path)).split("train")


def test_several_labels_cannot_be_carved(tmp_path):
    _voc(tmp_path)

    class Bare(Voc2007):
        splits = ("train", "test")

    with pytest.raises(DataError, match="several labels per image, so no validation images can be carved"):
        eval_split(Bare(DownloadOptions(root=tmp_path)), "val", 0.1)


class Several(EvalProtocol):
    name, version, primary = "several", 1, "n"
    metrics = {"n": "max"}  # noqa: RUF012
    splits = frozenset({"trainval"})
    tasks = frozenset({"multilabel"})

    def run(self, job: Job) -> dict[str, float]:
        return {"n": float(len(job.features("trainval").labels))}


def _job(protocol: EvalProtocol, dataset: Dataset, run_dir: Path) -> EvaluationJob:
    options = {"image_size": 16, "data": DataOptions(workers=0), "seed": 1, "run_dir": run_dir}
    return EvaluationJob(protocol, Conv4(Conv4.Config(), 16), dataset, device=torch.device("cpu"), **options)


def test_a_protocol_for_several_labels_gets_all_of_them(tmp_path):
    _voc(tmp_path)
    dataset = Voc2007(DownloadOptions(root=tmp_path))
    table = _job(Several(Options()), dataset, tmp_path).features("trainval")
    assert table.labels.shape == (12, 20)
    assert torch.equal(table.labels, eval_split(dataset, "trainval", 0.1)[0].targets)
    refusal = "data set 'digits' has one label per image; protocol 'several' takes several labels per image"
    with pytest.raises(ConfigError, match=refusal):
        _job(Several(Options()), Digits(DigitsOptions()), tmp_path)


def test_pretraining_works_and_single_label_protocols_stay_out(command: Command) -> None:
    _voc(Path("VOC2007"))
    voc = "--dataset voc2007 dataset.root=. train.batch_size=4 train.epochs=1 data.workers=0"
    done = command(f"pretrain {METHOD} {voc} run.evals=[linear,knn,test] run.name=v probe.every=1")
    refusal = "data set 'voc2007' has several labels per image; protocol '{}' takes one label per image"
    for protocol in ("linear", "knn", "test"):
        assert refusal.format(protocol) in done.err
    assert "probe feature_std" in done.err
    assert "knn_top1" not in done.err
    assert refusal.format("knn") in command("eval knn v", 2).err


def test_a_method_that_learns_from_labels_refuses_several(command: Command) -> None:
    _voc(Path("VOC2007"))
    supervised = "pretrain --method supervised --backbone conv4 --dataset voc2007 dataset.root=."
    assert "learns from one label per image" in command(f"{supervised} train.batch_size=4", 2).err
