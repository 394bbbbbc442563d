"""Relational reasoning: pair layout, head, losses and method, against the published reference values."""

from __future__ import annotations

import math

import pytest
import torch
from methods_kit import batch, build, make
from pydantic import ValidationError
from sslbench_plugins.methods.relationnet import RelationNet, RelationNetConfig
from torch import Tensor

from sslbench.errors import ConfigError
from sslbench.nn.focal import binary_cross_entropy, binary_focal_loss
from sslbench.nn.relation import RelationHead, negative_partners, pair_up

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0])
TARGETS = torch.tensor([1.0, 1.0, 0.0, 0.0])


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left.expand_as(right), right], dim=-1)


def numbered(views: int, images: int) -> Tensor:
    """Features ``[K,M,1]`` that are the view-major row numbers."""
    return torch.arange(float(views * images)).view(views, images, 1)


def all_pairs(views: int, images: int) -> Tensor:
    """Row numbers of both sides of all pairs, int64 ``[V,2,M,2]``."""
    rows = numbered(views, images)
    return pair_up(rows, rows, 0, side_by_side).long()


def naive_pairs(features: Tensor, combine) -> Tensor:
    """The published double loop, with a shift that grows from pair to pair of views."""
    views, images, _ = features.shape
    blocks, shift = [], 1
    for i in range(views):
        for j in range(i + 1, views):
            rolled = features[j].roll(shift, dims=0)
            blocks += [combine(features[i], features[j]), combine(features[i], rolled)]
            shift = shift + 1 if shift + 1 < images else 1
    return torch.stack(blocks).unflatten(0, (-1, 2))


AGGREGATIONS = {
    "cat": lambda a, b: torch.cat([a, b], dim=-1),
    "sum": torch.add,
    "mean": lambda a, b: (a + b) / 2,
    "max": torch.maximum,
}


def test_pair_layout_of_three_views_of_four_images() -> None:
    pairs = all_pairs(3, 4)
    assert pairs.shape == (3, 2, 4, 2)
    assert pairs[0, 0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert pairs[0, 1].tolist() == [[0, 7], [1, 4], [2, 5], [3, 6]]
    assert pairs[1, 0].tolist() == [[0, 8], [1, 9], [2, 10], [3, 11]]
    assert pairs[1, 1].tolist() == [[0, 10], [1, 11], [2, 8], [3, 9]]
    assert pairs[2, 1].tolist() == [[4, 9], [5, 10], [6, 11], [7, 8]]


@pytest.mark.parametrize("images", range(2, 9))
def test_positives_show_one_image_and_negatives_two(images: int) -> None:
    views = 5
    first, second = all_pairs(views, images).remainder(images).unbind(-1)
    assert first.numel() == images * views * (views - 1)
    assert torch.equal(first[:, 0], second[:, 0])
    assert (first[:, 1] != second[:, 1]).all()


def test_shifts_restart_before_a_full_turn() -> None:
    shifts = -negative_partners(torch.tensor([0]), 4, 7)[:, 0] % 4
    assert shifts.tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_published_size_has_63488_pairs() -> None:
    assert all_pairs(32, 64)[..., 0].numel() == 63_488


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (3, 4), (4, 7)])
def test_a_rank_pairs_its_images_with_those_of_all(start: int, stop: int) -> None:
    rows = numbered(4, 7)
    own = pair_up(rows[:, start:stop], rows, start, side_by_side).long()
    assert torch.equal(own, all_pairs(4, 7)[:, :, start:stop])


def test_a_lone_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 images"):
        make(RelationNet)(batch(1, views=4))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_head_equals_its_naive_form_in_values_and_gradients(aggregation) -> None:
    torch.manual_seed(0)
    head = RelationHead(6, 16, aggregation).double()
    features = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(6, 2, 5, dtype=torch.float64)
    inputs = [features, *head.parameters()]

    logits = head(features)
    expected = head.layers(naive_pairs(features, AGGREGATIONS[aggregation]).flatten(0, 2)).view(6, 2, 5)
    torch.testing.assert_close(logits, expected)
    gradients = torch.autograd.grad((logits * direction).sum(), inputs)
    naive_gradients = torch.autograd.grad((expected * direction).sum(), inputs)
    torch.testing.assert_close(gradients, naive_gradients)


@pytest.mark.parametrize("aggregation", ["cat", "sum", "mean"])
def test_the_matrix_of_all_pairs_is_never_built(aggregation) -> None:
    """Nothing is saved for the backward pass that is as wide as the features."""
    saved = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    head, features = RelationHead(48, 8, aggregation), torch.randn(4, 16, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head(features)
    assert max(t.numel() for t in saved if t.is_floating_point()) <= max(features.numel(), 6 * 2 * 16 * 8)


@pytest.mark.parametrize(
    ("dim", "aggregation", "parameters"),
    [(64, "cat", 33_793), (64, "sum", 17_409), (64, "max", 17_409), (512, "cat", 263_169), (512, "mean", 132_097)],
)
def test_parameters_of_the_head(dim, aggregation, parameters) -> None:
    assert sum(p.numel() for p in RelationHead(dim, 256, aggregation).parameters()) == parameters


def test_only_cat_minds_the_order_of_a_pair() -> None:
    for aggregation in AGGREGATIONS:
        head = RelationHead(6, 16, aggregation).eval()
        features = torch.randn(2, 3, 6)
        there, back = head(features)[:, 0], head(features.flip(0))[:, 0]
        assert torch.allclose(there, back, atol=1e-6) is (aggregation != "cat")


def test_focal_loss_equals_the_reference() -> None:
    losses = binary_focal_loss(LOGITS, TARGETS)
    expected = torch.tensor([0.000902, 0.350934, 0.188706, 0.086643])
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)
    assert float(losses.mean()) == pytest.approx(0.156796, abs=1e-6)
    assert float(binary_focal_loss(torch.zeros(()), torch.ones(()))) == pytest.approx(math.log(2) / 8)


