"""What evaluations cost when all of them share one feature pass, against computing features in every epoch.

    python benchmarks/evaluation.py [--data CIFAR10] [--epochs 100] [--threads 1] [--sweep] [--quick]

``CIFAR10`` holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``; without it images are generated. Everything is
measured in this one process: the grid of linear heads on cached features, before and after the same heads are
trained on features that are computed again in every epoch, from the same batches in the same order. Accuracies of
both are compared head by head. Then every protocol runs through its job. Writes ``evaluation-NAME.md`` and
``.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sslbench.engine.machine import prepare_process

prepare_process()

import harness  # noqa: E402
import torch  # noqa: E402
from sslbench_plugins.backbones.conv4 import Conv4  # noqa: E402
from sslbench_plugins.backbones.resnet import ResNet18  # noqa: E402
from sslbench_plugins.datasets.folder import Folder, FolderOptions  # noqa: E402
from sslbench_plugins.evals.knn import Knn, KnnConfig  # noqa: E402
from sslbench_plugins.evals.linear import (  # noqa: E402
    EpochBatches,
    Heads,
    Linear,
    LinearConfig,
    Score,
    epoch_order,
    resident_batches,
    score,
    train,
    with_ones,
)
from sslbench_plugins.evals.logistic import Logistic, LogisticConfig  # noqa: E402
from sslbench_plugins.evals.lowshot import LowShot, LowShotConfig  # noqa: E402
from sslbench_plugins.evals.retrieval import Retrieval, RetrievalConfig  # noqa: E402
from sslbench_plugins.evals.svm import Svm, SvmConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from sslbench.config.options import Options  # noqa: E402
from sslbench.config.schema import DataOptions  # noqa: E402
from sslbench.data.loader import EvalLoader  # noqa: E402
from sslbench.data.sources import ArraySource  # noqa: E402
from sslbench.engine.layout import faster_layout  # noqa: E402
from sslbench.evaluation.classifiers import FeatureScaling  # noqa: E402
from sslbench.evaluation.job import EvaluationJob, preprocessing_for, run_protocol  # noqa: E402
from sslbench.plugin.api import (  # noqa: E402
    Backbone,
    Dataset,
    DatasetInfo,
    EvalOptions,
    EvalProtocol,
    FeatureTable,
)

CPU = torch.device("cpu")
LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
VOC_TRAINVAL = 5011
SWEEP = (64, 128, 256, 512, 1024)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = decoded(arguments.data, arguments.images) if arguments.data else generated(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        result = Result(facts(arguments.threads), images.key, arguments.epochs)
        job = open_job(Linear(LinearConfig(lrs=LRS, epochs=arguments.epochs)), images, Path(folder))
        compare(job, images, arguments.epochs, result)
        run_protocols(images, Path(folder), arguments.epochs, result)
    if arguments.sweep:
        sweep(result)
    (arguments.out / f"evaluation-{images.key}.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    text = markdown(result)
    (arguments.out / f"evaluation-{images.key}.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and test/; without it images are generated")
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="500 images, 2 epochs, into a temporary folder")
    parser.add_argument("--sweep", action="store_true", help="also the speed of forward passes by batch size")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.epochs, arguments.out = 500, 2, Path(tempfile.mkdtemp())
    return arguments


@dataclass
class Seconds:
    """How long something took."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@dataclass
class Result:
    """Everything that is measured."""

    facts: dict[str, Any]
    data: str
    epochs: int
    images: int = 0
    feature_pass: Seconds = field(default_factory=Seconds)
    cached: list[Seconds] = field(default_factory=list)
    uncached: Seconds = field(default_factory=Seconds)
    """Forward passes and heads."""
    forward: Seconds = field(default_factory=Seconds)
    """Of these the forward passes with their images."""
    heads: list[dict[str, float]] = field(default_factory=list)
    equality: dict[str, float] = field(default_factory=dict)
    protocols: list[dict[str, Any]] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=list)


