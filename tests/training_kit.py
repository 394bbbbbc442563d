"""A small run without batch normalisation, in this process or on two ranks, without the command line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from methods_kit import SIDE, batch, rows
from torch import Tensor, nn

from sslbench import comm
from sslbench.config.schema import CoreOptions
from sslbench.data.loader import rank_share
from sslbench.engine.loop import Loop, Plan
from sslbench.engine.optim import build_optimizer
from sslbench.engine.precision import loss_scaler
from sslbench.engine.recompute import checkpoint_activations
from sslbench.engine.trained import Trained
from sslbench.nn.sync_norm import share_statistics
from sslbench.plugin.api import Backbone, Batch, Build, Features, Method, Options

CPU = torch.device("cpu")
BATCH, STEPS = 6, 4


class Block(nn.Module):
    def __init__(self, dim: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Stacked(Backbone):
    """Odd widths, so that two ranks keep shards of different sizes, and one that is empty."""

    name = "stacked"
    dim = 7
    stride = 4

    def __init__(self, norm: bool = False) -> None:
        super().__init__(Options(), SIDE)
        self.stem = nn.Conv2d(3, 7, 4, stride=4)
        self.blocks = nn.Sequential(Block(7, norm), Block(7, norm))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Features:
        x = self.blocks(self.stem(images)) * self.scale
        return Features(x.mean((2, 3)), x)


def make(cls: type[Method], norm: bool = False, **options: Any) -> Method:
    """Reproducible; its heads lose their batch normalisation together with the backbone, or all ranks share it."""
    torch.manual_seed(0)
    method = cls(cls.Config(**options), Build(lambda: Stacked(norm), BATCH, 60, STEPS, STEPS, 10))
    for module in list(method.modules()):
        for key, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d) and not norm:
                setattr(module, key, nn.Identity())
    return cast(Method, share_statistics(method, comm.world(), CPU)) if norm else method


class Batches:
    """The same batches for every world: each rank takes its rows."""

    steps_per_epoch = STEPS
    wait_seconds = 0.0
    images: Any = None

    def __init__(self, views: int = 2) -> None:
        self.views = views

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        own = rank_share(BATCH, comm.rank(), comm.world())
        for step in range(start, stop):
            yield rows(batch(BATCH, self.views, seed=step, step=step), own.start, own.stop)


class Log:
    """Keeps what an observer is told."""

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self.lines: list[Mapping[str, float]] = []
        self.stop = stop

    def metrics(self, _step: int, values: Mapping[str, float]) -> None:
        self.lines.append({key: value for key, value in values.items() if key.startswith("train/")})

    def probe(self, *_: object) -> None: ...

    def save(self, *_: object) -> None: ...

    def should_stop(self) -> bool:
        return self.stop()


class Run:
    """A method in the real loop with the given core options."""

    def __init__(self, method: Method, views: int = 2, **core: Mapping[str, Any]) -> None:
        train = {"epochs": 1, "batch_size": BATCH, "log_every": 1, "precision": "fp32", **core.pop("train", {})}
        self.core = CoreOptions.model_validate({"train": train, **core})
        self.method, self.views, self.log = method, views, Log()
        optimizer = build_optimizer(self.core.optim, method.param_groups(), method, BATCH)
        self.trained = Trained(method, optimizer, loss_scaler(self.core.train.precision, CPU))
        if self.core.train.checkpoint_activations:
            checkpoint_activations(method)

    def train(self, start: int = 0, stop: int = STEPS, state: Mapping[str, Any] | None = None) -> Run:
        if state is not None:
            self.trained.load(copy.deepcopy(state))
        model = self.trained.distribute(CPU, sharded=self.core.train.parallel == "fsdp")
        core = self.core.model_copy(update={"train": self.core.train.model_copy(update={"limit": stop})})
        Loop(
            model=model,
            method=self.method,
            optimizer=self.trained.optimizer,
            loader=Batches(self.views),
            plan=Plan(core, STEPS, start),
            observer=self.log,
            device=CPU,
            precision=self.core.train.precision,
            scaler=self.trained.scaler,
            shards=self.trained.shards,
        ).run()
        return self


def spawn(work: Callable[[], Any], folder: Path, world: int = 2) -> list[Any]:
    """What ``work``, a function of a module, returns on each of the ranks."""
    mp.spawn(_run_rank, args=(work, str(folder), world), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def _run_rank(rank: int, work: Callable[[], Any], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(), f"{folder}/rank{rank}.pt")
    comm.leave()
