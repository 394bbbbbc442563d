"""DeepCluster-v2: what is clustered, what is learned, and that runs resume exactly."""

from __future__ import annotations

from dataclasses import replace

import clustering_kit as kit
import pytest
import torch
import torch.nn.functional as F
from clustering_kit import BATCH, COUNT, STEPS, Run, make, state
from pydantic import ValidationError
from sslbench_plugins.methods.deepcluster_v2 import DeepClusterV2
from torch import nn

from sslbench.errors import ConfigError
from sslbench.nn.clustering import UNLABELLED
from sslbench.nn.kmeans import nearest


@pytest.fixture(scope="module")
def after_an_epoch() -> DeepClusterV2:
    """At the first step of the second epoch, before the bank changes."""
    method = make(DeepClusterV2)
    Run(method).train(0, STEPS)
    torch.manual_seed(7)
    method.start_epoch(1, kit.loader().images)
    return method


def test_the_first_epoch_begins_with_all_images_in_train_mode() -> None:
    method = make(DeepClusterV2)
    method.start_epoch(0, kit.loader().images)
    assert method.training
    assert torch.equal(method.bank.seen_in(-1), torch.arange(COUNT))
    assert (method.assignments >= 0).all()
    norm = next(module for module in method.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 2 * STEPS, "each assigned view goes through the network alone"


def test_the_first_bank_holds_each_assigned_view_alone() -> None:
    method = make(DeepClusterV2)
    expected = make(DeepClusterV2)
    method.start_epoch(0, kit.loader().images)
    first = next(iter(kit.loader().images.augmented(0)))
    for number in (0, 1):
        alone = expected.embed(replace(first, views=(first.views[number],)))[0]
        assert torch.allclose(method.bank.features[number, first.index], alone, atol=1e-6)


def test_the_bank_holds_embeddings_by_image_number() -> None:
    method, twin = make(DeepClusterV2), make(DeepClusterV2)
    batch = next(kit.loader().batches(0, 1))
    assert batch.index.tolist() != sorted(batch.index.tolist())
    method(batch)
    embeddings = twin.embed(batch)
    assert torch.equal(method.bank.features[:, batch.index], embeddings[:2])
    assert torch.equal(method.bank.seen_in(0), batch.index.sort().values)


def test_labels_belong_to_image_numbers_and_left_out_images_have_none(after_an_epoch) -> None:
    seen = torch.cat([batch.index for batch in kit.loader().batches(0, STEPS)]).sort().values
    assert len(seen) == STEPS * BATCH < COUNT
    labelled = after_an_epoch.assignments != UNLABELLED
    assert all(torch.equal(row.nonzero().flatten(), seen) for row in labelled)
    for labels, prototypes in zip(after_an_epoch.assignments, after_an_epoch.prototypes, strict=True):
        assert labels.max() < prototypes.out_features


def test_heads_take_turns_with_the_banks() -> None:
    method = make(DeepClusterV2)
    torch.manual_seed(0)
    method.bank.store(torch.arange(COUNT), F.normalize(torch.randn(2, COUNT, 8), dim=2), epoch=0)
    method.start_epoch(1, kit.loader().images)
    for head, bank in enumerate((0, 1, 0)):
        labels, weight = method.assignments[head], method.prototypes[head].weight
        assert torch.equal(labels, nearest(method.bank.features[bank], weight))
        assert not torch.equal(labels, nearest(method.bank.features[1 - bank], weight))


def test_prototypes_are_the_centroids_and_stay_there(after_an_epoch) -> None:
    method = make(DeepClusterV2)
    method.load_state_dict(state(after_an_epoch))
    assert not any(parameter.requires_grad for parameter in method.prototypes.parameters())
    weights = [prototypes.weight.clone() for prototypes in method.prototypes]
    assert all(weight.norm(dim=1).allclose(torch.ones(len(weight))) for weight in weights)
    optimizer = Run(method).optimizer
    method(next(kit.loader().batches(STEPS, STEPS + 1)))["loss"].backward()
    optimizer.step()
    for before, prototypes in zip(weights, method.prototypes, strict=True):
        assert torch.equal(before, prototypes.weight)


def test_prototypes_can_move_between_clusterings() -> None:
    method = make(DeepClusterV2, freeze_steps=STEPS)
    run = Run(method).train(0, STEPS - 1)
    start = method.prototypes[0].weight.clone()
    run.train(STEPS - 1, STEPS)
    assert torch.equal(method.prototypes[0].weight, start), "still frozen"
    run.train(STEPS, STEPS + 2)
    assert not method.prototypes[0].weight.norm(dim=1).allclose(torch.ones(6), atol=1e-6)


def test_loss_is_the_mean_over_heads_and_labelled_rows_of_all_views() -> None:
    method, twin = make(DeepClusterV2), make(DeepClusterV2)
    batch = next(kit.loader().batches(0, 1))
    labels = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [1] * 8, [2] * 8])
    labels[:, [2, 5]] = UNLABELLED
    method.assignments[:, batch.index] = labels
    embeddings = twin.embed(batch).flatten(0, 1)
    expected = [
        F.cross_entropy(embeddings @ twin.prototypes[head].weight.T / 0.1, labels[head].repeat(3))
        for head in range(3)
    ]
    assert torch.allclose(method(batch)["loss"], torch.stack(expected).mean(), rtol=1e-5)