def test_focal_loss_weighs_the_targets() -> None:
    losses = binary_focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), alpha=0.25)
    assert losses.tolist() == pytest.approx([math.log(2) / 16, 3 * math.log(2) / 16])


def test_cross_entropy_equals_the_reference_and_torch() -> None:
    losses = binary_cross_entropy(LOGITS, TARGETS)
    assert float(losses.mean()) == pytest.approx(0.776853, abs=1e-6)
    torch.testing.assert_close(
        losses, torch.nn.functional.binary_cross_entropy_with_logits(LOGITS, TARGETS, reduction="none")
    )


@pytest.mark.parametrize("loss", [binary_focal_loss, binary_cross_entropy])
def test_losses_and_gradients_stay_finite_at_extreme_logits(loss) -> None:
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    total = loss(logits, TARGETS).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("loss", "initial"), [("focal", math.log(2) / 8), ("bce", math.log(2))])
def test_initial_loss_of_an_undecided_head(loss, initial) -> None:
    method = make(RelationNet, loss=loss)
    torch.nn.init.zeros_(method.relation.layers[-1].weight)
    torch.nn.init.zeros_(method.relation.layers[-1].bias)
    assert float(method(batch(views=4))["loss"].detach()) == pytest.approx(initial)


class ByRule(torch.nn.Module):
    """A relation head with given answers ``[V,2,B]``."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, features: Tensor) -> Tensor:
        assert features.shape[:2] == (3, 4)
        return self.logits


def test_accuracies_are_those_of_positive_and_negative_pairs() -> None:
    """Split by label, not into the halves of a list in which both alternate."""
    method = make(RelationNet)
    logits = torch.tensor([1.0, 1.0])[:, None].repeat(3, 1, 4)
    logits[0, 0, 0] = -1
    logits[:, 1, 0] = -1
    method.relation = ByRule(logits)
    found = method(batch(4, views=3))
    assert float(found["accuracy_positive"]) == pytest.approx(100 * 11 / 12)
    assert float(found["accuracy_negative"]) == pytest.approx(100 * 3 / 12)
    assert float(found["accuracy"]) == pytest.approx(100 * 14 / 24)


def test_views_of_one_image_are_the_positives() -> None:
    """Without augmentation a positive is a feature and itself; mixed-up rows would be other sums."""
    method = make(RelationNet, aggregation="sum").eval()
    data = batch(5, views=3)
    data.views = (data.views[0],) * 3
    seen: list[Tensor] = []
    method.relation.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    method(data)
    head, features = method.relation.layers, method.backbone(data.views[0].images).pooled
    torch.testing.assert_close(seen[0][:, 0], head(2 * features).squeeze(1).expand(3, 5))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_batch_normalisation_sees_positives_and_negatives_together(aggregation) -> None:
    method = make(RelationNet, aggregation=aggregation)
    method(batch(6, views=4))
    norm = method.relation.layers[1]
    rows: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: rows.append(output.detach().clone()))
    method(batch(6, views=4))
    assert int(norm.num_batches_tracked) == 2
    assert rows[0].shape == (6 * 4 * 3, 256)
    torch.testing.assert_close(rows[0].mean(0), torch.zeros(256), atol=1e-4, rtol=0)


@pytest.mark.parametrize("views", [[], [{}]])
def test_one_view_is_refused(views) -> None:
    with pytest.raises(ValidationError, match="at least two views"):
        RelationNetConfig(views=views)


def test_views_may_differ_in_size() -> None:
    method = make(RelationNet)
    data = batch(4, views=3)
    small = data.views[2]._replace(images=data.views[2].images[:, :, ::2, ::2])
    data.views = (*data.views[:2], small)
    assert torch.isfinite(method(data)["loss"])


def test_published_settings_are_expressible() -> None:
    (spec,) = RelationNetConfig().views
    views = [spec.model_dump() | {"count": 32}]
    cfg = RelationNetConfig(views=views, aggregation="cat", hidden=256, loss="focal")
    method = RelationNet(cfg, build())
    assert float(method(batch(2, views=32))["loss"].detach()) < 1


def test_learns_which_views_belong_together() -> None:
    """The views of an image share its colour; those of two images do not."""
    method = make(RelationNet)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for step in range(25):
        data = batch(8, views=4, seed=step)
        color = 3 * torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(step))
        for view in data.views:
            view.images.mul_(0.1).add_(color)
        output = method(data)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    assert float(output["accuracy_positive"]) > 80
    assert float(output["accuracy_negative"]) > 80
