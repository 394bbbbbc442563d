"""What every built-in method must do, on a tiny backbone."""

from __future__ import annotations

import copy

import pytest
import torch
from methods_kit import batch, build, make
from pydantic import ValidationError
from sslbench_plugins.methods import (
    barlow,
    byol,
    nnclr,
    random,
    relationnet,
    rotationnet,
    scrl,
    simclr,
    simsiam,
    supervised,
    vicreg,
)

from sslbench.errors import ConfigError, PluginError
from sslbench.nn.bootstrap import BootstrapConfig
from sslbench.plugin.api import Method, Progress

TRAINED = [
    simclr.SimCLR,
    byol.BYOL,
    scrl.SCRL,
    supervised.Supervised,
    relationnet.RelationNet,
    rotationnet.RotationNet,
    barlow.BarlowTwins,
    vicreg.VICReg,
    simsiam.SimSiam,
    nnclr.NNCLR,
]
BOOTSTRAPPED = [byol.BYOL, scrl.SCRL]


def trainable(method: Method) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}


def train(method: Method, steps: int, start: int = 0, lr: float = 3e-3, fixed: bool = False) -> list[float]:
    """Adam steps; the losses."""
    optimizer = torch.optim.Adam(trainable(method).values(), lr=lr)
    losses = []
    for step in range(start, start + steps):
        loss = method(batch(seed=0 if fixed else step, step=0 if fixed else step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        method.before_step(Progress(step, 50, 10))
        optimizer.step()
        method.after_step(Progress(step, 50, 10))
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("cls", TRAINED)
def test_loss_is_a_finite_fp32_scalar_and_reaches_every_trainable_parameter(cls) -> None:
    method = make(cls)
    loss = method(batch())["loss"]
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert torch.isfinite(loss)
    loss.backward()
    for name, parameter in trainable(method).items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("cls", TRAINED)
def test_loss_is_fp32_under_autocast(cls) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make(cls)(batch())["loss"]
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize("cls", TRAINED)
def test_same_seed_same_loss(cls) -> None:
    first, again, other = (make(cls, seed)(batch())["loss"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("cls", TRAINED)
def test_state_dict_round_trip_continues_identically(cls) -> None:
    first = make(cls)
    train(first, 2)
    second = make(cls, seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(first, 3, start=2) == train(second, 3, start=2)


@pytest.mark.parametrize("cls", TRAINED)
def test_loss_falls_on_a_fixed_batch(cls) -> None:
    losses = train(make(cls), 20, fixed=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("cls", TRAINED)
def test_exports_its_online_backbone(cls) -> None:
    method = make(cls)
    assert all(parameter.requires_grad for parameter in method.export().parameters())


@pytest.mark.parametrize("cls", BOOTSTRAPPED)
def test_target_gets_no_gradient_and_follows_the_online_network(cls) -> None:
    method = make(cls, momentum=0.5)
    method(batch())["loss"].backward()
    target, online = method.target_projector.module[0], method.projector[0]
    assert target.weight.grad is None
    expected = 0.5 * target.weight + 0.5 * online.weight
    method.after_step(Progress(0, 50, 10))
    torch.testing.assert_close(target.weight, expected.detach())


@pytest.mark.parametrize("cls", BOOTSTRAPPED)
@pytest.mark.parametrize(("init", "same"), [("independent", False), ("copy", True)])
def test_target_initialisation(cls, init, same) -> None:
    method = make(cls, target_init=init)
    for online, target in [
        (method.backbone, method.target_backbone.module),
        (method.projector, method.target_projector.module),
    ]:
        weights = zip(online.parameters(), target.parameters(), strict=True)
        matrices = [(a, b) for a, b in weights if a.ndim > 1]
        assert all(torch.equal(a, b) is same for a, b in matrices)


@pytest.mark.parametrize("cls", BOOTSTRAPPED)
def test_heads_follow_the_width_of_the_backbone(cls) -> None:
    assert make(cls).projector[0].out_features == 512
    assert make(cls, hidden=64).predictor[0].out_features == 64


def test_byol_loss_is_the_symmetric_distance_of_predictions_and_targets() -> None:
    method = make(byol.BYOL).eval()
    data = batch()
    p1, p2 = (method.predictor(method.projector(method.backbone(v.images).pooled)) for v in data.views)
    t1, t2 = (method.target_projector(method.target_backbone(v.images).pooled) for v in data.views)
    cosine = torch.nn.functional.cosine_similarity
    expected = (4 - 2 * cosine(p1, t2) - 2 * cosine(p2, t1)).mean()
    torch.testing.assert_close(method(data)["loss"], expected)


@pytest.mark.parametrize(
    "config",
    [
        simclr.SimCLRConfig,
        BootstrapConfig,
        barlow.BarlowTwinsConfig,
        vicreg.VICRegConfig,
        simsiam.SimSiamConfig,
        nnclr.NNCLRConfig,
    ],
)
@pytest.mark.parametrize("views", [[{}], [{"count": 3}], [{"size": 32}, {"size": 64}]])
def test_wrong_views_are_refused(config, views) -> None:
    with pytest.raises(ValidationError, match="two views of one size"):
        config(views=views)


def test_simclr_variants_differ() -> None:
    mean_log = make(simclr.SimCLR)(batch())["loss"]
    log_mean = make(simclr.SimCLR, loss="log-mean")(batch())["loss"]
    assert float(log_mean.detach()) < float(mean_log.detach())  # Jensen


def test_supervised_reports_top1_in_percent_and_needs_labels() -> None:
    assert 0 <= float(make(supervised.Supervised)(batch())["top1"]) <= 100
    with pytest.raises(ConfigError, match="labels"):
        supervised.Supervised(supervised.SupervisedConfig(), build(num_classes=None))


def test_supervised_top1_is_100_when_it_is_right() -> None:
    method = make(supervised.Supervised)
    data = batch()
    data.labels = method.classifier(method.backbone(data.views[0].images).pooled).argmax(dim=1)
    assert float(method(data)["top1"]) == 100


def test_random_only_provides_weights() -> None:
    method = make(random.Random)
    assert not method.trains
    assert method.export() is method.backbone
    with pytest.raises(PluginError, match="nothing to train"):
        method(batch())


@pytest.mark.parametrize(
    "module",
    [barlow, byol, nnclr, random, relationnet, rotationnet, scrl, simclr, simsiam, supervised, vicreg],
)
def test_plugin_modules_offer_the_method_they_are_named_after(module) -> None:
    (cls,) = module.sslbench_methods()
    assert cls.name == module.__name__.rsplit(".", 1)[1]
    assert module.__doc__.splitlines()[0].endswith(".")