def test_a_batch_without_labels_costs_nothing() -> None:
    method = make(DeepClusterV2)
    loss = method(next(kit.loader().batches(0, 1)))["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("stop", [STEPS + 2, 2 * STEPS])
def test_resumes_exactly_within_and_between_epochs(stop: int) -> None:
    whole = Run(make(DeepClusterV2)).train(0, 3 * STEPS)
    first = Run(make(DeepClusterV2)).train(0, stop)
    second = Run(make(DeepClusterV2, seed=5)).take_over(first).train(stop, 3 * STEPS)
    assert first.log.losses + second.log.losses == whole.log.losses
    expected = state(whole.method)
    assert all(torch.equal(value, expected[key]) for key, value in state(second.method).items())


def test_loss_falls_between_two_clusterings() -> None:
    method = make(DeepClusterV2, prototypes=(10, 10))
    method.start_epoch(0, kit.loader().images)
    losses = kit.train_within_an_epoch(method, 40)
    assert sum(losses[-STEPS:]) < 0.5 * sum(losses[:STEPS])


def test_loss_is_fp32_under_autocast_and_clusters_are_counted() -> None:
    method, batch = make(DeepClusterV2), next(kit.loader().batches(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method.start_epoch(0, kit.loader().images)
        output = method(batch)
    assert output["loss"].dtype == torch.float32
    output["loss"].backward()
    assert method.clusters_used.tolist() == [len(row.unique()) for row in method.assignments]
    assert output["clusters_used"] == method.clusters_used.mean()


def test_default_options_are_the_published_ones_where_size_does_not_matter() -> None:
    cfg = DeepClusterV2.Config()
    assert (cfg.out_dim, cfg.temperature, cfg.assign, cfg.kmeans_iterations) == (128, 0.1, (0, 1), 10)
    assert len(cfg.prototypes) == 3


def test_wrong_options_are_explained() -> None:
    with pytest.raises(ConfigError, match="41 clusters of the 40 images") as error:
        make(DeepClusterV2, prototypes=(5, 41))
    assert error.value.hint == "method.prototypes=[4]"
    with pytest.raises(ValidationError, match="prototypes"):
        make(DeepClusterV2, prototypes=())
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        make(DeepClusterV2, prototypes=(5, 1))
    with pytest.raises(ValidationError, match="assign"):
        make(DeepClusterV2, assign=(0, 3))
