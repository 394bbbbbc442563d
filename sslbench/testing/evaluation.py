"""An evaluation protocol tried out: on toy images, with a toy backbone, watched."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.sources import ArraySource
from sslbench.data.splits import eval_split
from sslbench.evaluation.job import EvaluationJob
from sslbench.plugin.api import Dataset, DatasetInfo, EvalProtocol, Options, Source
from sslbench.plugin.catalog import Catalog
from sslbench.rng import derive_seed
from sslbench.testing.documented import options_of
from sslbench.testing.reference import PluginReference
from sslbench.testing.toys import ToyBackbone

Arm = Literal["revealing", "shuffled", "mixed"]
"""What labels have to do with images: everything; nothing; nothing in the second half of a split. Ranks that each
score a part of the images find other numbers in the mixed arm."""
Task = Literal["classification", "multilabel"]

CLASSES = 4
SIDE = 16
IMAGES = {"train": 300, "val": 301, "test": 303}
"""Numbers that ranks cannot share evenly; of training images there are enough for 64 of each class."""
CPU = torch.device("cpu")


class WideBackbone(ToyBackbone):
    """With more features, so that a classifier can learn random labels of training images by heart."""

    name = "toy-wide"
    dim = 128


def toy_backbone() -> WideBackbone:
    """Random weights, and running statistics that are not the initial ones; the same every time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        backbone = WideBackbone()
        backbone.train()
        for _ in range(10):
            backbone(torch.randn(64, 3, SIDE, SIDE))
    return backbone.eval()


