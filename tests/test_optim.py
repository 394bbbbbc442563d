"""Optimisers: grouping, LARS against a per-tensor reference, exact resumption."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn

from sslbench.config.schema import CoreOptions, OptimOptions
from sslbench.engine.optim import build_optimizer, set_learning_rate, set_weight_decay
from sslbench.engine.schedule import weight_decay
from sslbench.engine.shards import clip_gradients
from sslbench.engine.trained import Trained
from sslbench.errors import PluginError
from sslbench.plugin.api import Build
from sslbench.plugin.catalog import Catalog


class Vectors(nn.Module):
    """A module with one parameter per keyword."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def lars(**changes: object) -> OptimOptions:
    return OptimOptions(**{"name": "lars", "lr": 2.0, "weight_decay": 0.1, "exclude": "none", **changes})


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimizer, 0.1 / (step + 1), peak=0.1)
        optimizer.zero_grad()
        module(images).square().sum().backward()
        optimizer.step()


# ---------------------------------------------------------------- LARS


@pytest.mark.parametrize("norm", ["joint", "separate"])
def test_lars_golden_step(norm):
    module = Vectors(w=torch.ones(4))
    optimizer = build_optimizer(lars(lars_norm=norm), None, module, 256)
    module.w.grad = torch.ones(4)
    optimizer.step()
    trust_ratio = optimizer.state[module.w]["momentum_buffer"] / 1.1  # the buffer holds k * (g + wd * w)
    torch.testing.assert_close(trust_ratio, torch.full((4,), 9.0909e-4), rtol=1e-5, atol=0)
    torch.testing.assert_close(module.w.detach(), torch.full((4,), 0.998))


def test_lars_on_every_tensor_as_swav_trains():
    module = Vectors(w=torch.tensor([3.0, 4.0]), at_zero=torch.zeros(2), without_gradient=torch.ones(2))
    optimizer = build_optimizer(lars(lars_norm="separate", lr=0.3, weight_decay=1e-6), None, module, 256)
    module.w.grad = torch.tensor([0.6, -0.8])
    module.at_zero.grad = torch.tensor([0.6, -0.8])
    module.without_gradient.grad = torch.zeros(2)
    optimizer.step()
    scaled = optimizer.state[module.w]["momentum_buffer"]
    torch.testing.assert_close(scaled, torch.tensor([0.0030000, -0.0039999600]), rtol=1e-6, atol=0)
    torch.testing.assert_close(module.w.detach(), torch.tensor([2.9991, 4.0012]), rtol=1e-7, atol=0)
    torch.testing.assert_close(module.at_zero.detach(), torch.tensor([-0.18, 0.24]))
    assert torch.equal(module.without_gradient, torch.ones(2))


@pytest.mark.parametrize("norm", ["joint", "separate"])
def test_lars_decays_a_tensor_without_gradient_by_its_ratio_or_not_at_all(norm):
    """Never by all of wd*w, as torchlars does (0.8). By the joint norm, decay alone has the ratio trust/wd."""
    module = Vectors(w=torch.ones(4))
    optimizer = build_optimizer(lars(lars_norm=norm, weight_decay=0.1, lr=2.0, trust=1e-3), None, module, 256)
    module.w.grad = torch.zeros(4)
    optimizer.step()
    left = {"joint": 1 - 2 * 1e-3, "separate": 1.0}[norm]
    torch.testing.assert_close(module.w.detach(), torch.full((4,), left), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("rule", "moved"), [("lr", 2.0), ("lr-squared", 4.0)])
def test_excluded_parameters_take_plain_or_squared_steps(rule, moved):
    module = Vectors(bias=torch.ones(4))
    optimizer = build_optimizer(lars(exclude="1d", excluded_lr=rule), None, module, 256)
    module.bias.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(module.bias.detach(), torch.full((4,), 1 - moved))


