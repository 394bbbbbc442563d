"""The conformance kit passes what is right, and says of each kind of mistake what it is and how to mend it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslbench import comm
from sslbench.errors import ConfigError, PluginError
from sslbench.nn.heads import mlp
from sslbench.nn.queue import FeatureQueue
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, Progress, TrainingImages, ViewSpec
from sslbench.plugin.catalog import Catalog, Kind
from sslbench.testing import ConformanceError, RankReport, check_ranks
from sslbench.testing.compare import relative_difference
from sslbench.testing.ranks import Checked, check_all
from sslbench.testing.reference import PluginReference

PLUGIN = '''
"""Classifies."""
import torch.nn.functional as F
from torch import nn
from sslbench import comm
from sslbench.plugin.api import Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl

class Config(MethodConfig):
    views: tuple[ViewSpec, ...] = (ViewSpec(),)

class Mine(Method):
    name = "mine"
    Config = Config
    uses_labels = True

    def __init__(self, cfg, build):
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.classifier = nn.Linear(self.backbone.dim, build.num_classes)

    def forward(self, batch):
        logits = self.classifier(self.backbone(batch.views[0].images).pooled)
        return {"loss": comm.global_mean(F.cross_entropy(logits, batch.labels, reduction="none"))}

@hookimpl
def sslbench_methods():
    return [Mine]
'''


class Config(MethodConfig):
    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.3, 1.0)),)


class Right(Method):
    """Tells an image's other view among a queue of earlier ones. Subclasses each do one thing wrong."""

    name = "right"
    Config = Config

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.head = mlp(self.backbone.dim, 16, 8)
        self.queue = FeatureQueue(2 * build.global_batch, build.global_batch, keys=8)
        self.register_buffer("seen", torch.zeros(build.num_images))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = (F.normalize(self.embed(view.images), dim=1) for view in batch.views)
        self.keys = self.gathered(second.detach())
        losses = F.softplus((first @ self.queue["keys"].T).logsumexp(1) - (first * second).sum(1))
        return {"loss": self.averaged(losses * (0.5 + self.noise(batch)))}

    def embed(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooled)

    def gathered(self, keys: Tensor) -> Tensor:
        return comm.gather(keys)

    def averaged(self, losses: Tensor) -> Tensor:
        return comm.global_mean(losses)

    def noise(self, batch: Batch) -> Tensor:
        return batch.uniform()

    def start_epoch(self, epoch: int, images: TrainingImages) -> None:
        index = torch.cat([numbers for _, numbers in images.clean()])
        self.seen[self.all_of(index)] += 1

    def all_of(self, index: Tensor) -> Tensor:
        return comm.gather(index)

    def after_step(self, progress: Progress) -> None:
        self.queue.push(keys=self.keys)


class PlainMean(Right):
    def averaged(self, losses: Tensor) -> Tensor:
        return losses.mean()


class MeanOfMeans(Right):
    """Right only where all ranks have as many rows."""

    def averaged(self, losses: Tensor) -> Tensor:
        return comm.all_sum(losses.mean()) / comm.world()


class PlainAllReduce(Right):
    def averaged(self, losses: Tensor) -> Tensor:
        sums = torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))])
        if comm.world() > 1:
            total = sums.detach().clone()
            dist.all_reduce(total)
            # What torch's own all_reduce in place does to a graph: the value of the sum, the gradient of the part.
            sums = sums + (total - sums.detach())
        return sums[0] / sums[1].detach()


class SummedNotAveraged(Right):
    """Each rank's gradient is already that of the sum over ranks, and is not averaged away."""

    def averaged(self, losses: Tensor) -> Tensor:
        mean = comm.global_mean(losses)
        return mean.detach() + comm.world() * (mean - mean.detach())


class QueueOfOwnRows(Right):
    def gathered(self, keys: Tensor) -> Tensor:
        everyone = comm.gather(keys)
        return everyone.roll(comm.rank(), dims=0)


class OwnNoise(Right):
    def noise(self, batch: Batch) -> Tensor:
        return torch.rand(len(batch))


class NoiseByRank(Right):
    def noise(self, batch: Batch) -> Tensor:
        return torch.rand(len(batch), generator=torch.Generator().manual_seed(comm.rank()))


class WithoutSync(Right):
    defaults: ClassVar = {"train": {"sync_bn": False}}


class OwnStatistics(Right):
    """Normalises by hand, where the core cannot see it."""

    def embed(self, images: Tensor) -> Tensor:
        rows = super().embed(images)
        return (rows - rows.mean(0)) / (rows.std(0) + 1e-3)


class OwnImagesOnly(Right):
    def all_of(self, index: Tensor) -> Tensor:
        return index


class OwnRowsInAfterStep(Right):
    """Weights that follow this rank's rows."""

    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        with torch.no_grad():
            self.head[-1].bias += 0.01 * (1 + comm.rank())


class FailsOnOneRank(Right):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if comm.rank() == 1:
            raise ConfigError("no image has a face", hint="method.faces=false")
        return super().forward(batch)


