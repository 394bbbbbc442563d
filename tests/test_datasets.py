"""Built-in data sets that carry their images, class-balanced splits, and what sources share."""

from __future__ import annotations

import pytest
import torch
from sslbench_plugins.datasets.digits import Digits, DigitsOptions
from sslbench_plugins.datasets.mnist5k import Mnist5k

from sslbench.data.sources import ArraySource, ConcatSource
from sslbench.data.splits import carve, eval_split
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, Options


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(DigitsOptions())


@pytest.fixture(scope="module")
def mnist() -> Mnist5k:
    return Mnist5k(Options())


def _rows(source: ArraySource) -> set[bytes]:
    return {image.numpy().tobytes() for image in source.pixels()}


@pytest.mark.parametrize(
    ("name", "train", "test", "side"), [("digits", 1438, 359, 16), ("mnist5k", 4000, 1000, 32)]
)
def test_carried_sets(request, name, train, test, side):
    dataset: Dataset = request.getfixturevalue({"digits": "digits", "mnist5k": "mnist"}[name])
    info = dataset.info
    assert (info.splits, info.size, len(info.classes)) == (("train", "test"), side, 10)
    sources = {split: dataset.split(split) for split in info.splits}
    assert {split: len(source) for split, source in sources.items()} == {"train": train, "test": test}
    for source in sources.values():
        pixels = source.pixels()
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (3, side, side)
        assert pixels.min() == 0
        assert pixels.max() > 250
        assert torch.equal(pixels[:, 0], pixels[:, 2])
        counts = source.targets.bincount(minlength=10).float()
        assert (counts / counts.sum() - 0.1).abs().max() < 0.006
        assert torch.equal(source.image(7), pixels[7])
    assert not _rows(sources["train"]) & _rows(sources["test"])


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_declared_mean_and_std_are_those_of_train(request, name):
    dataset = request.getfixturevalue(name)
    values = dataset.split("train").pixels().float() / 255
    assert values.mean().item() == pytest.approx(dataset.info.mean[0], abs=2e-3)
    assert values.std().item() == pytest.approx(dataset.info.std[0], abs=2e-3)


def test_labels_belong_to_images(digits, mnist):
    """A nearest-class-mean classifier works, so images and labels are paired."""
    for dataset in (digits, mnist):
        train, test = dataset.split("train"), dataset.split("test")
        x, y = train.pixels().float().flatten(1), train.targets
        means = torch.stack([x[y == label].mean(0) for label in range(10)])
        found = torch.cdist(test.pixels().float().flatten(1), means).argmin(1)
        assert (found == test.targets).float().mean() > 0.75


def test_fingerprints_are_stable_and_follow_contents(digits, mnist):
    assert digits.fingerprint() == Digits(DigitsOptions()).fingerprint()
    assert digits.fingerprint() != Digits(DigitsOptions(size=8)).fingerprint()
    assert digits.fingerprint() != mnist.fingerprint()


def test_unknown_split_is_named(digits, mnist):
    for dataset in (digits, mnist):
        with pytest.raises(DataError, match="no split 'valid'"):
            dataset.split("valid")


def test_carve_is_balanced_disjoint_and_complete():
    targets = torch.arange(3).repeat_interleave(torch.tensor([100, 40, 10]))[torch.randperm(150)]
    train, val = carve(targets, 0.1)
    assert targets[val].bincount().tolist() == [10, 4, 1]
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(150))
    assert torch.equal(val, val.sort().values)
    again = carve(targets, 0.1)
    assert torch.equal(val, again[1])
    assert not torch.equal(val, carve(targets, 0.1, salt="test")[1])


def test_carve_picks_differ_between_classes_and_are_spread():
    targets = torch.arange(2).repeat_interleave(1000)
    _, val = carve(targets, 0.2)
    first, second = val[val < 1000], val[val >= 1000] - 1000
    assert len(set(first.tolist()) & set(second.tolist())) < 80  # 40 expected of 200
    assert 450 < first.float().mean() < 550


def test_carve_leaves_every_class_a_training_image():
    train, val = carve(torch.tensor([0, 0, 1]), 0.9)
    assert (len(train), len(val)) == (2, 1)


def test_eval_splits_of_a_set_without_val(mnist):
    train, train_index = eval_split(mnist, "train", 0.1)
    val, val_index = eval_split(mnist, "val", 0.1)
    everything, all_index = eval_split(mnist, "trainval", 0.1)
    assert (len(train_index), len(val_index), len(all_index)) == (3600, 400, 4000)
    assert len(train) == len(val) == len(everything) == 4000
    assert not set(train_index.tolist()) & set(val_index.tolist())
    test, test_index = eval_split(mnist, "test", 0.1)
    assert len(test) == len(test_index) == 1000


class _WithVal(Dataset):
    name = "with-val"

    @property
    def info(self):
        from sslbench.plugin.api import DatasetInfo

        return DatasetInfo(("a", "b"), 8, (0.5,) * 3, (0.5,) * 3, ("train", "val", "unlabeled"))

    def split(self, name):
        number = {"train": 6, "val": 4, "unlabeled": 3}[name]
        targets = None if name == "unlabeled" else torch.arange(number) % 2
        return ArraySource(torch.full((number, 3, 8, 8), number, dtype=torch.uint8), targets)

    def fingerprint(self):
        return "0"


def test_eval_splits_of_a_set_with_its_own_val():
    dataset = _WithVal(Options())
    assert len(eval_split(dataset, "train", 0.5)[1]) == 6
    assert len(eval_split(dataset, "val", 0.5)[1]) == 4
    both, index = eval_split(dataset, "trainval", 0.5)
    assert isinstance(both, ConcatSource)
    assert len(index) == 10
    assert [int(both.image(i)[0, 0, 0]) for i in (0, 5, 6, 9)] == [6, 6, 4, 4]
    assert both.targets.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert both.image_sizes().tolist() == [[8, 8]] * 10
    with pytest.raises(DataError, match="no split 'test'"):
        eval_split(dataset, "test", 0.5)


def test_eval_split_needs_labels():
    class Unlabelled(_WithVal):
        def split(self, name):
            return super().split("unlabeled")

    with pytest.raises(DataError, match="no labels"):
        eval_split(Unlabelled(Options()), "train", 0.5)