class ToyDataset(Dataset):
    """Noisy images of four patterns, whose labels are those patterns, or are not."""

    name = "toy"

    def __init__(self, arm: Arm, task: Task, key: str = "toy") -> None:
        super().__init__(Options())
        self.arm, self.task, self.asked = arm, task, key
        self.opened: set[str] = set()

    @property
    def key(self) -> str:
        return self.asked

    @property
    def info(self) -> DatasetInfo:
        names = tuple(f"pattern {number}" for number in range(CLASSES))
        return DatasetInfo(names, SIDE, (0.5,) * 3, (0.25,) * 3, tuple(IMAGES), task=self.task)

    def split(self, name: str) -> Source:
        self.opened.add(name)
        count = IMAGES[name]
        generator = torch.Generator().manual_seed(derive_seed(0, "toy", name))
        shown = torch.arange(count)[torch.randperm(count, generator=generator)] % CLASSES
        patterns = torch.rand(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        noise = torch.rand(count, 3, SIDE, SIDE, generator=generator)
        pixels = (255 * (0.5 * patterns[shown] + 0.5 * noise)).byte()
        labels = self._labels(shown, generator)
        several = torch.nn.functional.one_hot(labels, CLASSES) if self.task == "multilabel" else labels
        return ArraySource(pixels, several)

    def _labels(self, shown: Tensor, generator: torch.Generator) -> Tensor:
        first = {"revealing": len(shown), "shuffled": 0, "mixed": len(shown) // 2}[self.arm]
        rest = shown[first:]
        return torch.cat([shown[:first], rest[torch.randperm(len(rest), generator=generator)]])

    def fingerprint(self) -> str:
        return f"{derive_seed(0, self.arm, self.task):x}"


class WatchedJob(EvaluationJob):
    """Notes which splits are opened, and refuses none."""

    def __init__(self, protocol: EvalProtocol, toys: ToyDataset, **kwargs: Any) -> None:
        super().__init__(protocol, toy_backbone(), toys, **kwargs)
        self.toys = toys
        self.opened: set[str] = set()

    def _open(self, split: str) -> tuple[Source, Tensor]:
        self.opened.add(split)
        return eval_split(self._dataset, split, self._data.val_fraction)


@dataclass(frozen=True)
class EvalTrial:
    """One evaluation."""

    reference: PluginReference
    options: Mapping[str, Any]
    before: Mapping[str, Mapping[str, Any]]
    """Options of the protocols that it comes after."""
    arm: Arm
    task: Task
    noise: int = 0
    """Seed of the global generators, which results must not depend on."""
    folder: Path | None = None
    """One that all ranks see; None: a temporary one."""


@dataclass
class Outcome:
    """What an evaluation gave, and what it did besides."""

    metrics: dict[str, float]
    changed: list[str] = field(default_factory=list)
    """Of the backbone."""
    opened: list[str] = field(default_factory=list)
    """Splits, by the job."""
    bypassed: list[str] = field(default_factory=list)
    """Splits that the data set opened without being asked to by the job."""
    strays: list[str] = field(default_factory=list)
    """Files outside its own folder."""


def run(trial: EvalTrial) -> dict[str, float]:
    """The metrics, in any process."""
    return outcome(trial).metrics


def outcome(trial: EvalTrial) -> Outcome:
    """Evaluate, after what has to come before."""
    if trial.folder is not None:
        return _Bench(trial, trial.folder / f"of{comm.world()}").evaluate()
    with tempfile.TemporaryDirectory() as name:
        return _Bench(trial, Path(name)).evaluate()


class _Bench:
    def __init__(self, trial: EvalTrial, run_dir: Path) -> None:
        self.trial, self.run_dir = trial, run_dir
        self.children: list[Path] = []
        """Folders of the evaluations it started."""

    def evaluate(self) -> Outcome:
        cls: type[EvalProtocol] = self.trial.reference.load()
        for name in cls.after:
            self._job(self._other(name), self.trial.before.get(name, {}), "toy")[1]()
        before = self._files()
        job, start = self._job(cls, self.trial.options, "toy")
        _seed_everything(self.trial.noise)
        condition = _condition(job)
        metrics = {key: float(value) for key, value in start().items()}
        return Outcome(
            metrics,
            changed=[*job.changed_tensors(), *sorted(condition - _condition(job))],
            opened=sorted(job.opened),
            bypassed=sorted(job.toys.opened - _openable(job.opened)),
            strays=sorted(str(path.relative_to(self.run_dir)) for path in self._strays(job.out_dir) - before),
        )

    def _strays(self, own: Path) -> set[Path]:
        return {path for path in self._files() if not any(path.is_relative_to(of) for of in (own, *self.children))}

    def _files(self) -> set[Path]:
        return {path for path in self.run_dir.rglob("*") if path.is_file()}

    def _job(self, cls: type[EvalProtocol], options: Mapping[str, Any], key: str) -> tuple[WatchedJob, Any]:
        task: Task = self.trial.task if self.trial.task in cls.tasks else _other_task(self.trial.task)
        protocol = cls(options_of(cls, options))
        job = WatchedJob(
            protocol,
            ToyDataset(self.trial.arm, task, key),
            image_size=SIDE,
            data=DataOptions(workers=0),
            seed=0,
            device=CPU,
            run_dir=self.run_dir,
            run_child=self._child,
        )
        return job, lambda: protocol.run(job)

    def _child(
        self, protocol: str, dataset: str, dataset_options: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, float]:
        """On toy images, whatever data set is asked for."""
        job, start = self._job(self._other(protocol), options, dataset)
        metrics: dict[str, float] = start()
        self.children.append(job.out_dir)
        return metrics

    def _other(self, name: str) -> type[EvalProtocol]:
        """A protocol of the same module, or an installed one."""
        reference = self.trial.reference
        for found in vars(sys.modules[reference.load().__module__]).values():
            if isinstance(found, type) and issubclass(found, EvalProtocol) and getattr(found, "name", "") == name:
                return found
        local = (reference.file,) if reference.file and reference.module is None else ()
        return Catalog(local=local).load("eval", name)


def _other_task(task: Task) -> Task:
    return "multilabel" if task == "classification" else "classification"


def _openable(splits: set[str]) -> set[str]:
    """What a data set may be asked for; features of train and val are computed in one go."""
    return splits & {"test"} | ({"train", "val"} if splits - {"test"} else set())


def _condition(job: EvaluationJob) -> frozenset[str]:
    """What an evaluation could change of a backbone without touching its weights."""
    backbone = job.backbone()
    frozen = [f"requires_grad of {name}" for name, p in backbone.named_parameters() if not p.requires_grad]
    modes = [f"mode of {name or 'the backbone'}" for name, part in backbone.named_modules() if not part.training]
    unhooked = [
        f"hooks of {name or 'the backbone'}" for name, part in backbone.named_modules() if not _hooks(part)
    ]
    return frozenset([*frozen, *modes, *unhooked])


def _hooks(module: torch.nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
