"""The linear protocol: the batched grid against torch.optim.SGD, selection, refit, chance level."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_kit import CPU, make_backbone, make_dataset, make_job
from sslbench_plugins.datasets.digits import Digits
from sslbench_plugins.evals.linear import Heads, Linear, LinearConfig, Score, train, with_ones
from sslbench_plugins.evals.test import HeldOutOptions, HeldOutTest
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.data.sources import ArraySource
from sslbench.errors import DivergedError
from sslbench.evaluation.job import run_protocol

EPOCHS = 3
BATCH = 64


@pytest.fixture(scope="module")
def table() -> tuple[Tensor, Tensor]:
    features = make_job(Linear(LinearConfig()), Path("unused")).features("train")
    return F.normalize(features.features, dim=1), features.labels


def batches_of(table: tuple[Tensor, Tensor], epoch: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(table[0]), generator=torch.Generator().manual_seed(epoch))
    return [(table[0][rows], table[1][rows]) for rows in torch.split(order, BATCH)]


def inputs_of(table: tuple[Tensor, Tensor], epoch: int) -> list[tuple[Tensor, Tensor]]:
    return [(with_ones(features), labels) for features, labels in batches_of(table, epoch)]


def single_head(table: tuple[Tensor, Tensor], start: Tensor, lr: float, cfg: LinearConfig) -> Tensor:
    """One classifier trained the ordinary way, with autograd and torch's optimiser."""
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight.copy_(start[:, :-1])
        layer.bias.copy_(start[:, -1])
    optimizer = torch.optim.SGD(
        layer.parameters(),
        lr=lr,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        weight_decay=cfg.weight_decay,
    )
    steps = math.ceil(len(table[0]) / BATCH)
    for epoch in range(EPOCHS):
        for number, (inputs, labels) in enumerate(batches_of(table, epoch)):
            time = epoch + (number + 1) / steps
            warmup = cfg.warmup_epochs
            cosine = (1 + math.cos(math.pi * (time - warmup) / (EPOCHS - warmup))) / 2
            optimizer.param_groups[0]["lr"] = lr * (time / warmup if time <= warmup else cosine)
            optimizer.zero_grad()
            F.cross_entropy(layer(inputs), labels).backward()
            optimizer.step()
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_grid_trains_each_head_as_torch_would_alone(table: tuple[Tensor, Tensor], nesterov: bool) -> None:
    cfg = LinearConfig(epochs=EPOCHS, nesterov=nesterov, weight_decay=1e-3, warmup_epochs=1)
    lrs = torch.tensor([0.01, 0.3, 3.0])
    heads = Heads(cfg, lrs, 64, 10, torch.Generator().manual_seed(0))
    start = heads.weight[:, 0].clone()
    steps = math.ceil(len(table[0]) / BATCH)
    train(heads, lambda epoch: iter(inputs_of(table, epoch)), steps)
    for g, lr in enumerate(lrs.tolist()):
        torch.testing.assert_close(heads.weight[:, g], single_head(table, start, lr, cfg), rtol=1e-5, atol=1e-5)


def test_adam_at_a_constant_rate_is_torchs(table: tuple[Tensor, Tensor]) -> None:
    cfg = LinearConfig(optimizer="adam", schedule="constant", epochs=EPOCHS, weight_decay=1e-3)
    heads = Heads(cfg, torch.tensor([1e-3, 1e-2]), 64, 10, torch.Generator().manual_seed(0))
    layers = []
    for g, lr in enumerate((1e-3, 1e-2)):
        layer = nn.Linear(64, 10)
        with torch.no_grad():
            layer.weight.copy_(heads.weight[:, g, :-1])
            layer.bias.copy_(heads.weight[:, g, -1])
        optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=1e-3)
        for epoch in range(EPOCHS):
            for inputs, labels in batches_of(table, epoch):
                optimizer.zero_grad()
                F.cross_entropy(layer(inputs), labels).backward()
                optimizer.step()
        layers.append(torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1))
    steps = math.ceil(len(table[0]) / BATCH)
    train(heads, lambda epoch: iter(inputs_of(table, epoch)), steps)
    for g, expected in enumerate(layers):
        torch.testing.assert_close(heads.weight[:, g], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"advance": "epoch"}, [1.0, 1.0, 0.75, 0.75, 0.25, 0.25]),
        ({"schedule": "constant"}, [1.0] * 6),
        ({"schedule": "step", "milestones": (0.5, 0.8), "gamma": 0.1}, [1.0, 1.0, 1.0, 0.1, 0.1, 0.01]),
    ],
)
def test_rates_change_as_the_schedule_says(options: dict[str, Any], expected: list[float]) -> None:
    """Three epochs of two steps."""
    cfg = LinearConfig(epochs=3, momentum=0, **options)
    factors: list[float] = []

    class Noting(Heads):
        def step(self, inputs: Tensor, labels: Tensor, factor: float, losses: Tensor | None = None) -> None:
            factors.append(factor)

    heads = Noting(cfg, torch.tensor([0.1]), 2, 2, torch.Generator().manual_seed(0))
    rows = (with_ones(torch.eye(2)), torch.arange(2))
    train(heads, lambda _: iter([rows, rows]), 2)
    assert factors == pytest.approx(expected)


def test_heads_may_start_as_published_for_imagenet() -> None:
    heads = Heads(LinearConfig(init="normal"), torch.ones(2), 4096, 10, torch.Generator().manual_seed(0))
    weight, bias = heads.weight[..., :-1], heads.weight[..., -1]
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not bias.any()
    assert torch.equal(weight[:, 0], weight[:, 1])


