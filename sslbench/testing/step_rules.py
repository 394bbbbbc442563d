"""Rules on a single step of a method: loss, gradients, views, and what must not train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sslbench.config.schema import CoreOptions
from sslbench.config.validate import validate_section
from sslbench.errors import ConfigError
from sslbench.plugin.api import Backbone, Method, ViewSpec
from sslbench.testing.rules import BrokenRuleError, NotTriedError
from sslbench.testing.subject import STEPS, MethodSubject, check_reports, checked_loss, first_batch
from sslbench.testing.trial import Training

_SMALL_CROPS = ViewSpec(count=2, size=16, scale=(0.05, 0.3))
_PARALLEL = 0.999
"""Cosine from which a change counts as a step towards other weights."""


def can_be_built(subject: MethodSubject) -> str:
    """With a backbone that evaluations can use."""
    if not (isinstance(subject.cls, type) and issubclass(subject.cls, Method)):
        raise BrokenRuleError(f"{subject.cls!r} is no Method", "derive it from sslbench.plugin.api.Method")
    _check_defaults(subject.cls)
    method = subject.training().method
    if not isinstance(getattr(method, "backbone", None), Backbone):
        raise BrokenRuleError(
            "the method has no attribute 'backbone' that is a Backbone", "self.backbone = build.backbone()"
        )
    if not isinstance(method.export(), Backbone):
        raise BrokenRuleError("export() returns no Backbone", "return the network that evaluations are to use")
    if subject.cls.trains and not subject.cfg.views:
        raise BrokenRuleError("it declares no views", "give Config a default: views = (ViewSpec(count=2),)")
    views = sum(spec.count for spec in subject.cfg.views)
    return f"{views} view{'s' * (views != 1)}, {_numbers(method.parameters())}"


def _check_defaults(cls: type[Method]) -> None:
    unknown = [key for key in cls.defaults if key not in CoreOptions.model_fields]
    if unknown:
        raise BrokenRuleError(
            f"its defaults have {', '.join(unknown)}, which no core option begins with",
            f"they begin with {', '.join(CoreOptions.model_fields)}; the method's own options belong into Config",
        )
    validate_section(CoreOptions, dict(cls.defaults), "", "defaults of the method")


def loss_is_a_float32_scalar(subject: MethodSubject) -> str:
    """And all else that is returned is a scalar that can be logged."""
    output = subject.output
    loss = checked_loss(output)
    check_reports(output)
    if not loss.requires_grad:
        raise BrokenRuleError("no gradient can come from the loss: it is cut from all that trains", _CUT)
    further = [key for key in output if key != "loss"]
    return f"{float(loss.detach()):.4g}" + (f", beside {', '.join(further)}" if further else "")


_CUT = "leave .detach(), .item() and torch.no_grad() to targets; the loss itself must not pass through them"


def loss_and_gradients_are_finite(subject: MethodSubject) -> str:
    subject.returns_a_loss()
    if not subject.output["loss"].requires_grad:
        raise NotTriedError("the loss must have a gradient first")
    training = subject.training()
    for step, batch in enumerate(training.loader.batches(0, STEPS)):
        training.begin(step)
        check_finite(training.gradients(step, batch)["loss"], training.method, f" in step {step + 1}")
        training.update(step)
    return f"in {STEPS} steps"


def check_finite(loss: Tensor, method: nn.Module, when: str = "") -> None:
    """
    Raises:
        BrokenRuleError: the loss or a gradient is not finite.
    """
    if not loss.isfinite():
        raise BrokenRuleError(
            f"the loss is {float(loss.detach())}{when}",
            "add a small number under roots, logarithms and divisions; normalise with F.normalize",
        )
    bad = [n for n, p in method.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if bad:
        raise BrokenRuleError(
            f"gradients that are not finite{when}: {listed(bad)}",
            "a root or norm at zero has an infinite gradient, also in the branch that torch.where does not take: "
            "add a small number under it",
        )


def accepted_views_work(subject: MethodSubject) -> str:
    """A layout is refused as an option or it works."""
    subject.sound()
    worked: list[str] = []
    refused: list[str] = []
    for name, views in _layouts(subject.cfg.views):
        (worked if _works(subject, name, views) else refused).append(name)
    parts = [", ".join(["as declared", *worked])] + ([f"refused: {', '.join(refused)}"] if refused else [])
    return "; ".join(parts)


def _layouts(views: Sequence[ViewSpec]) -> Iterator[tuple[str, tuple[ViewSpec, ...]]]:
    *others, last = views
    yield "a view more", (*others, last.model_copy(update={"count": last.count + 1}))
    if sum(spec.count for spec in views) > 1:
        yield "one view", (views[0].model_copy(update={"count": 1}),)
    yield "small crops beside", (*views, _SMALL_CROPS)


def _works(subject: MethodSubject, name: str, views: tuple[ViewSpec, ...]) -> bool:
    """Whether it is accepted."""
    options = {**subject.options, "views": views}
    try:
        subject.cls.Config.model_validate(options)
        training = subject.training(options=options)
    except (ValidationError, ConfigError):
        return False
    hint = "use as many views as batch.views holds, or refuse others in a validator of Config: raise ValueError"
    try:
        training.begin(0)
        output = training.gradients(0, first_batch(training))
        check_finite(output["loss"], training.method)
    except BrokenRuleError as broken:
        raise BrokenRuleError(f"with {name}: {broken}", hint) from broken
    except Exception as error:
        raise BrokenRuleError(f"with {name}: {type(error).__name__}: {error}", hint) from error
    return True


def trained_parameters_get_gradients(subject: MethodSubject) -> str:
    """In the first step, as data-parallel training needs it; and not zeros in all of the first steps."""
    subject.sound()
    training = subject.training()
    silent = {name for name, p in training.method.named_parameters() if p.requires_grad}
    count = len(silent)
    for step, batch in enumerate(training.loader.batches(0, STEPS)):
        training.begin(step)
        training.gradients(step, batch)
        gradients = {name: p.grad for name, p in training.method.named_parameters() if name in silent}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing and step == 0:
            raise BrokenRuleError(f"trainable parameters without gradient: {listed(missing)}", _UNREACHED)
        silent = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
        training.update(step)
    if silent:
        raise BrokenRuleError(
            f"gradients that are 0 in all of {STEPS} steps: {listed(sorted(silent))}", _UNREACHED
        )
    return f"{count} of {count} tensors"


_UNREACHED = (
    "use them in the loss, or freeze what is not to train: module.requires_grad_(False); for networks that follow "
    "others there is sslbench.nn.ema.EMA"
)


def target_networks_are_frozen(subject: MethodSubject) -> str:
    subject.sound()
    training = subject.training()
    method = training.method
    frozen = [name for name, p in method.named_parameters() if not p.requires_grad]
    _check_groups(method)
    for name, other in _followers(training):
        raise BrokenRuleError(
            f"{name} follows {other} in after_step, and the optimiser trains it as well",
            "wrap the network in sslbench.nn.ema.EMA, or freeze it: network.requires_grad_(False)",
        )
    if not frozen:
        return "there are none"
    return f"{len(frozen)} tensors are frozen, with " + _numbers(
        p for p in method.parameters() if not p.requires_grad
    )


def _check_groups(method: Method) -> None:
    for group in method.param_groups() or ():
        frozen = [name for name, p in group["params"] if not p.requires_grad]
        if frozen:
            raise BrokenRuleError(
                f"param_groups() names frozen parameters: {listed(frozen)}",
                "leave them out: [(n, p) for n, p in network.named_parameters() if p.requires_grad]",
            )


def _followers(training: Training) -> Iterator[tuple[str, str]]:
    """Trained tensors that ``after_step`` moves straight towards others of their shape, with those."""
    method = training.method
    training.begin(0)
    training.gradients(0, first_batch(training))
    before: dict[str, Tensor] = {}
    after_step = method.after_step

    def watched(progress: Any) -> None:
        before.update({name: p.detach().clone() for name, p in method.named_parameters()})
        after_step(progress)

    method.after_step = watched  # type: ignore[method-assign]
    training.update(0)
    for name, p in method.named_parameters():
        moved = (p.detach() - before[name]).flatten()
        if p.requires_grad and p.dim() > 1 and moved.any():
            yield from _towards(name, moved, before)


def _towards(name: str, moved: Tensor, before: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    here = before[name]
    for other, there in before.items():
        if other != name and there.shape == here.shape:
            cosine = torch.cosine_similarity(moved, (there - here).flatten(), dim=0)
            if cosine > _PARALLEL:
                yield name, other


def accumulates_as_it_says(subject: MethodSubject) -> str:
    """The gradient of a batch is the average of its parts', where no row is normalised by others."""
    from sslbench.engine.accumulate import parts_of

    subject.sound()
    if not subject.cls.accumulates:
        raise NotTriedError("it does not claim to (accumulates)")
    gradients = []
    for count in (1, 2):
        training = subject.training()
        training.begin(0)
        training.method.eval()  # or batch normalisation would see other rows
        for part in parts_of(first_batch(training), count):
            (training.method(part)["loss"] / count).backward()
        gradients.append([p.grad for p in training.method.parameters() if p.grad is not None])
    whole, parts = (torch.cat([g.flatten() for g in found]) for found in gradients)
    difference = float((whole - parts).abs().max() / whole.abs().max())
    if difference > 1e-3:
        raise BrokenRuleError(
            f"the gradient of two half batches differs by {difference:.1e} from that of the whole",
            "leave accumulates at False if images see each other in the loss, or are weighted or counted",
        )
    return f"two halves give the whole's gradient, within {difference:.0e}"


def listed(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _numbers(parameters: Any) -> str:
    return f"{sum(p.numel() for p in parameters):,} numbers"
