"""The segments of a backbone: what is recomputed in the backward pass, and sharded."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sslbench.plugin.api import Backbone
from sslbench.testing.backbone import BackboneSubject
from sslbench.testing.rules import BrokenRuleError, NotTriedError

LEAST = 0.5
"""Share of the activations kept for the backward pass that segments should hold."""


def segments_are_called_once(subject: BackboneSubject) -> str:
    """Each is a different part of the backbone, called as a module once in a forward pass."""
    backbone = subject.build(0).train()
    segments = _segments(backbone)
    names = {module: name for name, module in backbone.named_modules()}
    _check_disjoint(segments, names)
    calls: Counter[str] = Counter()
    for segment in segments:
        segment.register_forward_hook(lambda module, *_: calls.update([names[module]]))
    subject.out(backbone, subject.images(2))
    wrong = {names[segment]: calls[names[segment]] for segment in segments if calls[names[segment]] != 1}
    if wrong:
        found = ", ".join(f"{name} {count} times" for name, count in wrong.items())
        raise BrokenRuleError(
            f"called in one forward pass: {found}",
            "call each as a module (part(x), not part.forward(x)), and leave shared parts out of segments()",
        )
    return f"{len(segments)} segments"


def _segments(backbone: Backbone) -> list[nn.Module]:
    segments = backbone.segments()
    if not segments:
        raise NotTriedError(
            "it names none: train.checkpoint_activations refuses it, and fsdp shards it as a whole"
        )
    return segments


def _check_disjoint(segments: list[nn.Module], names: dict[nn.Module, str]) -> None:
    if any(segment not in names for segment in segments):
        raise BrokenRuleError("one is no part of the backbone", "return modules that are in self.modules()")
    seen = [module for segment in segments for module in segment.modules()]
    twice = [names[module] for module, count in Counter(seen).items() if count > 1]
    if twice:
        raise BrokenRuleError(
            f"{twice[0]} is in two of them", "segments must not contain each other, nor share parts"
        )


def segments_hold_activations(subject: BackboneSubject) -> str:
    """Most of what is kept for the backward pass is kept inside segments."""
    backbone = subject.build(0).train()
    ledger = _Ledger(_segments(backbone))
    weights = {tensor.data_ptr() for tensor in backbone.state_dict().values()}
    with saved_tensors_hooks(lambda tensor: ledger.note(tensor, weights), lambda kept: kept):
        backbone(subject.images(2))
    share = ledger.inside / max(1, ledger.inside + ledger.outside)
    if share < LEAST:
        raise BrokenRuleError(
            f"they hold {share:.0%} of the activations that are kept",
            "override segments() so that it names the blocks of the network",
        )
    return f"{share:.0%}"


class _Ledger:
    """Bytes of activations kept while a segment runs, and outside of any."""

    def __init__(self, segments: list[nn.Module]) -> None:
        self.inside = self.outside = self._depth = 0
        self._seen: set[int] = set()
        self._kept: list[Tensor] = []
        """So that no address is used twice."""
        for segment in segments:
            segment.register_forward_pre_hook(lambda *_: self._move(1))
            segment.register_forward_hook(lambda *_: self._move(-1))

    def _move(self, by: int) -> None:
        self._depth += by

    def note(self, tensor: Tensor, weights: set[int]) -> Any:
        """A tensor is kept."""
        if tensor.data_ptr() not in self._seen | weights:
            self._seen.add(tensor.data_ptr())
            self._kept.append(tensor)
            if self._depth:
                self.inside += tensor.nbytes
            else:
                self.outside += tensor.nbytes
        return tensor
