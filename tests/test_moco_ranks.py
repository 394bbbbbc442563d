"""MoCo on two processes is MoCo on one: losses, gradients, queue, key encoder, and grouped normalisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from methods_kit import rows
from sslbench_plugins.methods import moco
from test_moco import crops, moco_method
from torch import Tensor

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.plugin.api import Batch, Progress

pytestmark = pytest.mark.slow  # starts two processes

VIEWS = [{"count": 2}, {"count": 4, "size": 16}]
OURS = {"views": VIEWS, "knn_weight": 0.4, "momentum": 0.9}
CASES = {
    "uneven-ranks-without-norm": ({**OURS, "norm": False, "bn_groups": 1}, 5),
    "shuffled-without-norm": ({**OURS, "norm": False}, 4),
    "published-order": ({**OURS, "norm": False, "bn_groups": 1, "enqueue": "before-neighbours"}, 4),
    "groups": ({**OURS}, 4),
    "groups-of-each-process": ({**OURS, "bn_groups": 4}, 4),
    "groups-unshuffled": ({**OURS, "shuffle_bn": False}, 4),
}
"""Options, and how many of the eight images rank 0 has."""


def share(whole: Batch, split: int) -> Batch:
    if comm.world() == 1:
        return whole
    return rows(whole, 0, split) if comm.rank() == 0 else rows(whole, split, len(whole))


def three_steps(name: str) -> dict[str, Tensor]:
    """State, losses and averaged gradients; plain gradient descent."""
    options, split = CASES[name]
    method, found = moco_method(**options), {}
    for step in range(3):
        out = method(share(crops(seed=step, step=step), split))
        out["loss"].backward()
        found[f"loss {step}"] = out["loss"].detach()
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                gradient = comm.all_sum(parameter.grad) / comm.world()
                found[f"gradient {step} {key}"] = gradient
                parameter.data -= 0.05 * gradient
                parameter.grad = None
        method.after_step(Progress(step, 50, 10))
    return found | {f"state {key}": value for key, value in method.state_dict().items()}


def refusal() -> str:
    try:
        moco_method(bn_groups=1)
        moco.local_groups(3, 6)
    except ConfigError as error:
        return error.message
    return ""


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {name: three_steps(name) for name in CASES}
    torch.save((results, refusal()), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, dict[str, Tensor]], str]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def is_statistic(key: str) -> bool:
    return "running_" in key


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, of_ranks) -> None:
    expected = three_steps(name)
    for rank, (found, _) in enumerate(of_ranks):
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            if rank == 0 or not is_statistic(key):  # rank 0 saves, and has the first group
                torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_both_ranks_hold_one_queue(of_ranks) -> None:
    (first, _), (second, _) = of_ranks
    for name in CASES:
        for key in ("projected", "pooled", "pushed"):
            assert torch.equal(first[name][f"state queue.{key}"], second[name][f"state queue.{key}"])


def test_the_groups_of_one_process_matter(of_ranks) -> None:
    """Otherwise the equality above would show nothing."""
    results, _ = of_ranks[0]
    losses = [results[name]["loss 0"] for name in ("groups", "groups-of-each-process", "groups-unshuffled")]
    assert len({round(float(loss), 5) for loss in losses}) == 3


def test_groups_must_fall_on_processes(of_ranks) -> None:
    assert "method.bn_groups=3 must be a multiple of the number of processes (2)" in of_ranks[1][1]
