"""NNCLR: neighbours from the support set, their contrastive loss, and what enters the set."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch, build, make
from sslbench_plugins.methods.nnclr import NNCLR, NNCLRConfig, neighbour_contrast

from sslbench.errors import ConfigError
from sslbench.plugin.api import Progress

STEP = Progress(0, 50, 10)


def cross_entropy(rows: np.ndarray, columns: np.ndarray, temperature: float) -> float:
    """Equation 3 in float64: the mean over rows i of -log softmax of column i."""
    logits = rows @ columns.T / temperature
    return float(np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)]))


def test_worked_values() -> None:
    neighbours = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    predictions = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # cosines 1, 0 and 0.6, 0.8
    found = neighbour_contrast(neighbours, predictions, 0.5)
    expected = [np.log(1 + np.exp(-2)), np.log(1 + np.exp(-0.4))]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert expected == pytest.approx([0.126928, 0.513015], abs=1e-6)


def test_a_support_set_that_holds_the_embeddings_gives_the_form_of_nt_xent() -> None:
    """The positives are the embeddings themselves: SimCLR's softmax, over the other view alone."""
    method = make(NNCLR, queue=16).eval()
    data = batch()
    with torch.no_grad():
        z1, z2 = (method.projector(method.backbone(view.images).pooled) for view in data.views)
        p1, p2 = (F.normalize(method.predictor(z), dim=1).double().numpy() for z in (z1, z2))
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    method.queue["embeddings"].copy_(torch.cat([z2, z1]))
    halves = cross_entropy(z1.double().numpy(), p2, 0.1) + cross_entropy(z2.double().numpy(), p1, 0.1)
    assert float(method(data)["loss"].detach()) == pytest.approx(halves / 2, rel=1e-4)


def test_positives_are_the_nearest_rows_of_the_set() -> None:
    method = make(NNCLR, queue=8).eval()
    data = batch()
    support = method.queue["embeddings"].double().numpy()
    with torch.no_grad():
        z1, z2 = (method.projector(method.backbone(view.images).pooled) for view in data.views)
        p1, p2 = (F.normalize(method.predictor(z), dim=1).double().numpy() for z in (z1, z2))
    nearest1, nearest2 = (support[(z.double().numpy() @ support.T).argmax(axis=1)] for z in (z1, z2))
    halves = cross_entropy(nearest1, p2, 0.1) + cross_entropy(nearest2, p1, 0.1)
    assert float(method(data)["loss"].detach()) == pytest.approx(halves / 2, rel=1e-4)


def test_first_views_enter_the_set_after_their_step() -> None:
    method = make(NNCLR, queue=16).eval()
    data, before = batch(), method.queue["embeddings"].clone()
    method(data)
    assert torch.equal(method.queue["embeddings"], before)
    method.after_step(STEP)
    embeddings = F.normalize(method.projector(method.backbone(data.views[0].images).pooled), dim=1)
    torch.testing.assert_close(method.queue["embeddings"][:8], embeddings.detach())
    assert torch.equal(method.queue["embeddings"][8:], before[8:])
    assert int(method.queue.pushed) == 8


def test_gradients_come_from_predictions_only() -> None:
    method = make(NNCLR, queue=8)
    method(batch())["loss"].backward()
    assert not method.queue["embeddings"].requires_grad
    assert not method._newest.requires_grad
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_support_set_survives_a_checkpoint() -> None:
    method = make(NNCLR)
    for step in range(3):
        method(batch(seed=step))
        method.after_step(STEP)
    again = make(NNCLR, seed=1)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    assert torch.equal(again.queue["embeddings"], method.queue["embeddings"])
    torch.testing.assert_close(again(batch(seed=9))["loss"], method(batch(seed=9))["loss"], rtol=0, atol=0)


def test_heads_of_the_paper() -> None:
    method = make(NNCLR, hidden=64, out_dim=32, predictor_hidden=48)
    shapes = [tuple(layer.weight.shape) for layer in method.projector if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(64, 16), (64, 64), (32, 64)]
    assert method.projector[-1].affine  # the last layer is normalised, too, without ReLU
    assert [layer.out_features for layer in method.predictor if isinstance(layer, torch.nn.Linear)] == [48, 32]


def test_length_of_the_set_is_whole_batches() -> None:
    assert make(NNCLR).queue.length == 24  # a quarter of 100 images in batches of 8
    with pytest.raises(ConfigError, match=r"method\.queue=20 is not a multiple"):
        NNCLR(NNCLRConfig(queue=20), build())
