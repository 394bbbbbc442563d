"""Tables that are not held: the same results from wherever they are, and those of tables that are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_kit import evaluate, same_bits, small_device
from torch.nn import functional as F

from sslbench.config.schema import DataOptions
from sslbench.data.placing import Room
from sslbench.evaluation.classifiers import FeatureScaling, Neighbours
from sslbench.evaluation.ranking import Gallery
from sslbench.evaluation.tables import Place, choose_place
from sslbench.plugin import rows
from sslbench.plugin.api import FeatureRows

CPU = torch.device("cpu")
GB = 1 << 30


def noise(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + 3


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "HELD", 100)
    monkeypatch.setattr(rows, "STREAMED", 16 * 64)


@pytest.mark.slow
def test_every_protocol_gives_the_same_bits_wherever_the_table_is(tmp_path: Path) -> None:
    held = evaluate(tmp_path / "held", None)
    with small_device():
        results = {
            place: evaluate(tmp_path / place, tmp_path / "cache" / place, data=DataOptions(features=place))
            for place in ("device", "host", "mmap")
        }
        again = evaluate(tmp_path / "again", tmp_path / "cache" / "mmap", data=DataOptions(features="mmap"))
        uncached = evaluate(tmp_path / "uncached", None)
    for other in (results["device"], results["host"], again, uncached):
        assert same_bits(results["mmap"], other)
    for name, metrics in results["mmap"].items():
        if "/" not in name:
            assert metrics == pytest.approx(held[name], rel=1e-3), name


@pytest.mark.parametrize("index", [None, torch.arange(0, 500, 3)])
def test_rows_are_those_of_the_table(index: torch.Tensor | None, streamed: None) -> None:
    table = noise(500)
    expected = table if index is None else table[index]
    found = FeatureRows(table, CPU, index)
    assert (len(found), found.dim, found.held) == (*expected.shape, False)
    assert torch.equal(found.whole, expected)
    assert torch.equal(torch.cat(list(found.chunks())), expected)
    picks = torch.randperm(len(expected))
    assert torch.equal(torch.cat(list(found.batches(torch.split(picks, 30)))), expected[picks])
    assert torch.equal(found.part(range(20, 90)).whole, expected[20:90])
    assert not list(found.part(range(0)).chunks())


def test_moments_of_a_streamed_table_are_those_of_the_whole(streamed: None) -> None:
    features = noise(5000) * torch.logspace(-3, 3, 16) + 100
    features[:, 3] = 7.0
    found = FeatureScaling.fit("standardize", features)
    exact = features.double()
    assert torch.equal(found.mean, exact.mean(0).float())
    expected = exact.std(0, correction=0)
    expected[3] = 1
    torch.testing.assert_close(found.std, expected.float(), rtol=1e-6, atol=0)


def test_neighbours_of_a_streamed_bank_are_those_of_a_held_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries = noise(1000), torch.arange(1000) % 7, noise(300, seed=1)
    wanted = torch.arange(300) % 7
    held = Neighbours(bank, labels, 7).ranks(queries, wanted, (1, 5, 200), 0.07)
    monkeypatch.setattr(rows, "HELD", 100)
    monkeypatch.setattr(rows, "STREAMED", 16 * 64)
    streamed = Neighbours(bank, labels, 7, budget=1 << 18)
    assert torch.equal(streamed.ranks(queries, wanted, (1, 5, 200), 0.07), held)


def test_of_equal_neighbours_in_different_chunks_the_first_counts(streamed: None) -> None:
    bank = F.normalize(noise(64), dim=1).repeat(5, 1)
    ((similarity, labels),) = Neighbours(bank, torch.arange(320), 320).search(bank[:10], 3)
    assert torch.equal(labels, torch.arange(10)[:, None] + torch.tensor([0, 64, 128]))
    assert torch.equal(similarity[:, 0], similarity[:, 2])


@pytest.mark.parametrize("budget", [1 << 24, 4000])
def test_a_streamed_gallery_ranks_as_a_held_one(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, queries = noise(700), torch.cat([noise(90, seed=1), noise(700)[:10]])
    gallery[100:200] = gallery[:100]  # equal similarities
    labels, wanted = torch.arange(700) % 9, torch.arange(100) % 10  # class 9 is not in the gallery
    held = Gallery(gallery, labels).retrieve(queries, wanted, (1, 5, 50))
    monkeypatch.setattr(rows, "HELD", 100)
    monkeypatch.setattr(rows, "STREAMED", 16 * 64)
    found = Gallery(gallery, labels, budget=budget).retrieve(queries, wanted, (1, 5, 50))
    assert torch.equal(found.hits, held.hits)
    assert torch.equal(found.precision, held.precision)
    torch.testing.assert_close(found.average, held.average, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "asked", "room", "on_disk", "expected"),
    [
        (8 * GB, "auto", Room(100 * GB, 20 * GB), True, Place.DEVICE),
        (12 * GB, "auto", Room(100 * GB, 20 * GB), True, Place.HOST),
        (12 * GB, "auto", Room(100 * GB, 20 * GB, processes=8), True, Place.MAPPED),
        (12 * GB, "auto", Room(100 * GB, 20 * GB, processes=8), False, Place.HOST),
        (1 * GB, "auto", Room(100 * GB), True, Place.MAPPED),
        (1 * GB, "auto", Room(100 * GB), False, Place.DEVICE),
        (99 * GB, "device", Room(10 * GB, 10 * GB), True, Place.DEVICE),
        (1 * GB, "mmap", Room(100 * GB, 80 * GB), True, Place.MAPPED),
        (1 * GB, "mmap", Room(100 * GB, 80 * GB), False, Place.HOST),
        (1 * GB, "host", Room(100 * GB, 80 * GB), True, Place.HOST),
    ],
)
def test_a_table_is_where_there_is_room(size: int, asked: Any, room: Room, on_disk: bool, expected: Place) -> None:
    assert choose_place(size, asked, room, on_disk=on_disk)[0] is expected
