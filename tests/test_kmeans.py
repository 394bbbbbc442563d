"""Spherical k-means and the memory bank, on one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sslbench.nn import kmeans
from sslbench.nn.kmeans import nearest, random_rows, spherical_kmeans
from sslbench.nn.memory_bank import MemoryBank


def planted(clusters: int = 5, each: int = 40, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around orthogonal directions, shuffled, and their clusters."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(clusters).repeat_interleave(each)[torch.randperm(clusters * each, generator=generator)]
    noise = 0.1 * torch.randn(len(truth), dim, generator=generator)
    return F.normalize(torch.eye(dim)[truth] + noise, dim=1), truth


def seed_with_distinct_starts(rows: torch.Tensor, truth: torch.Tensor, clusters: int) -> int:
    """A seed whose initial rows lie in different planted clusters; others end in poorer optima by design."""
    for seed in range(1000):
        torch.manual_seed(seed)
        if len(set(truth[nearest(random_rows(rows, clusters), rows)].tolist())) == clusters:
            return seed
    raise AssertionError("no such seed")


def test_planted_clusters_are_recovered() -> None:
    rows, truth = planted()
    torch.manual_seed(seed_with_distinct_starts(rows, truth, 5))
    found = spherical_kmeans(rows, 5)
    for label in range(5):
        members = truth[found.labels == label]
        assert len(members) == 40
        assert len(members.unique()) == 1
        mean = F.normalize(rows[found.labels == label].double().mean(dim=0), dim=0).float()
        assert torch.allclose(found.centroids[label], mean, atol=1e-6)


def test_initial_centroids_are_different_rows() -> None:
    rows = F.normalize(torch.randn(20, 4), dim=1)
    assert len(random_rows(rows, 20).unique(dim=0)) == 20
    assert (random_rows(rows, 7) @ rows.T).amax(dim=1).allclose(torch.ones(7))


def test_empty_clusters_keep_their_centroid() -> None:
    rows = F.normalize(torch.tensor([[1.0, 0.01], [1.0, -0.01]]), dim=1)
    far = torch.tensor([[0.0, 1.0]])
    centroids = torch.cat([torch.tensor([[1.0, 0.0]]), far])
    moved = kmeans._moved(centroids, rows, nearest(rows, centroids))
    assert torch.equal(moved[1:], far)
    assert moved[0].allclose(torch.tensor([1.0, 0.0]))


def test_as_many_clusters_as_rows() -> None:
    rows = F.normalize(torch.randn(9, 4), dim=1)
    assert spherical_kmeans(rows, 9).labels.unique().numel() == 9


def test_labels_come_from_one_assignment_more_than_rounds() -> None:
    rows = F.normalize(torch.randn(200, 8), dim=1)
    found = spherical_kmeans(rows, 12, iterations=2)
    assert torch.equal(found.labels, nearest(rows, found.centroids))
    assert found.centroids.norm(dim=1).allclose(torch.ones(12))


def test_scores_are_computed_in_parts(monkeypatch) -> None:
    rows, centroids = F.normalize(torch.randn(101, 8), dim=1), F.normalize(torch.randn(6, 8), dim=1)
    whole = nearest(rows, centroids)
    monkeypatch.setattr(kmeans, "_SCORES_AT_ONCE", 60)
    assert torch.equal(nearest(rows, centroids), whole)
    assert nearest(rows[:0], centroids).shape == (0,)


def test_autocast_changes_nothing() -> None:
    rows = F.normalize(torch.randn(300, 8), dim=1)
    torch.manual_seed(1)
    plain = spherical_kmeans(rows, 10)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = spherical_kmeans(rows, 10)
    assert torch.equal(plain.centroids, under.centroids)
    assert torch.equal(plain.labels, under.labels)


def test_bank_remembers_by_image_and_epoch() -> None:
    bank = MemoryBank(2, 6, 3)
    first, second = torch.randn(2, 2, 3, requires_grad=True), torch.randn(2, 1, 3)
    bank.store(torch.tensor([4, 1]), first, epoch=0)
    bank.store(torch.tensor([1]), second, epoch=1)
    assert torch.equal(bank.features[:, 4], first[:, 0])
    assert torch.equal(bank.features[:, 1], second[:, 0])
    assert not bank.features.requires_grad
    assert bank.seen_in(0).tolist() == [4]
    assert bank.seen_in(1).tolist() == [1]
    assert set(bank.state_dict()) == {"features", "epochs"}