class InMemory(Dataset):
    """Decoded images with a ``val`` of their own."""

    def __init__(self, name: str, splits: dict[str, ArraySource], classes: tuple[str, ...], task: Any) -> None:
        super().__init__(Options())
        self.name = name  # type: ignore[misc]
        self.splits, self.task, self.classes = splits, task, classes

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(self.classes, (32, 32), MEAN, STD, tuple(self.splits), task=self.task)

    def split(self, name: str) -> ArraySource:
        return self.splits[name]

    def fingerprint(self) -> str:
        return f"{self.name}-{self.task}-{[len(source) for source in self.splits.values()]}"

    def like_voc(self) -> InMemory:
        """As many images as VOC 2007 trains on, each class a property that is present or absent."""

        def targets(source: ArraySource, count: int) -> ArraySource:
            pixels, labels = source.pixels(), source.targets
            assert labels is not None
            rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
            marks = torch.nn.functional.one_hot(labels[rows], len(self.classes))
            return ArraySource(pixels[rows], marks)

        half = min(VOC_TRAINVAL, len(self.splits["val"])) // 2
        splits = {"train": targets(self.splits["train"], half), "val": targets(self.splits["val"], half)}
        return InMemory(f"{self.name}-properties", splits, self.classes, "multilabel")


def decoded(root: Path, count: int) -> InMemory:
    """The images of a folder, decoded once; those of ``test`` stand in as ``val``, because nothing is claimed."""
    folder = Folder(FolderOptions(root=root))
    names = {"train": "train", "val": "val" if "val" in folder.info.splits else "test"}
    splits = {}
    for split, name in names.items():
        source = folder.split(name)
        assert source.targets is not None
        rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
        rows = rows[: count if split == "train" else max(1, count // 5)].sort().values
        pixels = torch.stack([source.image(row) for row in rows.tolist()])
        splits[split] = ArraySource(pixels, source.targets[rows])
    return InMemory("cifar10", splits, tuple(folder.info.classes), "classification")


def generated(count: int) -> InMemory:
    """Noise around ten smooth patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.nn.functional.interpolate(torch.rand(10, 3, 4, 4, generator=generator), 32, mode="bilinear")

    def source(images: int) -> ArraySource:
        labels = torch.arange(images) % 10
        noise = torch.rand(images, 3, 32, 32, generator=generator)
        return ArraySource(((0.25 * patterns[labels] + 0.75 * noise) * 255).byte(), labels)

    splits = {"train": source(count), "val": source(max(10, count // 5))}
    return InMemory("generated", splits, tuple("abcdefghij"), "classification")


def make_backbone() -> Backbone:
    """A conv4 with random weights that has seen some noise."""
    torch.manual_seed(0)
    backbone = Conv4(Options(), image_size=32)
    for _ in range(20):
        backbone.train()(torch.randn(64, 3, 32, 32))
    return backbone


def open_job(protocol: EvalProtocol, dataset: Dataset, folder: Path) -> EvaluationJob:
    return EvaluationJob(
        protocol,
        make_backbone(),
        dataset,
        image_size=32,
        data=DataOptions(),
        seed=1,
        device=CPU,
        run_dir=folder,
        cache_dir=folder / "cache",
    )


def compare(job: EvaluationJob, images: InMemory, epochs: int, result: Result) -> None:
    """The same heads from cached features and from features that are computed in every epoch."""
    with result.feature_pass.running():
        table, val = job.features("train"), job.features("val")
    result.images = len(table.labels)
    scaling = FeatureScaling.fit("standardize", table.features)
    cached, first = fit(job, table, resident_batches(job, table, scaling, 256), epochs)
    again = Forward(job, images, table, scaling, result.forward)
    with result.uncached.running():
        uncached, _ = fit(job, table, again.batches, epochs)
    print(f"{epochs} epochs without a cache: {result.uncached.wall:.1f} s", file=sys.stderr)
    repeated, second = fit(job, table, resident_batches(job, table, scaling, 256), epochs)
    result.cached = [first, second]
    found = [score(heads, scaling, val) for heads in (cached, uncached)]
    result.heads = by_head(*found)
    result.equality = {
        "predictions": float(len(val.labels) * len(LRS)),
        "predictions that differ": float((answers(cached, scaling, val) != answers(uncached, scaling, val)).sum()),
        "largest difference of a feature": again.difference,
        "cached runs equal to the bit": float(torch.equal(cached.weight, repeated.weight)),
    }


def fit(job: EvaluationJob, table: FeatureTable, batches: EpochBatches, epochs: int) -> tuple[Heads, Seconds]:
    heads = Heads(
        LinearConfig(lrs=LRS, epochs=epochs),
        torch.tensor(LRS),
        table.features.shape[1],
        len(job.classes),
        job.generator("init"),
    )
    seconds = Seconds()
    with seconds.running():
        train(heads, batches, math.ceil(len(table.labels) / 256))
    return heads, seconds


class Forward:
    """Batches whose features are computed when they are needed, in the order of cached ones."""

    def __init__(
        self, job: EvaluationJob, images: InMemory, table: FeatureTable, scaling: FeatureScaling, seconds: Seconds
    ) -> None:
        self.job, self.images, self.table, self.scaling, self.seconds = job, images, table, scaling, seconds
        self.difference = 0.0

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(self.job, len(self.table.labels), epoch)
        loader = iter(self.loader(order))
        for rows in torch.split(order, 256):
            with self.seconds.running(), torch.no_grad():
                pixels, numbers = next(loader)
                features = self.job.backbone()(pixels).pooled
            assert torch.equal(rows, numbers)
            if epoch == 0:
                apart = (features - self.table.features[rows]).abs().max()
                self.difference = max(self.difference, float(apart))
            yield with_ones(self.scaling(features)), self.table.labels[rows]

    def loader(self, order: Tensor) -> EvalLoader:
        shown = asdict(preprocessing_for(self.images, EvalOptions(), 32))
        last = faster_layout(self.job.backbone(), CPU) == torch.channels_last
        source = self.images.split("train")
        return EvalLoader(source, order, batch_size=256, device=CPU, channels_last=last, **shown)


def by_head(cached: Score, uncached: Score) -> list[dict[str, float]]:
    columns = (cached.top1, uncached.top1, cached.loss, uncached.loss)
    names = ("cached top1", "uncached top1", "cached loss", "uncached loss")
    rows = zip(LRS, *(column.tolist() for column in columns), strict=True)
    return [dict(zip(("lr", *names), row, strict=True)) for row in rows]


def answers(heads: Heads, scaling: FeatureScaling, table: FeatureTable) -> Tensor:
    return heads.logits(with_ones(scaling(table.features))).argmax(0)


def run_protocols(images: InMemory, folder: Path, epochs: int, result: Result) -> None:
    """Every protocol as a user runs it, features from the cache."""
    properties = images.like_voc()
    runs: list[tuple[str, EvalProtocol, InMemory]] = [
        (f"linear, {epochs} epochs, 10 rates, refit", Linear(LinearConfig(lrs=LRS, epochs=epochs)), images),
        ("knn, 5 values of k", Knn(KnnConfig()), images),
        ("logistic, 6 strengths, refit", Logistic(LogisticConfig()), images),
        ("lowshot, 7 amounts, 5 draws, 5 strengths", LowShot(LowShotConfig()), images),
        ("retrieval, all ranks", Retrieval(RetrievalConfig()), images),
        ("svm, 26 costs, 3 folds, 10 properties", Svm(SvmConfig()), properties),
    ]
    for name, protocol, dataset in runs:
        job = open_job(protocol, dataset, folder)
        for split in ("train", "val"):
            job.features(split)  # what is measured below finds its features in the cache
        seconds = Seconds()
        with seconds.running():
            metrics = run_protocol(protocol, open_job(protocol, dataset, folder))
        value = metrics[protocol.primary]
        print(f"{name}: {seconds.wall:.1f} s", file=sys.stderr)
        row = {"protocol": name, "images": len(dataset.split("train")), protocol.primary: value}
        result.protocols.append({**row, "primary": protocol.primary, "seconds": asdict(seconds)})


def sweep(result: Result) -> None:
    """Images a second through the backbone, the best of some interleaved repetitions."""
    for make, side in ((Conv4, 32), (ResNet18, 32), (ResNet18, 224)):
        backbone = make(make.Config(), image_size=side).eval()
        for layout in (torch.contiguous_format, torch.channels_last):
            backbone.to(memory_format=layout)
            sizes = [size for size in SWEEP if size * side * side <= 64 * 224 * 224]
            best = dict.fromkeys(sizes, math.inf)
            for _ in range(5):
                for size in sizes:
                    best[size] = min(best[size], forward_seconds(backbone, layout, size, side) / size)
            rates = {str(size): 1 / seconds for size, seconds in best.items()}
            result.sweep.append({"backbone": f"{make.name}, {side} px", "layout": str(layout)[6:], **rates})


def forward_seconds(backbone: Backbone, layout: torch.memory_format, size: int, side: int) -> float:
    images = torch.randn(size, 3, side, side).to(memory_format=layout)
    seconds = Seconds()
    with torch.no_grad(), seconds.running():
        backbone(images)
    return seconds.cpu / torch.get_num_threads()


def ratio(result: Result, clock: Callable[[Seconds], float]) -> dict[str, float]:
    heads = sum(map(clock, result.cached)) / len(result.cached)
    return {
        "forward / cached": clock(result.forward) / heads,
        "uncached / (feature pass + cached)": clock(result.uncached) / (clock(result.feature_pass) + heads),
    }


def markdown(result: Result) -> str:
    """The report."""
    wall, cpu = ratio(result, lambda s: s.wall), ratio(result, lambda s: s.cpu)
    parts = [
        f"# Evaluations from one feature pass: {result.data}\n\n{described(result.facts)}",
        f"## A grid of ten linear heads, {result.epochs} epochs of {result.images:,} images, conv4",
        harness.table(
            ("", "wall s", "CPU s"),
            [
                ("one feature pass, train and val", *pair(result.feature_pass)),
                *(("heads on cached features", *pair(seconds)) for seconds in result.cached),
                (f"forward passes of {result.epochs} epochs", *pair(result.forward)),
                ("heads on features of each epoch, all in all", *pair(result.uncached)),
                *((f"**{name}**", f"**{wall[name]:.1f}**", f"**{cpu[name]:.1f}**") for name in wall),
            ],
        ),
        harness.table(
            tuple(result.heads[0]), [tuple(f"{value:.6g}" for value in row.values()) for row in result.heads]
        ),
        harness.table(("", ""), [(name, f"{value:.6g}") for name, value in result.equality.items()]),
        "## Protocols, features from the cache",
        harness.table(
            ("protocol", "images", "result", "wall s", "CPU s"),
            [
                (
                    row["protocol"],
                    f"{row['images']:,}",
                    f"{row['primary']} {row[row['primary']]:.2f}",
                    *pair(Seconds(**row["seconds"])),
                )
                for row in result.protocols
            ],
        ),
    ]
    if result.sweep:
        rows = [[str(row.get(name, "")) for name in ("backbone", "layout")] + rates(row) for row in result.sweep]
        parts += [
            "## Images a second through the backbone, by batch size (CPU time)",
            harness.table(("backbone", "layout", *map(str, SWEEP)), rows),
        ]
    return "\n\n".join(parts) + "\n"


def numbers(values: Iterable[float]) -> list[str]:
    return [f"{value:.6g}" for value in values]


def rates(row: dict[str, Any]) -> list[str]:
    return [f"{row[str(size)]:,.0f}" if str(size) in row else "" for size in SWEEP]


def facts(threads: int) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "scikit-learn", "numpy", "sslbench")}
    return {**harness.machine(), "threads": threads, "versions": versions}


def described(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    cores = f"{facts['threads']} of {facts['cores']} cores ({', '.join(facts['flags'])})"
    command = f"`{facts['command']}` at {facts['commit'] or 'an unknown commit'}, {facts['date']}"
    return f"{command}.  \n{facts['cpu']}, {cores}, {facts['system']}.  \n{versions}."


def pair(seconds: Seconds) -> tuple[str, str]:
    return f"{seconds.wall:.2f}", f"{seconds.cpu:.2f}"


if __name__ == "__main__":
    main()
