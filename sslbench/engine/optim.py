"""Optimisers: parameter grouping, LARS, and torch's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslbench.config.schema import OptimOptions
from sslbench.engine.schedule import peak_lr
from sslbench.engine.shards import norms
from sslbench.engine.untraced import SGD, Adam, AdamW, Untraced
from sslbench.errors import PluginError

NamedParameters = list[tuple[str, nn.Parameter]]


_STEM_SCALE = re.compile(r"(^|\.)backbone\.bn1\.weight$")


def build_optimizer(
    options: OptimOptions,
    groups: Sequence[Mapping[str, Any]] | None,
    module: nn.Module,
    batch_size: int,
) -> Optimizer:
    """The optimiser of a run.

    Args:
        options: its options.
        groups: what ``Method.param_groups`` returned: ``{"params": [(name, parameter)], "lr_scale": 1.0, ...}``,
            where ``"schedule": "constant"`` keeps a group at the peak rate, and further keys (such as
            ``weight_decay``) override the options; None: all of ``module``.
        module: the method.
        batch_size: images in the global batch, for linear scaling.

    Raises:
        PluginError: a trainable parameter of ``module`` is in no group or in several, or a schedule is unknown.
    """
    if groups is None:
        groups = [{"params": list(module.named_parameters())}]
    _check_coverage(groups, module)
    _check_schedules(groups, module)
    peak = peak_lr(options, batch_size)
    split = [part for group in groups for part in _split_group(options, group, peak)]
    if options.name == "lars":
        return Lars(
            split,
            lr=peak,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
            trust=options.trust,
            joint_norm=options.lars_norm == "joint",
            squared_lr=options.excluded_lr == "lr-squared",
            clip=options.lars_clip,
        )
    if options.name == "sgd":
        # Not fused: that fails when a parameter gets its first gradient after others have momentum.
        return SGD(split, lr=peak, momentum=options.momentum, nesterov=options.nesterov, foreach=True)
    adam = AdamW if options.name == "adamw" else Adam
    return adam(split, lr=peak, betas=options.betas, fused=True)


def set_learning_rate(optimizer: Optimizer, lr: float, peak: float) -> None:
    """Set the learning rate of every group to ``lr`` times the group's ``lr_scale``.

    Args:
        lr: what the schedule says for this step.
        peak: of the schedule, which groups with ``"schedule": "constant"`` have in every step instead.
    """
    for group in optimizer.param_groups:
        constant = group.get("schedule") == "constant"
        group["lr"] = (peak if constant else lr) * group["lr_scale"]


def set_weight_decay(optimizer: Optimizer, decay: float) -> None:
    """Set the weight decay of every group that follows the options, which excluded parameters do not."""
    for group in optimizer.param_groups:
        if group.get("follows_decay"):
            group["weight_decay"] = decay


def is_excluded(rule: str, name: str, parameter: Tensor) -> bool:
    """Whether a parameter has neither weight decay nor LARS scaling under ``OptimOptions.exclude``."""
    if rule == "1d":
        return parameter.ndim <= 1
    if rule == "bn-bias-names":
        # In the authors' sequential encoder the stem's scale is called 1.weight, so the rule missed it.
        return ("bn" in name or "bias" in name) and not _STEM_SCALE.search(name)
    return False


def _split_group(options: OptimOptions, group: Mapping[str, Any], peak: float) -> list[dict[str, Any]]:
    """A method's group as one group with weight decay and one of excluded parameters, without empty ones."""
    trainable = [(name, p) for name, p in group["params"] if p.requires_grad]
    excluded = [(name, p) for name, p in trainable if is_excluded(options.exclude, name, p)]
    names = {name for name, _ in excluded}
    decayed = [(name, p) for name, p in trainable if name not in names]
    scale = group.get("lr_scale", 1.0)
    common = {"weight_decay": options.weight_decay, **group, "lr_scale": scale, "lr": peak * scale}
    # The key exists in runs with such a schedule only: states of optimisers that were saved before lack it.
    scheduled = options.final_weight_decay is not None and "weight_decay" not in group
    parts = [
        {**common, "params": decayed, "adapt": True, **({"follows_decay": True} if scheduled else {})},
        {**common, "params": excluded, "adapt": False, "weight_decay": 0.0},
    ]
    return [part for part in parts if part["params"]]