class SlowLars:
    """The rule tensor by tensor, in float64."""

    def __init__(self, options: OptimOptions, module: nn.Module) -> None:
        self.options = options
        self.weights = {name: p.detach().double().clone() for name, p in module.named_parameters()}
        self.momenta = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        for name, gradient in gradients.items():
            update = self._update(self.weights[name], gradient.double(), lr)
            self.momenta[name] = self.options.momentum * self.momenta[name] + update
            if self.options.nesterov:
                self.weights[name] -= lr * (update + self.options.momentum * self.momenta[name])
            else:
                self.weights[name] -= lr * self.momenta[name]

    def _update(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        o = self.options
        if w.ndim <= 1:
            return g * (lr if o.excluded_lr == "lr-squared" else 1.0)
        decayed = g + o.weight_decay * w
        if o.lars_norm == "joint":
            measured = denominator = decayed.norm()
        else:
            measured = g.norm()
            denominator = measured + o.weight_decay * w.norm() + 1e-8
        adaptable = w.norm() > 0 and measured > 0
        return decayed * (o.trust * w.norm() / denominator) if adaptable else g


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("excluded_lr", ["lr", "lr-squared"])
@pytest.mark.parametrize("norm", ["joint", "separate"])
def test_lars_matches_the_slow_reference(norm, excluded_lr, nesterov):
    options = lars(
        exclude="1d", lars_norm=norm, excluded_lr=excluded_lr, nesterov=nesterov, weight_decay=1e-2, trust=0.02
    )
    torch.manual_seed(0)
    module = Vectors(a=torch.randn(5, 7), b=torch.randn(3, 2, 3, 3), zero=torch.zeros(2, 2), bias=torch.randn(6))
    reference = SlowLars(options, module)
    optimizer = build_optimizer(options, None, module, 256)
    for step in range(12):
        lr = 0.3 / (step + 1)
        gradients = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        if step == 4:
            gradients["a"].zero_()
        for name, p in module.named_parameters():
            p.grad = gradients[name]
        set_learning_rate(optimizer, lr, peak=0.3)
        optimizer.step()
        reference.step(gradients, lr)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach().double(), reference.weights[name], rtol=1e-5, atol=1e-6)


def test_lars_does_not_depend_on_the_gradient_scale():
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 5), torch.randn(6, 5)
    ends = []
    for scale in (1.0, 1000.0):
        module = Vectors(w=start)
        optimizer = build_optimizer(lars(weight_decay=0.0), None, module, 256)
        module.w.grad = gradient * scale
        optimizer.step()
        ends.append(module.w.detach())
    torch.testing.assert_close(*ends)
    assert not torch.equal(ends[0], start)


def test_lars_leaves_parameters_without_gradient_alone():
    module = Vectors(used=torch.ones(2, 2), unused=torch.ones(2, 2))
    optimizer = build_optimizer(lars(), None, module, 256)
    module.used.grad = torch.ones(2, 2)
    optimizer.step()
    assert (module.unused == 1).all()
    assert (module.used != 1).all()


def test_lars_never_reads_a_value_back_from_the_device():
    """Meta tensors have no values, so anything that synchronises fails on them."""
    module = Vectors(w=torch.ones(2, 2, device="meta"), bias=torch.ones(3, device="meta"))
    for norm in ("joint", "separate"):
        optimizer = build_optimizer(lars(exclude="1d", lars_norm=norm, nesterov=True), None, module, 256)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "adam"])
def test_a_parameter_may_get_its_first_gradient_late(name):
    module = Vectors(used=torch.ones(2, 2), late=torch.ones(2, 2))
    optimizer = build_optimizer(OptimOptions(name=name), None, module, 256)
    for late in (None, None, torch.ones(2, 2)):
        module.used.grad, module.late.grad = torch.ones(2, 2), late
        assert (module.late == 1).all()
        optimizer.step()
    assert (module.late != 1).all()


# ---------------------------------------------------------------- grouping


def heads() -> tuple[nn.Module, nn.Module, nn.Module]:
    def mlp(inputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 256, bias=False)
        )

    return mlp(2048), mlp(256), nn.Linear(2048, 1000)


