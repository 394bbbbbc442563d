"""Two processes cluster, remember and learn what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clustering_kit as kit
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from clustering_kit import STEPS, make
from sslbench_plugins.methods.deepcluster_v2 import DeepClusterV2
from sslbench_plugins.methods.sela_v2 import SeLaV2
from test_kmeans import planted, seed_with_distinct_starts
from torch import Tensor

from sslbench.nn.kmeans import spherical_kmeans
from sslbench.plugin.api import Method, Progress

pytestmark = pytest.mark.slow  # starts two processes

METHODS = {"deepcluster_v2": DeepClusterV2, "sela_v2": SeLaV2}
SPLIT = 130  # planted rows of rank 0; rank 1 has the other 70
SEED = seed_with_distinct_starts(*planted(), 5)


def averaged_gradients(method: Method, world: int) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    if world > 1:
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= world
    return grads


def trained(name: str, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """One epoch by gradient descent and the start of the next one."""
    method, loader = make(METHODS[name], norm=False), kit.loader(rank, world)
    torch.manual_seed(11)
    method.start_epoch(0, loader.images)
    losses = []
    for step, batch in enumerate(loader.batches(0, STEPS)):
        method.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        losses.append(loss.detach())
        parameters = dict(method.named_parameters())
        for key, grad in averaged_gradients(method, world).items():
            parameters[key].data -= 0.1 * grad
        method.after_step(Progress(step, 4 * STEPS, STEPS))
    torch.manual_seed(12 if rank == 0 else 13)  # whatever the other ranks' state is
    method.start_epoch(1, loader.images)
    gradients = {f"grad/{key}": grad for key, grad in averaged_gradients(method, world).items()}
    return {"losses": torch.stack(losses), **gradients, **kit.state(method)}


def clustered(rows: Tensor, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return spherical_kmeans(rows, 5)._asdict()


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[str, Any] = {name: trained(name, rank, 2) for name in METHODS}
    own = planted()[0].split(SPLIT)[rank]
    results["kmeans"] = clustered(own, SEED if rank == 0 else 0)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_planted_clusters_have_identical_centroids(of_ranks) -> None:
    expected = clustered(planted()[0], SEED)
    for found in of_ranks:
        assert torch.equal(found["kmeans"]["centroids"], expected["centroids"])
    assert torch.equal(torch.cat([found["kmeans"]["labels"] for found in of_ranks]), expected["labels"])


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one(name: str, of_ranks) -> None:
    expected = trained(name)
    for found in of_ranks:
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            if not value.is_floating_point():
                assert torch.equal(found[name][key], value), key
                continue
            difference = (found[name][key] - value).abs().max()
            assert difference <= 1e-6 + 1e-4 * value.abs().max(), key


@pytest.mark.parametrize("name", METHODS)
def test_ranks_agree_to_the_bit(name: str, of_ranks) -> None:
    first, second = (found[name] for found in of_ranks)
    for key in ("bank.features", "bank.epochs", "assignments", "clusters_used", "prototypes.0.weight"):
        assert torch.equal(first[key], second[key]), key
