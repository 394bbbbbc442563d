"""SeLa-v2: labels of equal shares, and prototypes that learn."""

from __future__ import annotations

import clustering_kit as kit
import pytest
import torch
import torch.nn.functional as F
from clustering_kit import BATCH, COUNT, STEPS, Run, make, state
from pydantic import ValidationError
from sslbench_plugins.methods.sela_v2 import SeLaV2

from sslbench.nn.clustering import UNLABELLED
from sslbench.nn.sinkhorn import sinkhorn


def with_random_bank(**options: object) -> SeLaV2:
    """Independent features in both banks, clustered."""
    method = make(SeLaV2, **options)
    torch.manual_seed(0)
    method.bank.store(torch.arange(COUNT), F.normalize(torch.randn(2, COUNT, 8), dim=2), epoch=0)
    method.start_epoch(1, kit.loader().images)
    return method


def test_labels_are_the_sinkhorn_codes_of_the_heads_bank() -> None:
    method = with_random_bank(epsilon=0.05, sinkhorn_iterations=7, sinkhorn_tolerance=None)
    for head, bank in enumerate((0, 1, 0)):
        scores = method.bank.features[bank] @ method.prototypes[head].weight.T
        assert torch.equal(method.assignments[head], sinkhorn(scores, 0.05, 7).argmax(dim=1))


def test_labels_give_prototypes_about_equal_shares() -> None:
    method = with_random_bank(prototypes=(5,), epsilon=0.02, sinkhorn_iterations=300, sinkhorn_tolerance=1e-3)
    shares = torch.bincount(method.assignments[0], minlength=5)
    scores = method.bank.features[0] @ method.prototypes[0].weight.T
    unbalanced = torch.bincount(scores.argmax(dim=1), minlength=5)
    assert (shares - COUNT / 5).abs().max() <= 2 < (unbalanced - COUNT / 5).abs().max()


def test_a_constant_network_cannot_give_all_images_one_label() -> None:
    """What k-means of the first DeepCluster suffered from; here shares stay equal up to rounding."""
    method = make(SeLaV2, prototypes=(5,))
    torch.manual_seed(0)
    same = F.normalize(torch.ones(2, COUNT, 8) + 0.01 * torch.randn(2, COUNT, 8), dim=2)
    method.bank.store(torch.arange(COUNT), same, epoch=0)
    method.start_epoch(1, kit.loader().images)
    assert method.clusters_used.item() == 5


def test_prototypes_learn_at_unit_length_and_no_clustering_moves_them() -> None:
    method = make(SeLaV2)
    weights = [prototypes.weight.clone() for prototypes in method.prototypes]
    method.start_epoch(0, kit.loader().images)
    assert all(torch.equal(w, p.weight) for w, p in zip(weights, method.prototypes, strict=True))
    Run(method).train(0, 2)
    for before, prototypes in zip(weights, method.prototypes, strict=True):
        assert not torch.equal(before, prototypes.weight)
        assert prototypes.weight.norm(dim=1).allclose(torch.ones(prototypes.out_features))


def test_prototypes_may_be_frozen_at_first_and_keep_their_length() -> None:
    frozen = make(SeLaV2, freeze_steps=2)
    start = frozen.prototypes[0].weight.detach().clone()
    run = Run(frozen).train(0, 2)
    assert frozen.prototypes[0].weight.allclose(start, atol=1e-6)
    run.train(2, 3)
    assert not frozen.prototypes[0].weight.allclose(start, atol=1e-4)
    free = make(SeLaV2, normalize_prototypes=False)
    Run(free).train(0, 2)
    assert not free.prototypes[0].weight.norm(dim=1).allclose(torch.ones(6), atol=1e-4)


def test_images_left_out_of_an_epoch_have_no_label() -> None:
    method = make(SeLaV2)
    Run(method).train(0, STEPS + 1)
    assert ((method.assignments == UNLABELLED).sum(dim=1) == COUNT - STEPS * BATCH).all()


@pytest.mark.parametrize("stop", [STEPS + 2, 2 * STEPS])
def test_resumes_exactly_within_and_between_epochs(stop: int) -> None:
    whole = Run(make(SeLaV2)).train(0, 3 * STEPS)
    first = Run(make(SeLaV2)).train(0, stop)
    second = Run(make(SeLaV2, seed=5)).take_over(first).train(stop, 3 * STEPS)
    assert first.log.losses + second.log.losses == whole.log.losses
    expected = state(whole.method)
    assert all(torch.equal(value, expected[key]) for key, value in state(second.method).items())


def test_loss_falls_between_two_clusterings() -> None:
    method = make(SeLaV2, prototypes=(10, 10))
    method.start_epoch(0, kit.loader().images)
    losses = kit.train_within_an_epoch(method, 40)
    assert sum(losses[-STEPS:]) < 0.5 * sum(losses[:STEPS])


@pytest.mark.parametrize("wrong", [{"epsilon": 0.002}, {"sinkhorn_iterations": 0}, {"sinkhorn_tolerance": 0}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        make(SeLaV2, **wrong)
