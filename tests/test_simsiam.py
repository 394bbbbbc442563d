"""SimSiam: the symmetric negative cosine, what its gradient reaches, and the predictor's learning rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from methods_kit import batch, make
from sslbench_plugins.methods.simsiam import SimSiam, negative_cosine, spread
from torch import nn

from sslbench.config.schema import OptimOptions
from sslbench.engine.optim import build_optimizer, set_learning_rate
from sslbench.nn.heads import mlp


def test_worked_values() -> None:
    prediction = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    projection = torch.tensor([[4.0, 3.0], [0.0, 2.0], [-2.0, -2.0], [7.0, 0.0]])
    torch.testing.assert_close(negative_cosine(prediction, projection), torch.tensor([-0.96, 0.0, 1.0, -1.0]))


def test_loss_is_the_mean_over_both_directions() -> None:
    method = make(SimSiam).eval()
    data = batch()
    with torch.no_grad():
        z1, z2 = (method.projector(method.backbone(view.images).pooled) for view in data.views)
        p1, p2 = method.predictor(z1).numpy(), method.predictor(z2).numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    expected = -(cosine(p1, z2.numpy()) + cosine(p2, z1.numpy())).mean() / 2
    assert float(method(data)["loss"].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_views_that_are_predicted_perfectly_cost_minus_one() -> None:
    method = make(SimSiam)
    method.predictor = nn.Identity()
    data = batch()
    data.views = (data.views[0], data.views[0])
    method.eval()
    assert float(method(data)["loss"].detach()) == pytest.approx(-1)


def test_no_gradient_flows_through_the_projections() -> None:
    prediction, projection = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    negative_cosine(prediction, projection).sum().backward()
    assert prediction.grad is not None
    assert projection.grad is None


def test_spread_tells_collapse_from_all_directions() -> None:
    torch.manual_seed(0)
    assert float(spread(torch.randn(2000, 64))) == pytest.approx(1, abs=0.02)
    assert float(spread(torch.ones(8, 64) * torch.rand(8, 1))) < 1e-3


def test_the_predictor_keeps_the_peak_rate() -> None:
    method = make(SimSiam)
    optimizer = build_optimizer(OptimOptions(name="sgd", lr=0.05, lr_per=256), method.param_groups(), method, 512)
    set_learning_rate(optimizer, 0.02, peak=0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in method.predictor.parameters()} == {0.1}
    others = [*method.backbone.parameters(), *method.projector.parameters()]
    assert {rates[id(p)] for p in others} == {0.02}


def test_the_predictor_may_follow_the_schedule() -> None:
    assert make(SimSiam, constant_predictor_lr=False).param_groups() is None


def test_heads_of_the_paper() -> None:
    method = make(SimSiam, hidden=64, out_dim=32, bottleneck=8)
    kinds = [type(layer) for layer in method.projector]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert not method.projector[-1].affine
    assert [type(layer) for layer in method.predictor] == [*hidden, nn.Linear]
    assert method.predictor[0].out_features == 8
    assert len(make(SimSiam, projector_layers=2).projector) == 5


def test_published_predictor_has_its_parameters() -> None:
    counted = sum(parameter.numel() for parameter in mlp(2048, 512, 2048).parameters())
    assert counted == 2048 * 512 + 512 + 2 * 512 + 512 * 2048 + 2048