def test_lars_scales_weight_and_bias_of_each_head_by_their_own_norms() -> None:
    cfg = LinearConfig(optimizer="lars", weight_decay=0.1, trust=1e-3)
    heads = Heads(cfg, torch.tensor([2.0, 4.0]), 4, 3, torch.Generator().manual_seed(3))
    before = heads.weight.clone()
    inputs, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(4)), torch.arange(8) % 3
    heads.step(with_ones(inputs), labels, factor=0.5)
    for g, lr in enumerate((2.0, 4.0)):
        layer = nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight.copy_(before[:, g, :-1])
            layer.bias.copy_(before[:, g, -1])
        F.cross_entropy(layer(inputs), labels).backward()
        for now, parameter in ((heads.weight[:, g, :-1], layer.weight), (heads.weight[:, g, -1], layer.bias)):
            assert parameter.grad is not None
            change = parameter.grad + 0.1 * parameter
            expected = parameter - 0.5 * lr * 1e-3 * parameter.norm() / change.norm() * change
            torch.testing.assert_close(now, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_best_head_is_the_most_accurate_and_of_equals_the_one_of_lowest_loss() -> None:
    top5 = torch.full((4,), 100.0)
    tied = Score(torch.tensor([50.0, 80.0, 80.0, 70.0]), top5, torch.tensor([0.1, 0.9, 0.7, 0.2]))
    assert tied.best() == 2


def test_random_features_are_far_above_chance_and_a_diverging_rate_is_not_chosen(tmp_path: Path) -> None:
    protocol = Linear(LinearConfig(epochs=20, lrs=(0.1, 3e38)))
    job = make_job(protocol, tmp_path)
    metrics = run_protocol(protocol, job)
    assert metrics["val_top1"] > 80
    assert metrics["val_top1"] <= metrics["val_top5"] <= 100
    assert metrics["lr"] == 0.1


def test_only_diverging_rates_are_an_error(tmp_path: Path) -> None:
    protocol = Linear(LinearConfig(epochs=2, lrs=(3e38,)))
    with pytest.raises(DivergedError, match="every learning rate"):
        run_protocol(protocol, make_job(protocol, tmp_path))


class ShuffledDigits(Digits):
    """Digits whose labels have nothing to do with the images."""

    def split(self, name: str) -> ArraySource:
        source = super().split(name)
        labels = source.targets
        assert labels is not None
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(11))
        return ArraySource(source.pixels(), labels[order])


def test_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    dataset = ShuffledDigits(Digits.Config())
    linear, final = Linear(LinearConfig(epochs=10)), HeldOutTest(HeldOutOptions())
    run_protocol(linear, make_job(linear, tmp_path, dataset=dataset))
    metrics = run_protocol(final, make_job(final, tmp_path, dataset=dataset))
    # 359 test images: chance is 10 % with a standard deviation of 1.6 points.
    assert metrics["top1"] == pytest.approx(10, abs=6.5)
    assert metrics["knn_top1"] == pytest.approx(10, abs=6.5)


def test_the_same_seed_gives_the_same_head_and_curves(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        points: list[tuple[int, dict[str, float]]] = []
        protocol = Linear(LinearConfig(epochs=4))
        job = make_job(protocol, tmp_path / name, log=lambda step, m, out=points: out.append((step, dict(m))))
        metrics = run_protocol(protocol, job)
        runs.append((metrics, points, torch.load(job.out_dir / "head.pt", weights_only=True)["weight"]))
    assert runs[0][:2] == runs[1][:2]
    assert torch.equal(runs[0][2], runs[1][2])
    assert [step for step, _ in runs[0][1]] == [1, 2, 3, 4]


def test_refit_uses_the_validation_images_for_the_saved_head(tmp_path: Path) -> None:
    heads = {}
    for refit in (True, False):
        protocol = Linear(LinearConfig(epochs=3, refit=refit))
        job = make_job(protocol, tmp_path / str(refit))
        run_protocol(protocol, job)
        heads[refit] = torch.load(job.out_dir / "head.pt", weights_only=True)
    assert heads[True]["trained_on"] == "trainval"
    assert heads[True]["lr"] == heads[False]["lr"]
    assert not torch.equal(heads[True]["mean"], heads[False]["mean"])
    assert heads[True]["classes"] == [str(digit) for digit in range(10)]


def test_augmented_training_streams_new_crops_every_epoch(tmp_path: Path) -> None:
    protocol = Linear(LinearConfig(epochs=3, augment="crop-flip", refit=False, lrs=(0.3,)))
    job = make_job(protocol, tmp_path, backbone=make_backbone(), dataset=make_dataset(), device=CPU)
    metrics = run_protocol(protocol, job)
    plain = Linear(LinearConfig(epochs=3, refit=False, lrs=(0.3,)))
    unaugmented = run_protocol(plain, make_job(plain, tmp_path / "plain"))
    # Mirrored digits are another problem: above chance, and harder than the plain images.
    assert 20 < metrics["val_top1"] < unaugmented["val_top1"]


def test_a_best_rate_at_the_edge_of_the_grid_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    protocol = Linear(LinearConfig(epochs=3, lrs=(1e-6, 1e-5, 1e-4), refit=False))
    job = make_job(protocol, tmp_path)
    run_protocol(protocol, job)
    report = json.loads((job.out_dir / "linear.json").read_text())
    assert report["at_edge_of_grid"]
    assert [row["lr"] for row in report["by_lr"]] == [1e-6, 1e-5, 1e-4]
    assert "edge of the grid" in caplog.text