class AsksAlone(Right):
    """Only ranks with some rows take part."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if comm.rank() == 0:
            comm.all_sum(torch.ones(3))
        return super().forward(batch)


DEFECTS: dict[type[Method], tuple[str, str]] = {
    PlainMean: ("loss differs between ranks: each has the mean over its own rows", "comm.global_mean"),
    MeanOfMeans: ("only where ranks have different numbers of rows", "comm.global_mean"),
    PlainAllReduce: ("the loss is right, but its gradients are 1/2 of those of one process", "plain all_reduce"),
    SummedNotAveraged: ("the loss is right, but its gradients are 2 times", "averaged over ranks"),
    QueueOfOwnRows: ("queue.keys differs between ranks after 5 steps", "gather before enqueueing"),
    OwnNoise: ("depends on torch's own generator", "batch.uniform"),
    NoiseByRank: ("loss differs from that of one process", "leave nothing to comm.rank()"),
    WithoutSync: ("batch normalisation sees the rows of one rank only, in backbone.stem.1", "train.sync_bn"),
    OwnStatistics: ("loss differs from that of one process", "statistics over the batch"),
    OwnImagesOnly: ("seen differs between ranks before the first step", "comm.gather"),
    OwnRowsInAfterStep: ("parameters: head.3.bias differs between ranks", "comm.gather"),
}


@pytest.fixture(scope="module")
def reports() -> dict[type[Method], RankReport]:
    """Of all methods above, from one set of processes."""
    methods = [Right, *DEFECTS]
    return dict(zip(methods, check_all(map(Checked, methods), norms=("batch",)), strict=True))


def test_what_is_right_passes(reports) -> None:
    report = reports[Right]
    assert report.error is None
    assert report.identical
    assert {each.quantity for each in report.differences} == {
        "start", "loss", "gradients", "parameters", "buffers", "optimiser"
    }  # fmt: skip
    assert 0 < max(each.relative for each in report.differences) < 3e-4
    assert "7 images on 2 ranks" in " ".join(report.cases)


@pytest.mark.parametrize("method", DEFECTS)
def test_each_defect_is_named_with_its_cure(method: type[Method], reports) -> None:
    message, hint = DEFECTS[method]
    error = reports[method].error
    assert isinstance(error, ConformanceError)
    assert isinstance(error, AssertionError)
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.report is not None
    assert str(error.report) in str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words"),
    [
        (FailsOnOneRank, ("rank 1: ConfigError: no image has a face", "method.faces=false")),
        (AsksAlone, ("rank ",)),
    ],
)
def test_a_rank_that_fails_ends_the_check(method: type[Method], words: tuple[str, ...]) -> None:
    with pytest.raises(ConformanceError) as info:
        check_ranks(method, norms=("batch",), uneven=False, timeout=20)
    assert all(word in str(info.value) for word in words)


def test_methods_are_found_by_name_class_and_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    by_file = PluginReference.of("method", str(file)).load()
    assert (by_file.name, PluginReference.of("method", Path(file)).load()) == ("mine", by_file)
    assert PluginReference.of("method", "simclr").load().name == "simclr"
    assert PluginReference.of("method", Right).load() is Right
    assert PluginReference("method", Right.__name__, Path(__file__), "no_such_module").load().name == "right"


@pytest.mark.parametrize(("kind", "name"), [("dataset", "digits"), ("backbone", "conv4"), ("eval", "knn")])
def test_plugins_of_every_kind_are_found(kind: Kind, name: str) -> None:
    by_name = PluginReference.of(kind, name)
    cls = by_name.load()
    assert (cls.name, by_name.title) == (name, name)
    by_class = PluginReference.of(kind, cls)
    assert (by_class.load(), by_class.title) == (cls, name)
    assert PluginReference.of(kind, by_class) is by_class
    assert PluginReference.in_catalog(Catalog(), kind, name).load() is cls


def test_a_plugin_of_a_file_is_found_in_its_catalogue(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    reference = PluginReference.in_catalog(Catalog((file,)), "method", "mine")
    assert (reference.file, reference.title, reference.load().name) == (file, "mine", "mine")


def test_methods_that_other_processes_cannot_find_are_refused(tmp_path: Path) -> None:
    class Inside(Right):
        pass

    with pytest.raises(PluginError, match="inside a function"):
        PluginReference.of("method", Inside)
    (tmp_path / "none.py").write_text('"""Nothing."""')
    with pytest.raises(PluginError, match=r"none\.py offers nothing: it has no hook"):
        PluginReference.of("method", tmp_path / "none.py")


@pytest.mark.slow
def test_a_file_is_checked_from_an_installation_without_these_tests(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    code = (
        f"from sslbench.testing import check_ranks\nif __name__ == '__main__': print(check_ranks({str(file)!r}))"
    )
    (tmp_path / "check.py").write_text(code)
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ranks agree to the bit" in done.stdout


@pytest.mark.parametrize(
    ("found", "expected", "floor", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.0, 0.2),
        ([0.0, 1e-9], [0.0, 2e-9], 1.0, 1e-9),
        ([0.0], [0.0], 0.0, 0.0),
        ([float("nan")], [1.0], 0.0, 1.0),
        ([1, 2], [1, 3], 0.0, 1.0),
        ([1, 2], [1, 2], 0.0, 0.0),
        ([1.0], [1.0, 1.0], 0.0, 1.0),
        (None, [1.0], 0.0, 1.0),
    ],
)
def test_relative_differences(found, expected, floor, relative) -> None:
    tensors = (None if values is None else torch.tensor(values) for values in (found, expected))
    assert relative_difference(*tensors, floor) == pytest.approx(relative)
