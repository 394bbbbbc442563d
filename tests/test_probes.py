"""Online probes leave training bit-identical and say when a representation collapses."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from evals_kit import CPU, make_backbone, make_dataset
from sklearn.linear_model import Ridge
from sslbench_plugins.backbones.conv4 import Conv4
from sslbench_plugins.backbones.resnet_small import ResNet8
from sslbench_plugins.datasets.digits import Digits
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.config.options import Options
from sslbench.config.schema import DataOptions, ProbeOptions
from sslbench.evaluation.classifiers import ridge_head
from sslbench.evaluation.probes import OnlineProbes, collapse_warning
from sslbench.plugin.api import Backbone, Dataset, DatasetInfo, Features, Source


def make_probes(backbone: Callable[[], Backbone], dataset: Dataset | None = None, **options: Any) -> OnlineProbes:
    return OnlineProbes(
        backbone,
        dataset or make_dataset(),
        ProbeOptions(images=options.pop("images", 400), **options),
        DataOptions(),
        seed=1,
        image_size=16,
        device=CPU,
    )


def train_a_little(probe: bool, every: int = 3) -> dict[str, Tensor]:
    """Ten steps of supervised training whose dropout uses the global generator; all state at the end."""
    torch.manual_seed(7)
    backbone = ResNet8(Options(), image_size=16)
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(backbone.dim, 10))
    first_bn = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    first_bn.eval()  # a submodule frozen on purpose must stay frozen
    optimizer = torch.optim.SGD([*backbone.parameters(), *model.parameters()], lr=0.05, momentum=0.9)
    probes = make_probes(lambda: backbone, images=100)
    pixels, labels = make_dataset().split("train").pixels(), make_dataset().split("train").targets
    assert pixels is not None
    assert labels is not None
    for step in range(10):
        if probe and step % every == 0:
            probes.run(step)
        rows = torch.randint(len(pixels), (32,))
        loss = F.cross_entropy(model(backbone(pixels[rows].float() / 255).pooled), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [module.training for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)].count(
        False
    ) == 1
    gradients = {f"grad/{name}": p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    randomness = {"torch": torch.get_rng_state(), "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64))}
    return {**backbone.state_dict(), **model.state_dict(prefix="head."), **gradients, **randomness}


def test_probing_leaves_training_bit_identical() -> None:
    python_state = random.getstate()
    with_probe, without = train_a_little(True), train_a_little(False)
    assert random.getstate() == python_state
    assert with_probe.keys() == without.keys()
    different = [name for name, value in with_probe.items() if not torch.equal(value, without[name])]
    assert not different


def test_a_probe_itself_touches_nothing() -> None:
    backbone = make_backbone().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    generator = torch.get_rng_state()
    probes = make_probes(lambda: backbone)
    first, second = probes.run(1), probes.run(2)
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(module.training for module in backbone.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_probes_see_more_than_chance_and_follow_the_weights() -> None:
    holder = [make_backbone()]
    probes = make_probes(lambda: holder[0])
    random_weights = probes.run(0)
    assert random_weights["probe/knn_top1"] > 60
    assert random_weights["probe/linear_top1"] > 60
    assert collapse_warning(random_weights, 64) is None
    assert make_probes(lambda: holder[0], knn=False).run(0).keys() == random_weights.keys() - {"probe/knn_top1"}
    with torch.no_grad():
        for parameter in holder[0].parameters():
            parameter.zero_()
    collapsed = probes.run(1)
    assert collapsed["probe/feature_std"] == 0
    assert "collapsed" in (collapse_warning(collapsed, 64) or "")


class OneDirection(Conv4):
    """Features that vary in a single direction."""

    def forward(self, images: Tensor) -> Features:
        pooled, feature_map = super().forward(images)[:2]
        return Features(pooled[:, :1] * torch.linspace(1, 2, 64) + torch.linspace(2, 1, 64), feature_map)


def test_dimensional_collapse_and_broken_numbers_are_named() -> None:
    line = make_probes(lambda: OneDirection(Options(), image_size=16)).run(0)
    assert line["probe/effective_rank"] == pytest.approx(1, abs=0.05)
    # Points on a line have few directions too: raise the spread to see the rank alone.
    assert "1.0 of 64 dimensions" in (collapse_warning({**line, "probe/feature_std": 0.5}, 64) or "")
    broken = Conv4(Options(), image_size=16)
    broken.block1.conv.weight.data.fill_(float("nan"))
    values = make_probes(lambda: broken).run(0)
    assert "probe/knn_top1" not in values
    assert "no longer finite" in (collapse_warning(values, 64) or "")


class UnlabelledDigits(Digits):
    """The images alone."""

    @property
    def info(self) -> DatasetInfo:
        known = super().info
        return DatasetInfo((), known.size, known.mean, known.std, ("train",), task="unlabelled")

    def split(self, name: str) -> Source:
        source = super().split(name)
        source._targets = None
        return source


def test_without_labels_only_spread_and_rank_are_measured() -> None:
    backbone = make_backbone()
    values = make_probes(lambda: backbone, UnlabelledDigits(Digits.Config())).run(0)
    assert values.keys() == {"probe/feature_std", "probe/effective_rank"}


def test_ridge_regression_equals_the_normal_equations_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, generator=generator) * torch.arange(1, 13) + 3
    labels = torch.randint(4, (200,), generator=generator)
    head = ridge_head(features, labels, 4, strength=0.05)
    inputs = head.scaling(features).double().numpy()
    reference = Ridge(alpha=0.05 * 200).fit(inputs, F.one_hot(labels, 4).numpy())
    expected = torch.from_numpy(reference.predict(inputs)).float()
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)
