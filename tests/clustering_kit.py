"""Toy images and short runs for the tests of methods that cluster all images before each epoch."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from methods_kit import TinyBackbone
from torch import Tensor, nn

from sslbench.config.schema import CoreOptions
from sslbench.data.loader import TrainLoader
from sslbench.data.sources import ArraySource
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor, expand
from sslbench.engine.loop import Loop, Plan
from sslbench.engine.optim import build_optimizer
from sslbench.nn.clustering import Clustering
from sslbench.plugin.api import Build, Progress, ViewSpec

CPU = torch.device("cpu")
COUNT, BATCH, STEPS = 45, 8, 5
"""Images, images per step, steps per epoch: each epoch leaves out five images."""
VIEWS = (ViewSpec(count=2, size=32, scale=(0.5, 1.0)), ViewSpec(size=16, scale=(0.2, 0.5)))
OPTIONS: dict[str, Any] = {"views": VIEWS, "prototypes": (6, 5, 4), "hidden": 16, "out_dim": 8}


def loader(rank: int = 0, world: int = 1) -> TrainLoader:
    """Images of five colours, noisy."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 200, (5, 3, 1, 1), generator=generator)
    noise = torch.randint(0, 55, (COUNT, 3, 32, 32), generator=generator)
    source = ArraySource((colours[torch.arange(COUNT) % 5] + noise).byte(), torch.arange(COUNT) % 5)
    views = ViewExecutor(expand(VIEWS, 32), size=32, mean=(0.5,) * 3, std=(0.25,) * 3, device=CPU)
    store = open_store(source, CoreOptions().data, CPU, lambda _line: None)
    return TrainLoader(source, store, views, seed=3, global_batch=BATCH, rank=rank, world=world, workers=0)


def make(cls: type[Clustering], seed: int = 0, norm: bool = True, **options: Any) -> Clustering:
    torch.manual_seed(seed)
    build = Build(lambda: TinyBackbone(norm), BATCH, COUNT, 4 * STEPS, STEPS)
    method = cls(cls.Config(**{**OPTIONS, **options}), build)
    return method if norm else _row_independent(method)


def _row_independent(method: Clustering) -> Clustering:
    """Without batch normalisation, which would see each rank's rows only."""
    for module in list(method.modules()):
        for key, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, key, nn.LayerNorm(child.num_features))
    return method


class _Silent:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.clusters: list[float] = []

    def metrics(self, _step: int, values: dict[str, float]) -> None:
        self.losses.append(values["train/loss"])
        self.clusters.append(values["train/clusters_used"])

    def probe(self, *_: object) -> None: ...

    def save(self, *_: object) -> None: ...

    def should_stop(self) -> bool:
        return False


class Run:
    """The method in the real loop; it can stop anywhere and hand over to another run."""

    def __init__(self, method: Clustering, epochs: int = 4, lr: float = 0.01) -> None:
        self.method = method
        self.core = {"train": {"epochs": epochs, "batch_size": BATCH, "log_every": 1}, "optim": {"lr": lr}}
        self.log = _Silent()
        options = CoreOptions.model_validate(self.core)
        self.optimizer = build_optimizer(options.optim, method.param_groups(), method, BATCH)

    def train(self, start: int, stop: int | None = None) -> Run:
        """Steps from ``start`` to ``stop``, to the end without."""
        self.core["train"]["limit"] = stop
        core = CoreOptions.model_validate(self.core)
        parts = {"model": self.method, "method": self.method, "optimizer": self.optimizer, "loader": loader()}
        plan = Plan(core, STEPS, start)
        Loop(**parts, plan=plan, observer=self.log, device=CPU).run()  # type: ignore[arg-type]
        return self

    def take_over(self, other: Run) -> Run:
        """Continue from the other run's state."""
        self.method.load_state_dict(copy.deepcopy(other.method.state_dict()))
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        return self


def train_within_an_epoch(method: Clustering, steps: int) -> list[float]:
    """Adam steps on the images in turn, without a new clustering; the losses."""
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step, batch in zip(range(steps), itertools.cycle(loader().batches(0, STEPS)), strict=False):
        loss = method(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(Progress(step, steps, steps))
        losses.append(float(loss.detach()))
    return losses


def state(method: Clustering) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in method.state_dict().items()}