def _check_coverage(groups: Iterable[Mapping[str, Any]], module: nn.Module) -> None:
    """A parameter that no group holds would silently stay at its initial value."""
    held = [id(p) for group in groups for _, p in group["params"]]
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in set(held)]
    if missing:
        raise PluginError(
            f"param_groups() of {type(module).__name__} leaves out trainable parameters: {_shorten(missing)}",
            hint="add them to a group, or call requires_grad_(False) on those that must not train",
        )
    if len(set(held)) < len(held):
        raise PluginError(
            f"param_groups() of {type(module).__name__} names a parameter more than once",
            hint="give each parameter to one group; named_parameters() lists each once",
        )


def _check_schedules(groups: Iterable[Mapping[str, Any]], module: nn.Module) -> None:
    for group in groups:
        if group.get("schedule", "constant") != "constant":
            raise PluginError(
                f"param_groups() of {type(module).__name__} has a group with schedule {group['schedule']!r}",
                hint="the only one is 'constant'; a group without it follows optim.schedule",
            )


def _shorten(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class Lars(Untraced):
    """Layer-wise adaptive rate scaling around momentum SGD (You, Gitman & Ginsburg, 2017).

    Each tensor's gradient, weight decay included, is scaled by ``trust * |w| / norm`` and then goes into momentum
    SGD, so that the learning rate stays outside the momentum buffer. Groups with ``adapt: False`` are plain
    momentum SGD. A step launches a few kernels per group and never waits for the device.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate.
        momentum: momentum without dampening.
        nesterov: Nesterov's momentum.
        weight_decay: L2 coefficient of adapted groups.
        trust: trust coefficient (eta).
        joint_norm: True: ``norm = |g + wd*w|`` (BYOL, Grill et al., 2020); False: ``|g| + wd*|w| + 1e-8``
            (the paper; torchlars).
        squared_lr: multiply the gradient of groups with ``adapt: False`` by the learning rate once more.
        clip: take the ratio of norms for a learning rate of its own, at most ``lr``, instead of a factor on it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        joint_norm: bool = True,
        squared_lr: bool = False,
        clip: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_scale": 1.0,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "trust": trust,
            "joint_norm": joint_norm,
            "squared_lr": squared_lr,
            "clip": clip,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        gradients = [p.grad for p in weights]
        updates = _adapted(weights, gradients, group) if group["adapt"] else _plain(weights, gradients, group)
        momenta = [self._momentum(p) for p in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        if group["nesterov"]:
            torch._foreach_add_(updates, momenta, alpha=group["momentum"])
        torch._foreach_add_(weights, updates if group["nesterov"] else momenta, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _plain(weights: list[Tensor], gradients: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """Gradients with weight decay (0 unless a method sets it), perhaps times the learning rate."""
    updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    if group["squared_lr"]:
        torch._foreach_mul_(updates, group["lr"])
    return updates


def _adapted(weights: list[Tensor], gradients: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """Gradients with weight decay, each tensor times its trust ratio."""
    decay = group["weight_decay"]
    updates = list(torch._foreach_add(gradients, weights, alpha=decay))
    weight_norms = norms(weights, weights)
    if group["joint_norm"]:
        measured = denominators = norms(updates, weights)
    else:
        measured = norms(gradients, weights)
        denominators = measured + decay * weight_norms + 1e-8
    ratios = group["trust"] * weight_norms / denominators
    if group["clip"]:
        ratios = (ratios / group["lr"]).clamp(max=1.0) if group["lr"] > 0 else torch.ones_like(ratios)
    # A tensor at zero takes an unscaled step, otherwise it could never leave zero.
    ratios = torch.where(weight_norms > 0, ratios, 1.0)
    # One without gradient is not decayed either: SwAV's program adapts and decays together or not at all.
    # torchlars, and so SCRL's, would decay it by wd*w without the ratio.
    ratios = torch.where(measured > 0, ratios, 0.0)
    torch._foreach_mul_(updates, list(ratios.unbind()))
    return updates
