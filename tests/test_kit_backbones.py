"""The kit passes every built-in backbone, and names each defect that is put into one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslbench.errors import ConfigError
from sslbench.plugin.api import Backbone, Features, Options
from sslbench.plugin.catalog import Catalog
from sslbench.testing import ConformanceError, check_backbone
from sslbench.testing.backbone import BackboneSubject
from sslbench.testing.backbones import RULES, _builds, _compiles
from sslbench.testing.rules import Rule, check_up

QUICK = ("conv4", "resnet8")
HUGE = ("resnet50w4", "resnet50w5")
"""They need 10 GB and minutes; resnet50w2 is the same code."""
NEEDS_MORE = ("timm",)
"""The name of a bridge says nothing without the network behind it."""


def _built_in() -> list[Any]:
    entries = [entry for entry in Catalog().entries("backbone") if entry.distribution == "sslbench"]
    names = [entry.name for entry in entries if entry.name not in (*HUGE, *NEEDS_MORE)]
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _built_in())
def test_built_in_backbones_pass(name: str) -> None:
    check_backbone(name, compiled=name not in QUICK).raise_if_broken()


class Good(Backbone):
    name = "good"
    dim = 12
    stride = 4
    mean_pooled = True

    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU()),
        )

    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images)
        return Features(found.mean((2, 3)), found)


class WrongDim(Good):
    dim = 16


class WrongStride(Good):
    stride = 8


class NoStem(Good):
    provides = frozenset({"pooled", "map", "stem"})
    stem_dim = 8


class WrongStemDim(NoStem):
    stem_dim = 5

    def forward(self, images: Tensor) -> Features:
        stem = self.blocks[0](images)
        return Features(*super().forward(images)[:2], stem)


class NoFeatures(Good):
    def forward(self, images: Tensor) -> Any:
        return self.blocks(images).mean((2, 3))


class OneSize(Good):
    """Takes only what it was built for, and does not say so."""

    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.places = nn.Parameter(torch.zeros(12, image_size // 4, image_size // 4))

    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images) + self.places
        return Features(found.mean((2, 3)), found)


class SaysOneSize(OneSize):
    input_sizes = "one"


class MaxPooled(Good):
    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images)
        return Features(found.amax((2, 3)), found)


class NotFinite(Good):
    def forward(self, images: Tensor) -> Features:
        return super().forward((images - images.mean()) / images.std())


class Unused(Good):
    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.classifier = nn.Linear(12, 10)


class RandomInEvaluation(Good):
    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images)
        return Features(found.mean((2, 3)) * random.random(), found)


class OverTheBatch(Good):
    """Statistics of the batch, also in evaluation."""

    def forward(self, images: Tensor) -> Features:
        return super().forward(images - images.mean(0))


class CountsInEvaluation(Good):
    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Features:
        self.calls += 1
        return super().forward(images)


class HiddenState(Good):
    """Remembers something that no checkpoint holds."""

    seen = 0.0

    def forward(self, images: Tensor) -> Features:
        if self.training:
            self.seen = self.seen + 1.0
        found = self.blocks(images) * (1 + self.seen)
        return Features(found.mean((2, 3)), found)


class UpdatesWeights(Good):
    def forward(self, images: Tensor) -> Features:
        if self.training:
            with torch.no_grad():
                next(self.parameters()).mul_(0.99)
        return super().forward(images)


class NotInState(Good):
    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.projection = torch.randn(12)

    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images) * self.projection[:, None, None]
        return Features(found.mean((2, 3)), found)


class CallsForward(Good):
    def forward(self, images: Tensor) -> Features:
        found = images
        for block in self.blocks:
            found = block.forward(found)
        return Features(found.mean((2, 3)), found)


class NestedSegments(Good):
    def segments(self) -> list[nn.Module]:
        return [self.blocks, *self.blocks]


class SmallSegments(Good):
    def segments(self) -> list[nn.Module]:
        return [self.blocks[1][2]]


class Views(Good):
    """``view`` of a map that may be channels-last."""

    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images)
        return Features(found.view(len(found), -1).unflatten(1, (12, -1)).mean(2), found)


class SameWeights(Good):
    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)


class OtherGenerator(Good):
    def __init__(self, cfg: Options, image_size: int) -> None:
        super().__init__(cfg, image_size)
        for parameter in self.parameters():
            nn.init.constant_(parameter, random.random())


class SharedCopies(Good):
    def __deepcopy__(self, memo: Any) -> SharedCopies:
        return self


class Undocumented(Good):
    class Config(Options):
        width: int = 1


class Branches(Good):
    """Under ``torch.compile`` it takes another way."""

    def forward(self, images: Tensor) -> Features:
        found = self.blocks(images)
        factor = 2.0 if torch.compiler.is_compiling() else 1.0
        return Features(found.mean((2, 3)) * factor, found)


DEFECTS: dict[type[Backbone], tuple[str, str]] = {
    WrongDim: ("dim, stride and stem_dim are true", "set dim"),
    WrongStride: ("dim, stride and stem_dim are true", "set stride"),
    NoStem: ("dim, stride and stem_dim are true", "stem=..."),
    WrongStemDim: ("dim, stride and stem_dim are true", "set stem_dim"),
    NoFeatures: ("can be built", "Features("),
    OneSize: ("takes images of other sizes", "input_sizes"),
    MaxPooled: ("pooled is the mean of map", "mean_pooled = False"),
    NotFinite: ("features are finite", "small number"),
    Unused: ("every parameter gets a gradient", "delete what forward does not use"),
    RandomInEvaluation: ("evaluation looks at each image by itself", "draw nothing"),
    OverTheBatch: ("evaluation looks at each image by itself", "running statistics"),
    CountsInEvaluation: ("evaluation looks at each image by itself", "in training only"),
    HiddenState: ("training passes leave statistics behind and nothing else", "register_buffer"),
    UpdatesWeights: ("training passes leave statistics behind and nothing else", "optimiser's step"),
    NotInState: ("its state moves to another instance", "persistent buffer"),
    CallsForward: ("segments are called once each", "part(x)"),
    NestedSegments: ("segments are called once each", "contain each other"),
    SmallSegments: ("segments hold most activations", "override segments()"),
    Views: ("channels-last memory gives the same", "reshape"),
    SameWeights: ("weights follow the seed", "global generator"),
    OtherGenerator: ("weights follow the seed", "not numpy or random"),
    SharedCopies: ("copies are independent", "__deepcopy__"),
    Undocumented: ("options are documented and survive a round trip", "string under each field"),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda cls: cls.__name__)
def test_each_defect_is_found_and_named(defect: type[Backbone]) -> None:
    name, hint = DEFECTS[defect]
    rule = next(rule for rule in (Rule("can be built", _builds), *RULES) if rule.name == name)
    subject = BackboneSubject(defect, defect.Config(), 32)
    (verdict,) = check_up("backbone", "wrong", subject, [rule]).broken
    assert hint in verdict.hint
    assert verdict.detail


@pytest.mark.slow
def test_a_difference_under_compile_is_found() -> None:
    subject = BackboneSubject(Branches, Options(), 32)
    (verdict,) = check_up("backbone", "wrong", subject, [Rule("compiles", _compiles)]).broken
    assert "compiled" in verdict.detail


_TOKENS = "tokens are patches, and hidden ones take no part"


@pytest.mark.parametrize(
    ("cls", "untried"), [(Good, [_TOKENS]), (SaysOneSize, ["takes images of other sizes", _TOKENS])]
)
def test_what_is_right_passes(cls: type[Backbone], untried: list[str]) -> None:
    checkup = check_backbone(cls, compiled=False)
    checkup.raise_if_broken()
    assert [verdict.rule for verdict in checkup.verdicts if verdict.outcome == "not tried"] == untried


def test_one_that_cannot_be_built_is_told_once() -> None:
    checkup = check_backbone(NoFeatures, compiled=False)
    assert [verdict.rule for verdict in checkup.broken] == ["can be built"]
    with pytest.raises(ConformanceError, match="forward does not return Features"):
        checkup.raise_if_broken()


def test_wrong_options_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match="widht"):
        check_backbone(Good, options={"widht": 2})
