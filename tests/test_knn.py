"""Nearest neighbours against brute force, scikit-learn, and itself in other chunk sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from evals_kit import make_job
from sklearn.neighbors import KNeighborsClassifier
from sslbench_plugins.evals.knn import Knn, KnnConfig
from torch import Tensor
from torch.nn import functional as F

from sslbench.evaluation.classifiers import Neighbours, label_ranks
from sslbench.evaluation.job import run_protocol
from sslbench.plugin.api import FeatureTable


@pytest.fixture(scope="module")
def tables() -> tuple[FeatureTable, FeatureTable]:
    job = make_job(Knn(KnnConfig()), Path("unused"))
    return job.features("train"), job.features("val")


def brute_force(bank: FeatureTable, query: Tensor, k: int, temperature: float) -> list[float]:
    """Class scores of one query by sorting all similarities."""
    cosine = F.cosine_similarity(query[None], bank.features.double()).tolist()
    similarity = zip(cosine, bank.labels.tolist(), strict=True)
    scores = [0.0] * 10
    for s, y in sorted(similarity, reverse=True)[:k]:
        scores[y] += math.exp(s / temperature)
    return scores


def test_weighted_votes_equal_brute_force(tables: tuple[FeatureTable, FeatureTable]) -> None:
    bank, queries = tables
    neighbours = Neighbours(bank.features, bank.labels, 10)
    for query in queries.features[:20]:
        ((similarity, labels),) = neighbours.search(query[None], 15)
        ours = neighbours.votes(similarity, labels, 0.07)[0].exp2().log2()  # -inf stays -inf
        theirs = torch.tensor(brute_force(bank, query.double(), 15, 0.07)) / math.exp(1 / 0.07)
        voted = theirs > 0
        assert torch.equal(ours.isfinite(), voted)
        torch.testing.assert_close(ours[voted], theirs[voted].float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_majority_vote_equals_scikit_learn(tables: tuple[FeatureTable, FeatureTable], k: int) -> None:
    bank, queries = tables
    reference = KNeighborsClassifier(k, metric="cosine").fit(bank.features.numpy(), bank.labels.numpy())
    expected = reference.predict(queries.features.numpy())
    neighbours = Neighbours(bank.features, bank.labels, 10)
    found = [neighbours.votes(s, y, None).argmax(1) for s, y in neighbours.search(queries.features, k)]
    assert torch.cat(found).tolist() == expected.tolist()


def test_chunks_do_not_change_the_answer(tables: tuple[FeatureTable, FeatureTable]) -> None:
    bank, queries = tables
    whole = Neighbours(bank.features, bank.labels, 10).ranks(queries.features, queries.labels, (1, 20), 0.07)
    small = Neighbours(bank.features, bank.labels, 10, budget=7 * len(bank.labels))
    assert small.rows == 7
    assert torch.equal(whole, small.ranks(queries.features, queries.labels, (1, 20), 0.07))


def test_k_larger_than_the_bank_is_capped_and_reported(tmp_path: Path) -> None:
    protocol = Knn(KnnConfig(k=10**6, ks=(1,)))
    job = make_job(protocol, tmp_path)
    metrics = run_protocol(protocol, job)
    report = json.loads((job.out_dir / "knn.json").read_text())
    assert [row["k"] for row in report["by_k"]] == [1, report["bank"]]
    assert metrics["top1"] == report["by_k"][1]["top1"]
    assert report["by_k"][0]["top1"] > 80


def test_ranks_place_equal_scores_by_class_number_and_never_reward_what_is_not_finite() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, torch.nan, 2.0], [0.0, -torch.inf, 2.0]])
    assert label_ranks(scores, torch.tensor([0, 1, 1, 1])).tolist() == [0, 1, 3, 3]
