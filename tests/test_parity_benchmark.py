"""The end-to-end comparison: that both of its ways see the same images, and what it concludes from accuracies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import photo_tiles, to_pil
from scipy.stats import ttest_ind
from sslbench_plugins.datasets.folder import Folder, FolderOptions

from sslbench.config.schema import DataOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.plugin.viewspec import Jitter, ViewSpec

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import parity
from reference_views import ReferenceLoader

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
COUNT = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, tile in enumerate(photo_tiles(32, 32)[100 : 100 + COUNT]):
        path = tmp_path / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(tile).save(path)
    return tmp_path


def make(loader_class: type[TrainLoader], folder: Path, spec: ViewSpec, workers: int = 0) -> TrainLoader:
    source = Folder(FolderOptions(root=folder)).split("train")
    cpu = torch.device("cpu")
    views = ViewExecutor([spec], size=32, mean=MEAN, std=STD, device=cpu)
    store = open_store(source, DataOptions(), cpu, lambda line: None)
    return loader_class(source, store, views, seed=3, global_batch=8, labels=True, workers=workers)


PLAIN = ViewSpec(count=2, crop="none", flip=0.0)
RANDOM = ViewSpec(count=2, jitter=Jitter(p=1.0), gray=0.2)


def test_both_ways_see_the_same_images_in_the_same_order(folder):
    """Without anything random the views are equal, too: decoding, resizing and normalisation are."""
    ours = make(TrainLoader, folder, PLAIN).batches(0, 5)
    for fast, slow in zip(ours, make(ReferenceLoader, folder, PLAIN).batches(0, 5), strict=True):
        assert torch.equal(fast.index, slow.index)
        assert torch.equal(fast.labels, slow.labels)
        for a, b in zip(fast.views, slow.views, strict=True):
            assert (a.images - b.images).abs().max() < 1e-5
            assert torch.equal(a.source_size, b.source_size)


def test_the_references_views_depend_on_seed_and_step_only(folder):
    here = list(make(ReferenceLoader, folder, RANDOM).batches(2, 5))
    in_workers = list(make(ReferenceLoader, folder, RANDOM, workers=1).batches(3, 5))
    for first, second in zip(here[1:], in_workers, strict=True):
        for a, b in zip(first.views, second.views, strict=True):
            assert torch.equal(a.images, b.images)
    first, second = here[0].views
    assert not torch.equal(first.images, second.images)


def test_the_reference_decodes_files_itself(folder):
    """A file that changed after our loader had read it."""
    loader = make(ReferenceLoader, folder, PLAIN)
    for path in (folder / "train").rglob("*.png"):
        Image.new("RGB", (32, 32), (255, 255, 255)).save(path)
    (batch,) = loader.batches(0, 1)
    assert (batch.views[0].images.amin((0, 2, 3)) > 1.9).all()


ACCURACIES = [44.1, 45.3, 44.6], [45.0, 44.2, 45.1]


def test_the_interval_is_welchs():
    expected = ttest_ind(*reversed(ACCURACIES), equal_var=False).confidence_interval(parity.CONFIDENCE)
    half = parity.welch_half_width(*ACCURACIES)
    assert half == pytest.approx((expected.high - expected.low) / 2)


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (ACCURACIES[1], ["no difference found", "lies within"]),
        ([41.0, 40.2, 41.1], ["they differ", "lies outside"]),
        ([45.0], ["one seed has no interval"]),
    ],
)
def test_verdicts(candidate, words):
    found = parity.verdict(ACCURACIES[0], candidate)
    assert all(word in found for word in words)


RESULT = {"test_top1": 44.0, "test_knn": 40.0, "loss": 5.0, "images_per_second": 900.0, "seconds": 60.0}


def test_finished_runs_are_kept_and_other_settings_refused(tmp_path):
    settings = {"backbone": "conv4", "images": 1000, "epochs": 2, "options": []}
    results = parity.Results(tmp_path / "out", settings)
    for way, seed in (("reference", 1), ("fast", 1), ("fast", 2), ("reference", 2)):
        results.add(parity.Run(way, "simclr", seed), RESULT | {"test_top1": 44.0 + seed, "machine": "here"})
    again = parity.Results(tmp_path / "out", settings)
    assert again.runs == results.runs
    page = (tmp_path / "out.md").read_text()
    assert "| simclr | fast | 45.00 46.00 | 45.50 ± 0.71 |" in page
    assert "difference +0.00" in page
    with pytest.raises(SystemExit, match="holds runs of"):
        parity.Results(tmp_path / "out", settings | {"epochs": 3})


def test_a_run_with_the_wrong_executor_is_refused():
    with pytest.raises(SystemExit, match="were not made in that way"):
        parity.check_executor(parity.WAYS["reference"], "step 1")
    with pytest.raises(SystemExit, match="were not made in that way"):
        parity.check_executor(parity.WAYS["fast"], "views: one image at a time, by Pillow and torchvision")
