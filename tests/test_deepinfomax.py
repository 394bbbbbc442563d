"""Deep InfoMax: discriminators, the shift by one image, the three objectives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch, build, make
from pydantic import ValidationError
from sslbench_plugins.methods.deepinfomax import (
    DeepInfoMax,
    DeepInfoMaxConfig,
    GlobalDiscriminator,
    LocalDiscriminator,
    previous_image,
)
from torch import Tensor, nn

from sslbench.errors import ConfigError
from sslbench.plugin.api import Batch, Build

ALL = {"global_weight": 1.0, "local_weight": 1.0, "prior_weight": 1.0}


def method(**options: object) -> DeepInfoMax:
    made = make(DeepInfoMax, **options)
    assert isinstance(made, DeepInfoMax)
    return made


def one_view(**kwargs: int) -> Batch:
    return batch(views=1, **kwargs)


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def test_the_first_layer_equals_a_1x1_convolution_on_vector_and_map_side_by_side():
    torch.manual_seed(0)
    discriminator = LocalDiscriminator(dim=6, map_dim=4)
    vectors, feature_map = torch.randn(3, 6), torch.randn(3, 4, 5, 5)
    first, _, second, _, third = discriminator.first, *discriminator.rest
    x = torch.cat([vectors[:, :, None, None].expand(-1, -1, 5, 5), feature_map], dim=1)
    for layer in (first, second, third):
        x = F.conv2d(x if layer is first else x.relu(), layer.weight[:, :, None, None], layer.bias)
    found = discriminator(vectors, feature_map.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found, x.flatten(1))


def test_sizes_of_the_discriminators_for_conv4():
    assert count(LocalDiscriminator(64, 8)) == (72 * 256 + 256) + (256 * 256 + 256) + 257
    convolutions = (8 * 9 * 64 + 64) + (64 * 9 * 32 + 32)
    assert count(GlobalDiscriminator(64, 8)) == convolutions + (8256 * 256 + 256) + (256 * 256 + 256) + 257
    made = method()
    assert count(made.prior) == (16 * 512 + 512) + (512 * 128 + 128) + 129


@pytest.mark.parametrize("key", ["local", "global", "prior"])
def test_an_undecided_discriminator_costs_two_ln_two(key):
    made = method(**ALL)
    network = {"local": made.local, "global": made.whole, "prior": made.prior}[key]
    assert network is not None
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert made(one_view())[key].item() == pytest.approx(2 * math.log(2))


def test_a_known_value():
    """Logits ln 3 everywhere: pairs cost ln(4/3), strangers ln 4."""
    made = method(prior_weight=0.0)
    assert made.local is not None
    nn.init.zeros_(made.local.rest[-1].weight)
    nn.init.constant_(made.local.rest[-1].bias, math.log(3))
    assert made(one_view())["loss"].item() == pytest.approx(math.log(4 / 3) + math.log(4))


def test_the_previous_image_comes_from_one_row_above_and_the_first_row_gets_the_last():
    assert previous_image(torch.arange(4.0)[:, None]).flatten().tolist() == [3, 0, 1, 2]


def test_strangers_are_the_cells_of_the_next_image():
    made = method(prior_weight=0.0, cells=None).eval()
    data = one_view()
    with torch.no_grad():
        features = made.backbone(data.views[0].images)
        vectors, cells = features.pooled, features.stem.flatten(2).transpose(1, 2)
        pairs = [F.softplus(-made.local(vectors[b : b + 1], cells[b : b + 1])).mean() for b in range(8)]
        strangers = [
            F.softplus(made.local(vectors[b : b + 1], cells[(b + 1) % 8 : (b + 1) % 8 + 1])).mean()
            for b in range(8)
        ]
        expected = torch.stack(pairs).mean() + torch.stack(strangers).mean()
        torch.testing.assert_close(made(data)["local"], expected)


def test_weights_multiply_their_objectives():
    found = method(global_weight=0.5, local_weight=2.0, prior_weight=0.1)(one_view())
    expected = 0.5 * found["global"] + 2 * found["local"] + 0.1 * found["prior"]
    torch.testing.assert_close(found["loss"], expected)


def test_discriminators_without_weight_are_not_built():
    made = method()
    assert made.whole is None
    assert not any(key.startswith("whole") for key in made.state_dict())
    bare = method(prior_weight=0.0)
    assert bare.prior is None
    assert set(bare(one_view())) == {"loss", "local"}


def test_encoder_and_prior_discriminator_pull_together():
    """A small step of the encoder alone lowers the prior term; an adversary's would raise it."""
    made = method(prior_weight=1.0, cells=None)
    before = made(one_view())["prior"]
    before.backward()
    with torch.no_grad():
        for parameter in made.backbone.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert made(one_view())["prior"] < before


def test_saturated_discriminators_stay_finite():
    made = method(**ALL)
    for sign in (1e4, -1e4):
        for network in (made.local, made.whole, made.prior):
            last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]  # type: ignore[union-attr]
            nn.init.constant_(last.bias, sign)
        made.zero_grad()
        loss = made(one_view())["loss"]
        loss.backward()
        assert torch.isfinite(loss)
        assert loss > 1e4
        assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_sampled_cells_do_not_repeat_and_estimate_all_cells():
    made = method(cells=16, prior_weight=0.0).eval()
    stem = torch.arange(64.0).reshape(1, 1, 8, 8).expand(8, 8, 8, 8)
    drawn = made._cells(stem, one_view())
    assert drawn.shape == (8, 16, 8)
    assert all(len(row.unique()) == 16 for row in drawn[:, :, 0])
    assert not torch.equal(drawn[0], drawn[1])
    every = method(cells=None, prior_weight=0.0).eval()
    with torch.no_grad():
        sampled = torch.stack([made(one_view(step=step))["local"] for step in range(30)])
        exact = every(one_view())["local"]
    assert sampled.std() > 0
    assert abs(sampled.mean() - exact) < 4 * sampled.std() / math.sqrt(30)


def test_every_parameter_gets_a_finite_fp32_gradient():
    made = method(**ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(one_view())["loss"]
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def train(made: DeepInfoMax, steps: int, start: int = 0) -> list[float]:
    """Adam steps on images of one colour each."""
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    losses = []
    for step in range(start, start + steps):
        data = one_view(step=step, seed=step)
        colours = torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(step))
        view = data.views[0]._replace(images=colours + 0.1 * data.views[0].images)
        output: dict[str, Tensor] = made(Batch((view,), data.index, data.draws))
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(float(output["local"].detach()))
    return losses


def test_vectors_learn_to_recognise_cells_of_their_image():
    losses = train(method(cells=16), 40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_state_dict_round_trip_continues_identically():
    first = method()
    train(first, 2)
    second = make(DeepInfoMax, seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(first, 3, start=2) == train(second, 3, start=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_weight": 0}, "both 0"),
        ({"views": [{"count": 2}]}, "one view"),
        ({"views": []}, "one view"),
        ({"cells": 0}, "cells"),
        ({"prior_weight": -1}, "prior_weight"),
    ],
)
def test_wrong_options_say_what_is_wrong(options, message):
    with pytest.raises(ValidationError, match=message):
        DeepInfoMaxConfig(**options)


def test_a_batch_of_one_image_has_no_next_image():
    alone = Build(build().make_backbone, 1, 100, 50, 10)
    with pytest.raises(ConfigError, match="batch_size"):
        DeepInfoMax(DeepInfoMaxConfig(), alone)
