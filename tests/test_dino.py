"""DINO against the paper's formulas in numpy, and what must not change with parts, ranks and schedules."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from methods_kit import batch, build, make, rows
from pydantic import ValidationError
from sslbench_plugins.methods.dino import DINO, DINOHead
from torch import nn
from training_kit import Run
from training_kit import make as make_stacked

from sslbench.nn.ema import EMA
from sslbench.nn.prototypes import NormedPrototypes, swapped_prediction
from sslbench.nn.transformer import DropPath
from sslbench.plugin.api import Batch, Progress, ViewSpec

SMALL: dict[str, Any] = {
    "hidden": 16, "bottleneck": 8, "prototypes": 12, "views": (ViewSpec(count=3),), "freeze_epochs": 0,
}  # fmt: skip


def dino(seed: int = 0, norm: bool = True, **options: Any) -> DINO:
    return make(DINO, seed, norm, **{**SMALL, **options})  # type: ignore[return-value]


def steps(method: DINO, count: int, start: int = 0) -> list[float]:
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(start, start + count):
        loss = method(batch(views=3, seed=step, step=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        method.before_step(Progress(step, 50, 10))
        optimizer.step()
        method.after_step(Progress(step, 50, 10))
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- the loss


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    shifted = scores / temperature - (scores / temperature).max(-1, keepdims=True)
    return np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)


def paper_loss(student: np.ndarray, teacher: np.ndarray, center: np.ndarray, ts: float, tt: float) -> float:
    """Equation 3 and the pseudocode of algorithm 1, term by term; the mean over terms and images."""
    terms = []
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t:
                p = softmax(teacher[t] - center, tt)
                terms.append(-(p * np.log(softmax(student[s], ts))).sum(-1).mean())
    return float(np.mean(terms))


def parts_of(method: DINO, data: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all views by copies of both networks."""
    twin = copy.deepcopy(method)
    with torch.no_grad():
        student = [twin.head(twin.backbone(view.images).pooled) for view in data.views]
        teacher = [twin.teacher_head(twin.teacher_backbone(view.images).pooled) for view in data.views[:2]]
    return torch.stack(student).double().numpy(), torch.stack(teacher).double().numpy()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_that_of_the_paper(seed: int) -> None:
    method, data = dino(seed, norm=False, teacher_temperature=0.07, temperature=0.2), batch(views=3, seed=seed)
    method.center.copy_(torch.randn(12, generator=torch.Generator().manual_seed(seed)) / 3)
    for parameter in method.teacher_head.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    student, teacher = parts_of(method, data)
    expected = paper_loss(student, teacher, method.center.double().numpy(), 0.2, method.teacher_temperature(0))
    assert method(data)["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_worked_loss() -> None:
    """Two prototypes, two views: a certain teacher costs minus the logarithm of what the student gives it."""
    targets = {0: torch.tensor([[1.0, 0.0]]), 1: torch.tensor([[0.0, 1.0]])}
    scores = torch.tensor([[[0.1 * math.log(3), 0.0]], [[0.0, 0.1 * math.log(4)]]])
    loss = swapped_prediction(scores, targets, 0.1)
    assert loss.item() == pytest.approx((-math.log(1 / 5) - math.log(1 / 4)) / 2, rel=1e-5)


@pytest.mark.parametrize("count", [12, 300])
def test_uniform_outputs_cost_the_logarithm_of_the_prototypes(count: int) -> None:
    method = dino(prototypes=count)
    for head in (method.head, method.teacher_head.module):
        nn.init.zeros_(head.prototypes.scale)
    found = method(batch(views=3))
    assert found["loss"].item() == pytest.approx(math.log(count), rel=1e-5)
    assert found["entropy"].item() == pytest.approx(math.log(count), rel=1e-5)


def test_a_shift_of_all_scores_changes_nothing() -> None:
    first, data = dino(), batch(views=3)
    second = copy.deepcopy(first)
    second.center += 0.7
    torch.testing.assert_close(first(data)["loss"], second(data)["loss"])


def test_only_the_student_learns() -> None:
    method = dino()
    method(batch(views=3))["loss"].backward()
    for name, parameter in method.named_parameters():
        frozen = name.startswith("teacher") or name == "head.prototypes.scale"
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name


def test_small_views_are_for_the_student_alone() -> None:
    method, seen = dino(), []
    method.teacher_backbone.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    method(batch(8, views=3))
    assert seen == [16]


# ---------------------------------------------------------------- centre


def test_the_center_follows_the_mean_score_of_the_teacher() -> None:
    """Equation 4; the loss of a step knows the centre of the step before."""
    method, data = dino(norm=False, center_momentum=0.8), batch(views=3)
    method.center.fill_(0.25)
    _, teacher = parts_of(method, data)
    method(data)
    assert (method.center == 0.25).all()
    method.after_step(Progress(0, 50, 10))
    expected = 0.8 * 0.25 + 0.2 * teacher.mean((0, 1))
    torch.testing.assert_close(method.center.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_the_center_of_parts_is_that_of_the_batch() -> None:
    whole, parted, data = dino(norm=False), dino(norm=False), batch(7, views=3)
    whole(data)
    for start, stop in ((0, 3), (3, 7)):
        parted(rows(data, start, stop))
    for method in (whole, parted):
        method.after_step(Progress(0, 50, 10))
    torch.testing.assert_close(parted.center, whole.center)
    assert whole.center.abs().max() > 1e-3


def test_a_step_that_was_not_taken_leaves_the_center_alone() -> None:
    """Loss scaling skips steps."""
    method, fresh = dino(norm=False), dino(norm=False)
    method(batch(views=3, seed=5, step=0))
    for each in (method, fresh):
        each(batch(views=3, seed=1, step=1))
        each.after_step(Progress(1, 50, 10))
    assert torch.equal(method.center, fresh.center)


def test_gradients_of_parts_add_up() -> None:
    options = {key: value for key, value in SMALL.items() if key != "views"}
    ends = [
        Run(
            make_stacked(DINO, views=(ViewSpec(count=3),), **options),
            views=3,
            train={"accumulate": parts, "clip_grad": 0.05, "clip_by": "tensor"},
            optim={"name": "sgd", "lr": 0.05, "final_weight_decay": 0.3},
        ).train()
        for parts in (1, 4)
    ]
    pairs = zip(ends[0].method.state_dict().values(), ends[1].method.state_dict().values(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-6


# ---------------------------------------------------------------- schedules


def test_the_teachers_temperature_rises_by_epochs() -> None:
    """Ten steps in an epoch; numpy's linspace over the warm-up, as published, then constant."""
    method = dino(teacher_temperature=0.07, teacher_temperature_from=0.04, teacher_warmup_epochs=4)
    expected = [*np.linspace(0.04, 0.07, 4), 0.07, 0.07]
    for epoch, value in enumerate(expected):
        for step in (10 * epoch, 10 * epoch + 9):
            assert method.teacher_temperature(step) == pytest.approx(value)
    assert dino().teacher_temperature(0) == 0.04


def test_the_teacher_follows_with_cosine_momentum() -> None:
    method = dino(momentum=0.9)
    teacher, student = method.teacher_head.module.mlp[0].weight, method.head.mlp[0].weight
    student.data += 1
    before = teacher.clone()
    method(batch(views=3))
    method.after_step(Progress(25, 50, 10))
    momentum = 1 - 0.1 * (math.cos(math.pi / 2) + 1) / 2
    torch.testing.assert_close(teacher, momentum * before + (1 - momentum) * student.detach())


def test_prototypes_stand_still_in_the_first_epochs() -> None:
    method = dino(freeze_epochs=1)
    before = method.head.prototypes.direction.clone()
    steps(method, 10)
    assert torch.equal(method.head.prototypes.direction, before)
    steps(method, 1, start=10)
    assert not torch.equal(method.head.prototypes.direction, before)


# ---------------------------------------------------------------- networks


def test_the_published_head() -> None:
    """Of ViT-S: 384-2048-2048-256 and 65536 prototypes of 256, with a learned length."""
    cfg = DINO.Config(hidden=2048, bottleneck=256, prototypes=65536, fixed_length=False)
    with torch.device("meta"):
        head = DINOHead(384, cfg)
    layers = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == layers + 65536 * (256 + 1)
    kinds = [type(layer) for layer in head.mlp]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    with_norm = DINOHead(
        8, DINO.Config(head_norm=True, **{k: SMALL[k] for k in ("hidden", "bottleneck", "prototypes")})
    )
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in with_norm.mlp) == 2


def test_scores_are_those_of_torchs_weight_normalisation() -> None:
    ours = NormedPrototypes(6, 5, fixed_length=False)
    nn.init.uniform_(ours.scale, 0.5, 2)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, bias=False))
    theirs.parametrizations.weight.original1.data.copy_(ours.direction)
    theirs.parametrizations.weight.original0.data.copy_(ours.scale)
    embeddings = torch.randn(4, 6)
    torch.testing.assert_close(ours(embeddings), theirs(embeddings))


def test_scores_of_fixed_prototypes_are_cosines() -> None:
    head = DINOHead(8, DINO.Config(**{k: SMALL[k] for k in ("hidden", "bottleneck", "prototypes")}))
    assert head(100 * torch.randn(50, 8)).abs().max() <= 1 + 1e-5


def test_the_teacher_starts_as_the_student_and_is_what_evaluations_use() -> None:
    method = dino()
    assert method.export() is method.teacher_backbone.module
    for a, b in zip(method.teacher_backbone.parameters(), method.backbone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_target_drops_nothing_and_keeps_its_statistics_moving() -> None:
    online = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), DropPath(0.9))
    target = EMA.copy_of(online).train()
    assert [type(m) for m in target.modules() if m.training] == [EMA, nn.BatchNorm1d]
    assert not any(m.training for m in target.eval().modules())
    assert all(m.training for m in online.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": (ViewSpec(),)}, "at least two views"),
        ({"teacher_views": 4}, "teacher_views is 4, but there are 3 views only"),
        ({"teacher_temperature": 0.0}, "teacher_temperature"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DINO.Config(**{**SMALL, **options})


# ---------------------------------------------------------------- training


def test_state_dict_continues_identically() -> None:
    first = dino()
    steps(first, 3)
    second = dino(seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert steps(first, 3, start=3) == steps(second, 3, start=3)


COLOURS = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).repeat(6, 1, 32, 32)


def coloured(step: int) -> Batch:
    """Four kinds of images, each of a colour of its own under noise."""
    data = batch(24, views=2, seed=step, step=step)
    noisy = tuple(view._replace(images=COLOURS + 0.5 * view.images) for view in data.views)
    return Batch(noisy, data.index, data.draws)


def test_the_student_learns_what_the_teacher_says_and_kinds_are_told_apart() -> None:
    """The teacher's own uncertainty comes and goes with the centre, so only what the student adds is judged."""
    method = dino(views=(ViewSpec(count=2),), prototypes=64)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    missed: list[float] = []
    for step in range(80):
        found = method(coloured(step))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        method.after_step(Progress(step, 200, 10))
        missed.append((found["loss"] - found["entropy"]).item())
    assert max(missed) > 1
    assert max(missed[-5:]) < 0.2
    with torch.no_grad():
        scores = method.head(method.backbone(coloured(99).views[0].images).pooled)
    assert len(scores.argmax(1)[:4].unique()) == 4


def test_build_needs_pooled_features_only() -> None:
    assert DINO.requires == {"pooled"}
    DINO(DINO.Config(), build())
