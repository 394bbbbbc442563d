"""SwAV: worked losses, the queue, the order of views, resumption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from methods_kit import SIDE, TinyBackbone, batch, make
from pydantic import ValidationError
from sslbench_plugins.methods.swav import SwAV, SwAVConfig, swapped_prediction
from test_sinkhorn import CODES, SCORES
from torch import Tensor, nn

from sslbench.config.schema import OptimOptions
from sslbench.engine.optim import build_optimizer
from sslbench.errors import ConfigError
from sslbench.nn.prototypes import Prototypes
from sslbench.nn.sinkhorn import sinkhorn
from sslbench.plugin.api import Batch, Build, Progress, View, ViewSpec
from sslbench.rng import Draws

QUEUE = {"queue": 24, "queue_from_epoch": 0, "prototypes": 12}  # three batches of eight
MULTI_CROP = (ViewSpec(count=2, size=32), ViewSpec(count=3, size=16))


def made(**options: object) -> SwAV:
    method = make(SwAV, **{"prototypes": 12, **options})
    assert isinstance(method, SwAV)
    return method


def progress(step: int) -> Progress:
    return Progress(step, 50, 10)


def many_crops(step: int = 0) -> Batch:
    """Two views of 32 pixels and three of 16."""
    large, small = batch(8, views=2, seed=step, step=step), batch(8, views=3, seed=step + 100)
    shrunk = [view._replace(images=view.images[..., ::2, ::2]) for view in small.views]
    return Batch((*large.views, *shrunk), large.index, large.draws)


# ---------------------------------------------------------------- loss


def worked_loss(scores: Sequence[Tensor]) -> Tensor:
    codes = {view: sinkhorn(scores[view], 0.05, 3) for view in (0, 1)}
    return swapped_prediction(torch.stack(list(scores)), codes, 0.1)


def test_worked_losses() -> None:
    crops = [SCORES, 0.9 * SCORES.flip(0), 0.5 * SCORES + 0.05]
    torch.testing.assert_close(worked_loss(crops[:2]), torch.tensor(6.602813), rtol=0, atol=1e-5)
    torch.testing.assert_close(worked_loss(crops), torch.tensor(4.485322), rtol=0, atol=1e-5)


def test_a_view_does_not_predict_its_own_code() -> None:
    scores = torch.randn(3, 6, 4, requires_grad=True)
    swapped_prediction(scores, {1: torch.full((6, 4), 0.25)}, 0.1).backward()
    assert scores.grad is not None
    assert not scores.grad[1].any()
    assert scores.grad[[0, 2]].abs().sum(dim=(1, 2)).min() > 0


def test_the_loss_is_fp32_in_autocast() -> None:
    method = made()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch())["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, made()(batch())["loss"], rtol=0.02, atol=0)


@pytest.mark.parametrize("count", [7, 3000])
def test_constant_embeddings_cost_the_logarithm_of_the_prototypes(count) -> None:
    method = made(prototypes=count)
    method.embed = lambda batch: nn.functional.normalize(torch.ones(2, 8, 128), dim=2)  # type: ignore[method-assign]
    with torch.no_grad():  # every prototype is as far from them
        method.prototypes[0].weight.copy_(torch.eye(128)[torch.arange(count) % 128])
    assert method(batch())["loss"].item() == pytest.approx(math.log(count), abs=1e-5)


def test_hard_codes_are_an_option() -> None:
    scores, nothing = SCORES, torch.empty(0, 128)
    torch.testing.assert_close(made(prototypes=4, epsilon=0.05)._codes(scores, nothing), CODES, rtol=0, atol=1e-5)
    assert set(made(prototypes=4, hard=True)._codes(scores, nothing).unique().tolist()) == {0.0, 1.0}


def test_loss_falls_below_collapse() -> None:
    method = made(prototypes=12, freeze_steps=10)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        loss = method(noisy_views(step))["loss"]
        loss.backward()
        method.before_step(progress(step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * math.log(12)


def noisy_views(step: int) -> Batch:
    """Two noisy copies of images that differ in their colours."""
    generator = torch.Generator().manual_seed(step)
    colours = torch.randn(16, 3, 1, 1, generator=generator)
    images = [colours + 0.3 * torch.randn(16, 3, SIDE, SIDE, generator=generator) for _ in range(2)]
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(16, 4)
    views = tuple(
        View(each, boxes, torch.zeros(16, dtype=torch.bool), torch.full((16, 2), 32.0)) for each in images
    )
    return Batch(views, torch.arange(16), Draws(0, step, torch.arange(16)))


# ---------------------------------------------------------------- network


def test_prototypes_have_unit_rows_before_they_score() -> None:
    method = made()
    with torch.no_grad():
        method.prototypes[0].weight.mul_(7.0)
    method(batch())
    torch.testing.assert_close(method.prototypes[0].weight.norm(dim=1), torch.ones(12))


def test_scores_are_cosines() -> None:
    torch.manual_seed(0)
    prototypes, rows = Prototypes(4, 3), nn.functional.normalize(torch.randn(5, 4), dim=1)
    expected = nn.functional.cosine_similarity(rows[:, None], prototypes.weight[None], dim=2)
    torch.testing.assert_close(prototypes(rows), expected)


def test_embeddings_are_unit_rows_in_view_major_order() -> None:
    method = make(SwAV, norm=False, prototypes=12, views=MULTI_CROP, head_norm=False)
    data = many_crops()
    embeddings = method.embed(data)
    assert embeddings.shape == (5, 8, 128)
    torch.testing.assert_close(embeddings.norm(dim=2), torch.ones(5, 8))
    for number, view in enumerate(data.views):
        alone = nn.functional.normalize(method.projector(method.backbone(view.images).pooled), dim=1)
        torch.testing.assert_close(embeddings[number], alone)


def test_one_backbone_pass_per_resolution_and_one_head_pass() -> None:
    """So the running statistics of the backbone move twice, small views last, and those of the head once."""
    method = made(views=MULTI_CROP)
    sizes: list[tuple[int, ...]] = []
    method.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    method(many_crops())
    assert sizes == [(16, 3, 32, 32), (24, 3, 16, 16)]
    norms = {name: module for name, module in method.named_modules() if hasattr(module, "num_batches_tracked")}
    assert {name: int(norm.num_batches_tracked) for name, norm in norms.items()} == {
        "backbone.layers.1": 2,
        "projector.1": 1,
    }


def test_small_views_have_the_larger_part_of_running_statistics() -> None:
    """Large views read 0 and small ones 1; the mean settles at 0.1 / (1 - 0.9^2) = 52.6 %."""
    method = made(views=MULTI_CROP)
    stem, norm = method.backbone.layers[0], method.backbone.layers[1]
    nn.init.constant_(stem.weight, 1 / stem.weight[0].numel())
    nn.init.zeros_(stem.bias)
    data = many_crops()
    for number, view in enumerate(data.views):
        view.images.fill_(float(number >= 2))
    with torch.no_grad():
        for _ in range(50):
            method.embed(data)
    torch.testing.assert_close(norm.running_mean, torch.full((8,), 0.526316), rtol=0, atol=1e-4)


def test_published_head() -> None:
    def count(**options: object) -> tuple[int, int]:
        method = SwAV(SwAVConfig(**options), Build(WideBackbone, 8, 100, 50, 10))
        return tuple(sum(p.numel() for p in part.parameters()) for part in (method.projector, method.prototypes))

    assert count(hidden=2048, prototypes=3000) == (4_462_720, 384_000)
    assert count(hidden=2048, head_norm=False)[0] == 4_462_720 - 2 * 2048
    assert count(hidden=0)[0] == 2048 * 128 + 128


class WideBackbone(TinyBackbone):
    dim = 2048


def test_every_parameter_gets_a_gradient() -> None:
    method = made(views=MULTI_CROP)
    method(many_crops())["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_frozen_prototypes_stand_still_but_for_their_normalisation(name) -> None:
    method = made(freeze_steps=3)
    options = OptimOptions(name=name, lr=0.1, weight_decay=0.1, exclude="none")
    optimizer = build_optimizer(options, None, method, 8)
    weights = [method.prototypes[0].weight.detach().clone()]
    for step in range(5):
        method(batch(seed=step, step=step))["loss"].backward()
        method.before_step(progress(step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.append(method.prototypes[0].weight.detach().clone())
    moved = [not torch.allclose(old, new) for old, new in pairwise(weights)]
    assert moved == [False, False, False, True, True]


# ---------------------------------------------------------------- queue


def codes_with(method: SwAV, stored: Tensor, own: Tensor) -> Tensor:
    """Codes of the batch when the rows of ``stored`` take part."""
    weight = method.prototypes[0].weight.detach()
    return sinkhorn(torch.cat([stored @ weight.T, own]), method.cfg.epsilon, 3)[len(stored) :]


def spy_on_codes(method: SwAV) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queued rows, scores and codes of each call."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = method._codes

    def spied(scores: Tensor, stored: Tensor) -> Tensor:
        codes = original(scores, stored)
        calls.append((stored.clone(), scores.detach(), codes))
        return codes

    method._codes = spied  # type: ignore[method-assign]
    return calls


def test_queue_of_three_batches_is_first_used_by_the_fourth() -> None:
    method = made(**QUEUE)
    calls = spy_on_codes(method)
    seen = []
    for step in range(5):
        data = batch(seed=step, step=step)
        method(data)
        seen.append(len(calls[-1][0]))
    assert seen == [0, 0, 0, 24, 24]


@pytest.mark.parametrize(("epoch", "first"), [(1, 10), (2, 20)])
def test_queue_starts_with_its_epoch(epoch, first) -> None:
    method = made(**QUEUE | {"queue_from_epoch": epoch})
    assert (method.first_push, method.first_use) == (first, first + 3)
    method(batch(step=first - 1))
    assert not method.queue["embeddings"].any()
    method(batch(step=first))
    assert method.queue["embeddings"].any()


@pytest.mark.parametrize(
    ("length", "size", "epoch", "steps", "first"), [(3840, 256, 15, 5004, 15 * 5004 + 15), (2560, 2560, 0, 500, 1)]
)
def test_first_use_of_the_published_queues(length, size, epoch, steps, first) -> None:
    build = Build(TinyBackbone, size, 1_281_167, 400 * steps, steps)
    method = SwAV(SwAVConfig(prototypes=12, queue=length, queue_from_epoch=epoch), build)
    assert (method.first_push, method.first_use) == (epoch * steps, first)
    assert method.queue.length == length


def test_queued_rows_shape_the_codes_by_their_own_view_and_todays_prototypes() -> None:
    method = made(**QUEUE)
    calls = spy_on_codes(method)
    for step in range(3):
        method(batch(seed=step, step=step))
    with torch.no_grad():  # the prototypes move; the queue holds embeddings, not scores
        method.prototypes[0].weight.add_(torch.randn_like(method.prototypes[0].weight))
    held = method.queue["embeddings"].clone().reshape(24, 2, 128)
    method(batch(seed=3, step=3))
    for view, (stored, scores, codes) in enumerate(calls[-2:]):
        assert torch.equal(stored, held[:, view])
        assert codes.shape == (8, 12)
        torch.testing.assert_close(codes, codes_with(method, stored, scores))
        assert not torch.allclose(codes, codes_with(method, stored[:0], scores), atol=1e-3)


def test_queue_holds_the_newest_embeddings_and_no_graph() -> None:
    method = made(**QUEUE)
    for step in range(4):
        expected = made(**QUEUE).embed(batch(seed=step, step=step)).detach()
        method(batch(seed=step, step=step))
    rows = method.queue["embeddings"].reshape(3, 8, 2, 128)
    torch.testing.assert_close(rows[0].transpose(0, 1), expected)  # the fourth batch replaced the first
    assert not rows.requires_grad
    torch.testing.assert_close(rows.norm(dim=3), torch.ones(3, 8, 2))


def test_queue_is_cut_to_whole_batches() -> None:
    assert made(queue=30).queue.length == 24
    assert made(queue=0).queue is None


def test_a_queue_below_one_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.queue=7 does not hold one batch of train\.batch_size=8"):
        made(queue=7)


# ---------------------------------------------------------------- options, resumption


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assign": (0, 2)}, r"assign must name views from 0 to 1, got \[0, 2\]"),
        ({"assign": (0, 0)}, "assign names a view twice"),
        ({"assign": ()}, "at least 1 item"),
        ({"views": (ViewSpec(),), "assign": (0,)}, "at least two views"),
        ({"epsilon": 0.002}, "greater than or equal to 0.003"),
    ],
)
def test_wrong_options_are_explained(options, message) -> None:
    with pytest.raises(ValidationError, match=message):
        SwAVConfig(**options)


def test_a_single_assigned_view_is_enough() -> None:
    assert made(assign=(1,))(batch())["loss"].isfinite()


def train(method: SwAV, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    losses = []
    for step in steps:
        loss = method(batch(seed=step, step=step))["loss"]
        loss.backward()
        method.before_step(progress(step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_state_dict_continues_identically() -> None:
    whole, first, second = (made(**QUEUE, freeze_steps=5) for _ in range(3))
    losses = train(whole, range(7))
    train(first, range(4))
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    assert train(second, range(4, 7)) == losses[4:]
