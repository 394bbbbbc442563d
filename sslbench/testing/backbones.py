"""A backbone keeps its contract: sizes as declared, state where it belongs, ready for every way of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslbench.plugin.api import Backbone, Features
from sslbench.testing.backbone import BackboneSubject, apart, describe
from sslbench.testing.documented import check_options, options_of
from sslbench.testing.reference import PluginReference
from sslbench.testing.rules import BrokenRuleError, Checkup, NotTriedError, Rule, check_up
from sslbench.testing.segments import segments_are_called_once, segments_hold_activations
from sslbench.testing.tokens import tokens_are_patches

TOLERANCE = 1e-3
"""Largest relative difference between two ways to compute the same features in fp32."""


def check_backbone(
    backbone: type[Backbone] | str | Path | PluginReference,
    *,
    options: Mapping[str, Any] | None = None,
    image_size: int = 32,
    compiled: bool = True,
) -> Checkup:
    """Try every promise of a backbone's contract on random images, on the CPU.

    Args:
        backbone: a class, the name of an installed plugin, or a file with one backbone.
        options: of the backbone.
        image_size: side in pixels it is built for; take one that it is made for.
        compiled: also under ``torch.compile``, whose start takes some seconds.

    Raises:
        ConfigError: the options are wrong.
        PluginError: there is no such plugin, or it cannot be imported.
    """
    reference = PluginReference.of("backbone", backbone)
    cls: type[Backbone] = reference.load()
    subject = BackboneSubject(cls, options_of(cls, options), image_size)
    rules = [*RULES, Rule("works under torch.compile", _compiles)] if compiled else RULES
    return check_up("backbone", reference.title, subject, rules, first=Rule("can be built", _builds))


def _builds(subject: BackboneSubject) -> str:
    backbone = subject.backbone
    if not isinstance(subject.out(backbone, subject.images(2)), Features):
        raise BrokenRuleError("forward does not return Features", "return Features(pooled=..., map=...)")
    return f"{sum(p.numel() for p in backbone.parameters()):,} parameters"


def _dimensions(subject: BackboneSubject) -> str:
    """At two sizes, since a stem may depend on the size the backbone is built for."""
    for size in (subject.image_size, 3 * subject.image_size):
        backbone = subject.build(0, size)
        subject.check_shapes(backbone, size, size)
        _check_stem(backbone, subject.out(backbone, subject.images(2, size, size)))
    return f"dim {backbone.dim}, stride {backbone.stride}, provides {', '.join(sorted(backbone.provides))}"


def _check_stem(backbone: Backbone, found: Features) -> None:
    if "stem" not in backbone.provides:
        return
    if found.stem is None:
        raise BrokenRuleError("provides 'stem', but forward returns none", "return Features(..., stem=...)")
    if found.stem.ndim != 4 or found.stem.shape[1] != backbone.stem_dim:
        raise BrokenRuleError(
            f"stem is {describe(found.stem)}, stem_dim is {backbone.stem_dim}", "set stem_dim to its channels"
        )


def _other_sizes(subject: BackboneSubject) -> str:
    if subject.backbone.input_sizes == "one":
        raise NotTriedError(f"it takes {subject.image_size} pixels only (input_sizes)")
    side, stride = subject.image_size, subject.backbone.stride
    half = max(side // 2, stride, 8)
    shapes = [(half, half), (side + 5, side + 5), (2 * side, 2 * side), (side, side + stride)]
    for height, width in shapes:
        _take(subject, height, width)
    return "also " + ", ".join(f"{height}x{width}" for height, width in shapes)


def _take(subject: BackboneSubject, height: int, width: int) -> None:
    try:
        subject.check_shapes(subject.backbone, height, width)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BrokenRuleError(
            f"{height}x{width} pixels: {type(error).__name__}: {error}",
            "multi-crop and evaluations show it other sizes; if it cannot, declare input_sizes = 'one'",
        ) from error


def _mean_pooled(subject: BackboneSubject) -> str:
    if not subject.backbone.mean_pooled:
        raise NotTriedError("it does not claim it (mean_pooled)")
    found = subject.out(subject.backbone, subject.images(3))
    distance = apart(found.pooled, found.map.mean((2, 3)))
    if distance > TOLERANCE:
        raise BrokenRuleError(
            f"pooled differs from map.mean((2, 3)) by {distance:.1e}",
            "return the map that pooled was made of, or set mean_pooled = False",
        )
    return "as claimed"


def _finite(subject: BackboneSubject) -> str:
    backbone, images = subject.build(0).train(), subject.images(2)
    _check_finite(subject.out(backbone, images), "random images")
    _check_finite(subject.out(backbone, torch.zeros_like(images)), "one-coloured images")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _check_finite(subject.out(backbone, images), "random images under bf16")
    return "fp32 and bf16"


def _check_finite(found: Features, what: str) -> None:
    if not bool(found.pooled.isfinite().all() and found.map.isfinite().all()):
        raise BrokenRuleError(
            f"{what} give features that are not finite",
            "add a small number under roots and divisions, and leave exponentials to fp32",
        )


def _gradients(subject: BackboneSubject) -> str:
    backbone = subject.build(0).train()
    pooled = backbone(subject.images(4)).pooled
    pooled.float().square().sum().backward()
    trained = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    without = [name for name, p in trained if p.grad is None]
    if without:
        raise BrokenRuleError(
            f"no gradient from pooled: {', '.join(without[:5])}{' ...' if len(without) > 5 else ''}",
            "delete what forward does not use; with several processes an unused parameter stops training",
        )
    return f"{len(trained)} of {len(trained)}"


def _by_itself(subject: BackboneSubject) -> str:
    backbone, images = subject.practised(), subject.images(5)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    together = subject.out(backbone, images).pooled
    if not torch.equal(together, subject.out(backbone, images).pooled):
        raise BrokenRuleError(
            "the same images give other features the second time",
            "draw nothing when self.training is false",
        )
    changed = _changed(before, backbone)
    if changed:
        raise BrokenRuleError(f"evaluating changes {', '.join(changed)}", "change buffers in training only")
    alone = torch.cat([subject.out(backbone, image[None]).pooled for image in images])
    distance = apart(alone, together)
    if distance > TOLERANCE:
        raise BrokenRuleError(
            f"an image has other features alone than in a batch, by {distance:.1e}",
            "when self.training is false, normalise with running statistics, not over the batch",
        )
    return "alone as in a batch"


def _changed(before: Mapping[str, Tensor], backbone: Backbone) -> list[str]:
    return [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]


def _statistics_only(subject: BackboneSubject) -> str:
    """A forward pass in training changes running statistics and nothing else, seen or hidden."""
    backbone, images = subject.practised(), subject.images(4)
    expected = subject.out(backbone, images).pooled
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    subject.out(backbone.train(), subject.images(4))
    if not backbone.training:
        raise BrokenRuleError("forward leaves training mode", "do not call train() or eval() in forward")
    changed = _changed(before, backbone)
    others = [name for name in changed if not name.rpartition(".")[2].startswith(("running_", "num_batches"))]
    if others:
        raise BrokenRuleError(
            f"forward changes {', '.join(others)}", "weights change in the optimiser's step, not in forward"
        )
    backbone.load_state_dict(before)
    if not torch.equal(subject.out(backbone.eval(), images).pooled, expected):
        raise BrokenRuleError(
            "after a forward pass in training the same state gives other features",
            "keep what forward remembers in buffers (register_buffer), so that checkpoints hold it",
        )
    return f"{len(changed)} statistics" if changed else "no state"


def _round_trip(subject: BackboneSubject) -> str:
    source, images = subject.practised(), subject.images(3)
    target = subject.build(1)
    try:
        target.load_state_dict(source.state_dict(), strict=True)
    except RuntimeError as error:
        raise BrokenRuleError(str(error), "keys must not depend on what was done with the backbone") from error
    distance = apart(subject.out(target.eval(), images).pooled, subject.out(source, images).pooled)
    if distance:
        raise BrokenRuleError(
            f"another instance with the same state gives other features, by {distance:.1e}",
            "what forward uses must be a parameter or a persistent buffer",
        )
    return f"{len(source.state_dict())} tensors"


def _channels_last(subject: BackboneSubject) -> str:
    backbone, images = subject.practised(), subject.images(4)
    expected = subject.out(backbone, images)
    turned: Any = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    hint = "use reshape or flatten, not view, on maps"
    try:
        found = subject.out(turned, images.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        raise BrokenRuleError(str(error), hint) from error
    return _same(expected, found, "with channels-last memory", hint)


def _same(expected: Features, found: Features, when: str, hint: str) -> str:
    distance = max(apart(found.pooled, expected.pooled), apart(found.map, expected.map))
    if distance > TOLERANCE:
        raise BrokenRuleError(f"{when} features differ by {distance:.1e}", hint)
    return f"differs by {distance:.0e}" if distance else "to the bit"


def _initialisation(subject: BackboneSubject) -> str:
    first, second, again = (list(subject.build(seed).parameters()) for seed in (0, 1, 0))
    if all(map(torch.equal, first, second)):
        raise BrokenRuleError(
            "every instance has the same weights",
            "draw them from torch's global generator in __init__; check it without pretrained ones",
        )
    if not all(map(torch.equal, first, again)):
        raise BrokenRuleError(
            "the same torch seed gives other weights",
            "draw them from torch's global generator, not numpy or random",
        )
    return "another one each time, the same after torch.manual_seed"


def _copies(subject: BackboneSubject) -> str:
    backbone, images = subject.practised(), subject.images(3)
    expected = subject.out(backbone, images).pooled
    twin = copy.deepcopy(backbone)
    if not torch.equal(subject.out(twin, images).pooled, expected):
        raise BrokenRuleError("copy.deepcopy gives other features", _OWN_TENSORS)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    if not torch.equal(subject.out(backbone, images).pooled, expected):
        raise BrokenRuleError("changing a copy changes the original", _OWN_TENSORS)
    return "a teacher can be a copy"


_OWN_TENSORS = "define no __deepcopy__ and keep networks as attributes, not in lists, globals or closures"


def _compiles(subject: BackboneSubject) -> str:
    backbone, images = subject.practised(), subject.images(4)
    expected = subject.out(backbone, images)
    torch.compiler.reset()
    try:
        compiled: Callable[[Tensor], Features] = torch.compile(backbone, backend="eager")
        with torch.no_grad():
            found = compiled(images)
    finally:
        torch.compiler.reset()
    return _same(expected, found, "compiled", "leave Python state and data-dependent branches out of forward")


RULES: tuple[Rule[BackboneSubject], ...] = (
    Rule("options are documented and survive a round trip", lambda subject: check_options(subject.cfg)),
    Rule("dim, stride and stem_dim are true", _dimensions),
    Rule("takes images of other sizes", _other_sizes),
    Rule("pooled is the mean of map", _mean_pooled),
    Rule("tokens are patches, and hidden ones take no part", tokens_are_patches),
    Rule("features are finite", _finite),
    Rule("every parameter gets a gradient", _gradients),
    Rule("evaluation looks at each image by itself", _by_itself),
    Rule("training passes leave statistics behind and nothing else", _statistics_only),
    Rule("its state moves to another instance", _round_trip),
    Rule("segments are called once each", segments_are_called_once),
    Rule("segments hold most activations", segments_hold_activations),
    Rule("channels-last memory gives the same", _channels_last),
    Rule("weights follow the seed", _initialisation),
    Rule("copies are independent", _copies),
)
