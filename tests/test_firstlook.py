"""A backbone or a data set that breaks its promises is named with what it gave, before a method trips over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sslbench.cli import run
from sslbench.config.options import Options
from sslbench.engine.firstlook import check_backbone
from sslbench.errors import ExitCode, PluginError
from sslbench.plugin.api import Backbone, Features

CPU = torch.device("cpu")
FILE = """
from torch import nn
from sslbench.plugin.api import Backbone, Dataset, DatasetInfo, Features
from sslbench.plugin.hooks import hookimpl

class Narrow(Backbone):
    name = "narrow"
    dim = 32
    stride = 8

    def __init__(self, cfg, image_size):
        super().__init__(cfg, image_size)
        self.conv = nn.Conv2d(3, 16, 8, 8)

    def forward(self, images):
        x = self.conv(images)
        return Features(x.mean((2, 3)), x)

class Listed(Dataset):
    name = "listed"
    info = DatasetInfo(("a", "b"), 32, (0.5,) * 3, (0.2,) * 3, ("train", "test"))

    def split(self, name):
        return [1, 2, 3]

    def fingerprint(self):
        return "0"

@hookimpl
def sslbench_backbones():
    return [Narrow]

@hookimpl
def sslbench_datasets():
    return [Listed]
"""


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("backbone", "narrow", "backbone 'narrow' gave pooled features [1, 16] for one image; promised: [1, 32]"),
        ("dataset", "listed", "data set 'listed': split('train') must return a Source, got a list"),
    ],
)
def test_a_run_names_the_plugin_and_what_it_gave(
    kind: str, name: str, told: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text(FILE)
    chosen = {"dataset": "digits", "backbone": "conv4"} | {kind: name}
    words = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    limits = ["--limit", "1", "--no-evals", "probe.every=0"]
    assert run(["-p", "broken.py", "pretrain", "--method", "simclr", *words, *limits]) == ExitCode.PLUGIN
    shown = " ".join(capsys.readouterr().err.split())
    assert told in shown
    assert f"sslbench check {kind} {name}" in shown


class Right(Backbone):
    name = "right"
    dim = 8
    stride = 4

    def __init__(self) -> None:
        super().__init__(Options(), 32)
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Features:
        x = self.conv(images)
        return Features(x.mean((2, 3)), x)


class Raising(Right):
    def forward(self, images: Tensor) -> Features:
        return Features(images.pooled, images)  # type: ignore[attr-defined]


class Bare(Right):
    def forward(self, images: Tensor) -> Features:
        return self.conv(images)  # type: ignore[no-any-return]


class OtherStride(Right):
    stride = 16


class OtherMap(Right):
    def forward(self, images: Tensor) -> Features:
        pooled, feature_map, *_ = super().forward(images)
        return Features(pooled, feature_map[:, :4])


class NoStride(Right):
    stride = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (Raising, r"failed on an image of 32x32 \(test_firstlook.py, line \d+\): AttributeError"),
        (Bare, r"returned a tensor \[1, 8, 8, 8\] for one image; promised: Features"),
        (OtherStride, r"gave a map \[1, 8, 8, 8\] of 32x32 .* every 16 pixels"),
        (OtherMap, r"gave a map \[1, 4, 8, 8\] for one image; promised: \[1, 8, h, w\]"),
        (NoStride, "does not tell its stride"),
    ],
)
def test_each_broken_promise_is_told(cls: type[Right], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        check_backbone(cls(), 32, CPU)


def test_what_runs_on_another_device_only_is_left_to_the_first_step() -> None:
    check_backbone(Raising(), 32, torch.device("cuda"))


def test_a_look_leaves_nothing_behind() -> None:
    backbone = Right()
    backbone.conv[1].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    generator = torch.get_rng_state()
    check_backbone(backbone, 32, CPU)
    assert all(map(torch.equal, before.values(), backbone.state_dict().values()))
    assert torch.equal(generator, torch.get_rng_state())
    assert [layer.training for layer in backbone.conv] == [True, False, True]
    assert backbone.training
