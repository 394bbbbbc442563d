"""What a plan counts, against numbers computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sslbench.config.compose import Layer, compose
from sslbench.config.registry import Registry
from sslbench.config.tree import parse_overrides
from sslbench.errors import ConfigError, PluginError
from sslbench.planning.counting import Ledger
from sslbench.planning.exchange import BACKWARD, COUNTS, GRADIENTS, SHARDS, STATISTICS, Exchange
from sslbench.planning.rehearsal import Step, rehearse
from sslbench.planning.subject import Subject, describe
from sslbench.plugin.catalog import Catalog

FP32 = 4


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def subject(*items: str) -> Subject:
    base = ["method.name=simclr", "dataset.name=digits", "backbone.name=conv4", "train.batch_size=64"]
    layer = Layer("test", parse_overrides([*base, *items]))
    registry = Registry(version=1, defaults={}, recipes={}, references=[])
    return describe(compose(Catalog(), registry, recipe=None, layers=[layer]), None)


@cache
def step(world: int, *items: str, half: bool = False) -> Step:
    return rehearse(subject(*items), world, half=half)


def sent(counted: Step, origin: str) -> dict[tuple[str, int], int]:
    """Times of each collective of an origin, by its kind and the bytes that a rank puts in."""
    chosen = {e: n for e, n in counted.exchanges.counts.items() if e.origin == origin}
    return {(exchange.kind, exchange.payload): times for exchange, times in chosen.items()}


def test_a_linear_layer(fake: FakeTensorMode) -> None:
    layer, rows = nn.Linear(30, 7), torch.empty(5, 30)
    ledger = Ledger()
    ledger.own([*layer.parameters(), rows])
    before = ledger.alive
    with ledger:
        out = layer(rows)
        assert ledger.alive - before == 5 * 7 * FP32
        with ledger.phase("backward"):
            out.sum().backward()
    flops = {
        phase: sum(o.flops for o in ledger.operations if o.phase == phase) for phase in ("forward", "backward")
    }
    assert before == (30 * 7 + 7 + 5 * 30) * FP32
    assert flops == {"forward": 2 * 5 * 30 * 7, "backward": 2 * 5 * 30 * 7}  # the rows need no gradient


def test_memory_that_is_freed_does_not_count_twice(fake: FakeTensorMode) -> None:
    ledger = Ledger()
    with ledger:
        values = torch.empty(1000)
        for _ in range(5):
            values = values + 1
        values.add_(1).view(10, 100)
    assert ledger.alive == 1000 * FP32
    assert ledger.peak == 2 * 1000 * FP32


@pytest.mark.parametrize(
    ("backbone", "side", "parameters", "multiplications"),
    [
        ("resnet18", 224, 11_176_512, 1_813_561_344),  # what is published for it, less the classifier
        # 3x3 convolutions of 3, 8, 16, 32 to 8, 16, 32, 64 channels on maps of 32, 16, 8, 4 cells, two poolings
        (
            "conv4",
            32,
            24_648,
            9 * (24 * 32**2 + 128 * 16**2 + 512 * 8**2 + 2048 * 4**2) + 4 * (8 * 16**2 + 16 * 8**2),
        ),
    ],
)
def test_a_backbone(backbone: str, side: int, parameters: int, multiplications: int) -> None:
    cls = Catalog().load("backbone", backbone)
    with FakeTensorMode():
        network = cls(cls.Config(), side)
        images = torch.empty(2, 3, side, side)
        with Ledger() as ledger:
            network(images)
    convolutions = [operation for operation in ledger.operations if operation.arithmetic == "convolution"]
    assert sum(operation.flops for operation in convolutions) == 2 * 2 * multiplications
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_memory_of_parameters_optimizers_and_targets() -> None:
    adam = step(1, "method.name=byol", "optim.name=adamw").memory
    sgd = step(1, "method.name=byol", "optim.name=sgd").memory
    network = Catalog().load("backbone", "conv4")
    backbone = sum(p.numel() for p in network(network.Config(), 16).parameters())
    dim, hidden, out = network.dim, 512, 256
    projector = dim * hidden + hidden + 2 * hidden + hidden * out
    predictor = out * hidden + hidden + 2 * hidden + hidden * out
    assert adam.frozen == (backbone + projector) * FP32
    assert adam.weights == (backbone + projector + predictor) * FP32
    assert adam.gradients == adam.weights  # alone, no buckets
    assert adam.optimizer == pytest.approx(2 * adam.weights, rel=1e-3)  # and a step counter for each tensor
    assert sgd.optimizer == sgd.weights
    assert adam.batch == 2 * (2 * 64 * 3 * 16 * 16) * FP32


def test_half_precision_halves_activations_and_nothing_else() -> None:
    full, half = step(1).memory, step(1, half=True).memory
    assert half.activations < 0.75 * full.activations
    assert (half.weights, half.optimizer, half.batch) == (full.weights, full.optimizer, full.batch)


def test_activations_grow_with_the_rows_of_a_rank() -> None:
    small, large = step(4), step(1)
    assert (small.rows, large.rows) == (16, 64)
    assert large.flops > 3.9 * small.flops
    assert large.memory.activations > 3 * small.memory.activations


@pytest.mark.parametrize("world", [2, 8])
def test_simclr_gathers_projections(world: int) -> None:
    counted = step(world, "method.out_dim=32")
    rows = 64 // world
    pairs = rows * 2 * 32 * FP32
    assert sent(counted, "losses") == {("all_gather", pairs): 1, ("all_reduce", 4): 2}
    assert sent(counted, BACKWARD) == {("all_reduce", world * pairs): 1, ("all_reduce", 4): 1}
    assert sent(counted, COUNTS) == {("all_gather", 8): 2}
    assert sent(counted, GRADIENTS) == {("all_reduce", counted.parameters * FP32): 1}


def test_byol_exchanges_scalars_gradients_and_statistics() -> None:
    counted = step(2, "method.name=byol")
    assert sent(counted, "bootstrap") == {("all_reduce", 4): 2}
    assert set(counted.exchanges.sent_by_origin()) == {"bootstrap", BACKWARD, GRADIENTS, STATISTICS}


def test_statistics_of_normalisations() -> None:
    counted = step(2, "method.hidden=100")
    network = Catalog().load("backbone", "conv4")
    norms = [m.num_features for m in network(network.Config(), 16).modules() if isinstance(m, nn.BatchNorm2d)]
    channels = [*norms, 100]
    found = sent(counted, STATISTICS)
    assert sum(payload * n for (kind, payload), n in found.items() if kind == "all_gather") == sum(
        4 * (2 * c + 1) for c in channels
    )
    assert sum(payload * n for (kind, payload), n in found.items() if kind == "all_reduce") == sum(
        4 * 2 * c for c in channels
    )
    assert sent(step(2, "train.sync_bn=false"), STATISTICS) == {}


def test_moco_gathers_images_and_keys() -> None:
    counted = step(2, "method.name=moco", "method.queue=128", "method.bn_groups=2", "method.out_dim=32")
    images, numbers, keys = 32 * 3 * 16 * 16 * FP32, 32 * FP32, 32 * 32 * FP32
    assert sent(counted, "shuffle") == {
        ("all_gather", images): 1, ("all_gather", numbers): 1, ("all_gather", keys): 1
    }  # fmt: skip
    assert counted.memory.buffers >= 128 * 32 * FP32


def test_swav_sums_prototypes_in_each_iteration() -> None:
    counted = step(
        2, "method.name=swav", "method.prototypes=50", "method.sinkhorn_iterations=4", "method.epsilon=0.05"
    )
    assert sent(counted, "sinkhorn") == {("all_reduce", 50 * FP32): 2 * 4, ("all_reduce", FP32): 2}


def test_ring_algorithms() -> None:
    assert Exchange("x", "all_reduce", 100, 4).sent == 150
    assert Exchange("x", "all_gather", 100, 4).sent == 300
    assert Exchange("x", "broadcast", 100, 4).sent == 100
    assert not step(1).exchanges.counts


@pytest.mark.parametrize(
    "name",
    [entry.name for entry in Catalog().entries("method") if entry.name != "random"],
)
def test_every_method_is_counted(name: str) -> None:
    backbone = "vit_tiny" if "tokens" in Catalog().load("method", name).requires else "conv4"
    counted = step(2, f"method.name={name}", f"backbone.name={backbone}", "train.batch_size=16")
    assert counted.flops > 0
    assert counted.memory.activations > 0


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ConfigError, match="gives some of 128 processes no image"):
        step(128)
    with pytest.raises(ConfigError, match="does not train"):
        subject("method.name=random")
    with pytest.raises(ConfigError, match="exceeds"):
        subject("train.batch_size=100000")


def test_a_method_that_looks_at_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = Catalog().load("method", "simclr")
    monkeypatch.setattr(cls, "forward", lambda self, batch: {"loss": batch.views[0].images.mean().item()})
    with pytest.raises(PluginError, match="'simclr' cannot be counted without values"):
        rehearse(subject(), 1, half=False)


def test_activations_computed_again_are_not_kept() -> None:
    small = ("method.name=simclr", "backbone.name=resnet8")
    kept, again = step(1, *small), step(1, *small, "train.checkpoint_activations=true")
    assert again.memory.activations < 0.9 * kept.memory.activations
    assert again.flops > 1.1 * kept.flops


def test_sharded_backbones_keep_a_share_and_gather_the_rest() -> None:
    whole = step(4, "method.name=simclr", "train.sync_bn=false")
    shared = step(4, "method.name=simclr", "train.sync_bn=false", "train.parallel=fsdp")
    backbone = 24_648 * FP32
    assert whole.memory.weights - shared.memory.weights == backbone - backbone // 4
    assert sent(shared, SHARDS) == {("all_gather", backbone // 4): 2}
    assert sent(shared, GRADIENTS) == {
        ("all_gather", backbone // 4): 1, ("all_reduce", whole.parameters * FP32 - backbone): 1
    }  # fmt: skip


def test_parts_of_a_batch_take_less_memory() -> None:
    name = "method.name=rotationnet"
    whole, parts = step(1, name), step(1, name, "train.accumulate=4")
    assert parts.memory.activations < 0.4 * whole.memory.activations
    assert parts.flops == whole.flops
