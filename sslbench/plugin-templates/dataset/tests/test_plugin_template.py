"""plugin-template keeps the contract of sslbench, on a small copy of its layout."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from sslbench.errors import DataError
from sslbench.testing import check_dataset

from sslbench_plugin_template.dataset import PluginTemplate, PluginTemplateOptions


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of ten training and four test images of 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return tmp_path / "data"


def opened(root: Path) -> PluginTemplate:
    return PluginTemplate(PluginTemplateOptions(root=root))


def test_it_keeps_the_contract(root: Path) -> None:
    check_dataset(PluginTemplate, options={"root": str(root)}).raise_if_broken()


def test_classes_and_counts(root: Path) -> None:
    data = opened(root)
    assert data.info.classes == ("cat", "dog")
    assert data.info.size == 16
    assert (len(data.split("train")), len(data.split("test"))) == (20, 8)


def test_the_fingerprint_is_of_contents_not_of_places(root: Path, tmp_path: Path) -> None:
    before = opened(root).fingerprint()
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    assert opened(moved).fingerprint() == before
    shutil.copy(moved / "train/cat/0.png", moved / "train/cat/1.png")
    assert opened(moved).fingerprint() != before


def test_a_wrong_folder_is_answered_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ROOT/train/CLASS"):
        opened(tmp_path)
