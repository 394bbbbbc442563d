"""Heads, EMA and losses against hand-checked values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sslbench.nn.ema import EMA, cosine_momentum
from sslbench.nn.heads import mlp
from sslbench.nn.losses import byol_distance, nt_xent, nt_xent_log_of_mean


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_mlp_has_the_parameter_counts_of_the_published_heads() -> None:
    assert count(mlp(2048, 4096, 256, final_bias=False)) == 9_449_472  # SCRL projector
    assert count(mlp(256, 4096, 256, final_bias=False)) == 2_109_440  # SCRL predictor
    assert count(mlp(2048, 2048, 128)) == 4_462_720  # SwAV head
    assert count(mlp(2048, 2048, 128, norm=False)) == 4_458_624  # MoCo v2 head


def test_mlp_activation_follows_the_normalisation() -> None:
    kinds = [type(layer) for layer in mlp(4, 8, 2, activation="leaky-relu")]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Linear]


def test_ema_averages_parameters_and_leaves_buffers_alone() -> None:
    online, target = mlp(2, 3, 2), EMA(mlp(2, 3, 2))
    online(torch.randn(8, 2))  # moves the online running statistics
    before = [parameter.clone() for parameter in target.parameters()]
    target.update(online, 0.9)
    for old, new, source in zip(before, target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source)
    assert torch.equal(target.module[1].running_mean, torch.zeros(3))


def test_ema_is_frozen_and_collects_its_own_statistics() -> None:
    online = mlp(2, 3, 2)
    target = EMA.copy_of(online)
    output = target(torch.randn(8, 2))
    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(parameter.requires_grad for parameter in online.parameters())
    assert not torch.equal(target.module[1].running_mean, online[1].running_mean)


def test_ema_with_momentum_one_stands_still() -> None:
    online, target = nn.Linear(2, 2), EMA(nn.Linear(2, 2))
    before = target.module.weight.clone()
    target.update(online, 1.0)
    assert torch.equal(target.module.weight, before)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (0.97, [0.97, 0.974393, 0.985, 0.995607, 1.0]),
        (0.996, [0.996, 0.996586, 0.998, 0.999414, 1.0]),
    ],
)
def test_cosine_momentum(base: float, expected: list[float]) -> None:
    assert [cosine_momentum(base, s / 4) for s in range(5)] == pytest.approx(expected, abs=1e-6)


def test_byol_distance_value() -> None:
    predictions = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    targets = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    distances = byol_distance(predictions, targets)
    torch.testing.assert_close(distances, torch.tensor([2.0, 0.58579]), atol=1e-5, rtol=0)
    assert float(distances.sum()) == pytest.approx(2.58579, abs=1e-5)


def test_loss_in_both_directions_lies_between_zero_and_eight() -> None:
    rows = torch.randn(5, 3)
    for sign, expected in ((2.0, 0.0), (-2.0, 4.0)):
        torch.testing.assert_close(byol_distance(rows, sign * rows), torch.full((5,), expected), atol=1e-5, rtol=0)


def test_byol_distance_sends_no_gradient_to_the_target() -> None:
    prediction, target = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    byol_distance(prediction, target).sum().backward()
    assert prediction.grad is not None
    assert target.grad is None


FIRST = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
SECOND = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


def test_nt_xent_values() -> None:
    assert float(nt_xent_log_of_mean(FIRST, SECOND, 0.5)) == pytest.approx(0.342354, abs=1e-6)
    assert float(nt_xent(FIRST, SECOND, 0.5)) == pytest.approx(0.343827, abs=1e-6)


def test_nt_xent_ignores_the_length_of_embeddings() -> None:
    assert float(nt_xent(3 * FIRST, 7 * SECOND, 0.5)) == pytest.approx(0.343827, abs=1e-6)


def test_nt_xent_against_cross_entropy_over_explicit_pairs() -> None:
    first, second = torch.randn(2, 5, 3)
    rows = nn.functional.normalize(torch.cat([first, second]), dim=1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    expected = nn.functional.cross_entropy(logits, (torch.arange(10) + 5) % 10)
    torch.testing.assert_close(nt_xent(first, second, 0.1), expected)


@pytest.mark.parametrize("loss", [nt_xent, nt_xent_log_of_mean])
def test_contrastive_losses_stay_in_fp32_under_autocast(loss) -> None:
    first, second = torch.randn(2, 6, 8)
    expected = loss(first, second, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(first, second, 0.1), expected)
        assert loss(first.bfloat16(), second.bfloat16(), 0.1).dtype == torch.float32


def test_byol_distance_stays_in_fp32_under_autocast() -> None:
    first, second = torch.randn(2, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert byol_distance(first.bfloat16(), second).dtype == torch.float32