@pytest.mark.parametrize(
    ("resnet", "excluded", "adapted"),
    [("resnet50", (106, 66_600), (65, 37_049_344)), ("resnet101", (208, 118_824), (116, 55_989_248))],
)
def test_name_rule_reproduces_the_published_split(resnet, excluded, adapted):
    """SCRL's encoder is a plain list of layers, so its stem and down-sampling BN scales escape the rule."""
    with torch.device("meta"):
        layers = list(getattr(torchvision.models, resnet)(weights=None).children())[:-1]
        projector, predictor, probe = heads()
        module = nn.ModuleDict({"encoder": nn.Sequential(*layers), "projector": projector})
        module.update({"predictor": predictor, "probe": probe})
    optimizer = build_optimizer(lars(exclude="bn-bias-names"), None, module, 8192)
    sizes = {g["adapt"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in optimizer.param_groups}
    assert sizes == {False: excluded, True: adapted}


def test_name_rule_gives_our_scrl_the_published_split():
    """Without the probe, which is no part of our optimiser: its weight was adapted, its bias excluded."""
    backbone = Catalog().load("backbone", "resnet50")
    method = Catalog().load("method", "scrl")
    with torch.device("meta"):
        build = Build(lambda: backbone(backbone.Config(), 224), 8192, 1_281_167, 31_400, 157)
        module = method(method.Config(), build)
    optimizer = build_optimizer(lars(exclude="bn-bias-names"), module.param_groups(), module, 8192)
    sizes = {g["adapt"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in optimizer.param_groups}
    assert sizes == {False: (106 - 1, 66_600 - 1000), True: (65 - 1, 37_049_344 - 2048 * 1000)}


def test_vectors_are_excluded_by_default():
    module = network()
    decay, free = build_optimizer(OptimOptions(name="sgd", weight_decay=0.3), None, module, 256).param_groups
    assert decay["param_names"] == ["0.weight", "5.weight"]
    assert free["param_names"] == ["1.weight", "1.bias", "5.bias"]
    assert (decay["weight_decay"], free["weight_decay"]) == (0.3, 0.0)


def test_no_exclusion_makes_one_group():
    (group,) = build_optimizer(OptimOptions(exclude="none"), None, network(), 256).param_groups
    assert len(group["params"]) == 5


def test_groups_of_a_method_keep_their_scale_and_overrides():
    module = network()
    named = list(module.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr_scale": 10.0, "weight_decay": 0.5}]
    options = OptimOptions(lr=0.2, lr_per=256, weight_decay=0.1)
    optimizer = build_optimizer(options, groups, module, 512)
    facts = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert facts == [(0.4, 0.1, 1), (0.4, 0.0, 2), (4.0, 0.5, 1), (4.0, 0.0, 1)]
    set_learning_rate(optimizer, 0.01, peak=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01, 0.1, 0.1]


def test_a_group_with_a_constant_schedule_keeps_the_peak_rate():
    module = network()
    named = list(module.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr_scale": 2.0, "schedule": "constant"}]
    optimizer = build_optimizer(OptimOptions(name="sgd", lr=0.1), groups, module, 256)
    for lr, peak in ((0.1, 0.1), (0.001, 0.1), (0.0005, 0.05)):  # the last one after a roll-back at half the rate
        set_learning_rate(optimizer, lr, peak)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr, 2 * peak, 2 * peak]


def test_a_constant_schedule_survives_resuming():
    module = network()
    groups = [{"params": list(module.named_parameters()), "schedule": "constant"}]
    optimizer, again = (build_optimizer(OptimOptions(name="sgd", lr=0.1), groups, module, 256) for _ in range(2))
    again.load_state_dict(optimizer.state_dict())
    set_learning_rate(again, 0.01, peak=0.1)
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.1]


def test_an_unknown_schedule_of_a_group_is_refused():
    module = network()
    with pytest.raises(PluginError, match="a group with schedule 'cosine'"):
        build_optimizer(
            OptimOptions(), [{"params": list(module.named_parameters()), "schedule": "cosine"}], module, 8
        )


def test_clipped_lars_takes_the_ratio_for_a_rate_of_at_most_lr():
    module = Vectors(near=torch.ones(4), far=torch.full((4,), 100.0))
    optimizer = build_optimizer(lars(lars_clip=True, lr=0.5, weight_decay=0, trust=0.02), None, module, 256)
    module.near.grad, module.far.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(module.near.detach(), torch.full((4,), 0.98))  # 0.02 * |w| / |g|
    torch.testing.assert_close(module.far.detach(), torch.full((4,), 99.5))  # 2, more than lr
    with pytest.raises(ValidationError, match="lars_clip exists for name 'lars' only"):
        OptimOptions(name="sgd", lars_clip=True)


def test_weight_decay_follows_a_cosine_where_the_options_rule_it():
    """DINO's 0.04 to 0.4; neither excluded parameters nor groups with a decay of their own take part."""
    options = OptimOptions(weight_decay=0.04, final_weight_decay=0.4)
    decays = [weight_decay(options, step, 100) for step in (0, 25, 50, 75, 100)]
    assert decays == pytest.approx([0.04, 0.0927208, 0.22, 0.3472792, 0.4])
    module = network()
    named = list(module.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "weight_decay": 0.5}]
    optimizer = build_optimizer(options, groups, module, 4)
    set_weight_decay(optimizer, 0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0, 0.5, 0.0]


def test_weight_decay_stays_unless_told_otherwise():
    optimizer = build_optimizer(OptimOptions(weight_decay=0.1), None, network(), 4)
    set_weight_decay(optimizer, weight_decay(OptimOptions(weight_decay=0.1), 50, 100))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert weight_decay(OptimOptions(weight_decay=0.1), 50, 100) == 0.1


def test_each_gradient_is_clipped_by_itself():
    """Of norms 5 and 1 with a limit of 2, the first becomes 2 and the second stays; else they share a factor."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    for each in (True, False):
        first.grad, second.grad = torch.tensor([3.0, -4.0]), torch.tensor([1.0])
        clip_gradients([first, second], 2.0, each=each)
        lengths = [first.grad.norm().item(), second.grad.norm().item()]
        factor = 2 / math.sqrt(26)
        assert lengths == pytest.approx([2, 1] if each else [5 * factor, factor], rel=1e-5)


def test_frozen_parameters_are_left_out():
    module = network()
    module[0].requires_grad_(False)
    optimizer = build_optimizer(OptimOptions(), None, module, 256)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


def test_a_forgotten_parameter_is_named():
    module = network()
    groups = [{"params": list(module.named_parameters())[1:]}]
    with pytest.raises(PluginError, match=r"leaves out trainable parameters: 0\.weight$"):
        build_optimizer(OptimOptions(), groups, module, 256)


def test_a_parameter_in_two_groups_is_refused():
    module = network()
    groups = [{"params": list(module.named_parameters())}, {"params": [("again", module[0].weight)]}]
    with pytest.raises(PluginError, match="more than once"):
        build_optimizer(OptimOptions(), groups, module, 256)


# ---------------------------------------------------------------- torch's optimisers, resumption


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (
            OptimOptions(name="sgd", momentum=0.8, nesterov=True, weight_decay=0.1, exclude="none"),
            lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.8, nesterov=True, weight_decay=0.1),
        ),
        (
            OptimOptions(name="adam", betas=(0.8, 0.9), weight_decay=0.1, exclude="none"),
            lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.8, 0.9), weight_decay=0.1),
        ),
        (
            OptimOptions(name="adamw", betas=(0.8, 0.9), weight_decay=0.1, exclude="none"),
            lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.8, 0.9), weight_decay=0.1),
        ),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_options_reach_torchs_optimisers(options, reference):
    ours, theirs = network(), network()
    train(ours, build_optimizer(options, None, ours, 4), range(5))
    plain = reference(theirs.parameters())
    plain.param_groups[0]["lr_scale"] = 1.0
    train(theirs, plain, range(5))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_nesterov_needs_momentum(name):
    with pytest.raises(ValidationError, match="nesterov needs"):
        CoreOptions(optim=OptimOptions(name=name, nesterov=True, momentum=0.0))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "adam"])
def test_resuming_from_a_saved_state_is_bit_identical(name):
    options = OptimOptions(name=name, lr=0.1)
    whole = network()
    train(whole, build_optimizer(options, None, whole, 4), range(6))

    first = network()
    optimizer = build_optimizer(options, None, first, 4)
    train(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"module": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = network(seed=9)
    optimizer = build_optimizer(options, None, resumed, 4)
    resumed.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 6))
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_checkpoint_from_before_a_setting_goes_on_with_todays():
    module = network()
    trained = Trained(module, build_optimizer(lars(lars_clip=True), None, module, 256))
    state = trained.state()
    for group in state["optimizer"]["param_groups"]:
        del group["clip"]
    trained.load(state)
    assert all(group["clip"] for group in trained.optimizer.param_groups)
    train(module, trained.optimizer, range(1))
