"""Collectives: two processes compute the values and gradients of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sslbench import comm

WORLD = 2
SHARES = {"equal rows": (4, 4), "uneven rows": (5, 2), "zero rows": (0, 6)}
Loss = Callable[[Tensor, Tensor], Tensor]


def rows_and_weights(total: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    rows = torch.randn(total, 3, generator=generator, dtype=torch.float64)
    return rows, torch.rand(total, generator=generator, dtype=torch.float64)


def gathered_loss(embedded: Tensor, weights: Tensor) -> Tensor:
    """Every rank computes the same loss from all rows."""
    everything = comm.gather(embedded)
    return (everything @ everything.T).logsumexp(1).mean()


def contrastive_loss(embedded: Tensor, weights: Tensor) -> Tensor:
    """Each rank's rows against the rows of all ranks."""
    return comm.global_mean((embedded @ comm.gather(embedded).T).logsumexp(1))


def weighted_loss(embedded: Tensor, weights: Tensor) -> Tensor:
    return comm.global_mean(embedded.square().sum(1), weights)


def moment_loss(embedded: Tensor, weights: Tensor) -> Tensor:
    """A non-linear function of a sum over ranks, as in Barlow Twins."""
    return comm.all_sum(embedded.T @ embedded).square().sum()


def unweighted_by_zero_loss(embedded: Tensor, weights: Tensor) -> Tensor:
    return comm.global_mean(embedded.sum(1), torch.zeros_like(weights))


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (gathered_loss, contrastive_loss, weighted_loss, moment_loss, unweighted_by_zero_loss)
}


def value_and_gradient(loss: Loss, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    layer = torch.linspace(-0.4, 0.5, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    value = loss(rows @ layer, weights)
    value.backward()
    assert layer.grad is not None
    return value.detach(), layer.grad


def this_ranks_share(share: tuple[int, int]) -> tuple[Tensor, Tensor]:
    start = sum(share[: comm.rank()])
    mine = slice(start, start + share[comm.rank()])
    rows, weights = rows_and_weights(sum(share))
    return rows[mine], weights[mine]


def other_facts() -> dict[str, Any]:
    """What the collectives without gradients return."""
    comm.barrier()
    mine = torch.full((comm.rank() + 1, 2), float(comm.rank()))
    return {
        "rank": comm.rank(),
        "world": comm.world(),
        "active": comm.is_active(),
        "offset": comm.row_offset(mine),
        "offset on a device without collectives": comm.row_offset(mine.to("meta")),
        "gathered": comm.gather(mine),
        "integers": comm.gather(torch.tensor([comm.rank()])),
        "strided": comm.gather(torch.arange(6).reshape(2, 3).T + 10 * comm.rank()),
        "sum": comm.all_sum(torch.tensor(comm.rank() + 1.0)),
        "broadcast": comm.broadcast(torch.tensor([10 + comm.rank()]), source=1),
        "object": comm.broadcast_object({"rank": comm.rank()}),
    }


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results = {
        (loss, share): value_and_gradient(LOSSES[loss], *this_ranks_share(SHARES[share]))
        for loss in LOSSES
        for share in SHARES
    }
    torch.save({"losses": results, "facts": other_facts()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("comm")
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_two_ranks_give_the_loss_and_gradient_of_one(ranks, loss, share):
    value, gradient = value_and_gradient(LOSSES[loss], *rows_and_weights(sum(SHARES[share])))
    results = [rank["losses"][loss, share] for rank in ranks]
    for theirs, _ in results:
        torch.testing.assert_close(theirs, value)
    averaged = torch.stack([g for _, g in results]).mean(0)  # what data-parallel training does
    torch.testing.assert_close(averaged, gradient)
    assert (gradient.abs().max() > 1e-3) == (loss != "unweighted_by_zero_loss")


def test_collectives_without_gradients(ranks):
    for number, facts in enumerate(rank["facts"] for rank in ranks):
        assert (facts["rank"], facts["world"], facts["active"]) == (number, 2, True)
        assert facts["offset"] == facts["offset on a device without collectives"] == number
        assert facts["gathered"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert facts["integers"].tolist() == [0, 1]
        assert facts["strided"].tolist() == [[0, 3], [1, 4], [2, 5], [10, 13], [11, 14], [12, 15]]
        assert facts["sum"].item() == 3
        assert facts["broadcast"].item() == 11
        assert facts["object"] == {"rank": 0}


def test_a_world_of_one_needs_no_process_group():
    facts = other_facts()
    assert (facts["rank"], facts["world"], facts["active"], facts["offset"]) == (0, 1, False, 0)
    rows = torch.randn(3, 2)
    assert comm.gather(rows) is rows
    assert comm.all_sum(rows) is rows
    assert facts["broadcast"].item() == 10
    assert facts["object"] == {"rank": 0}


def test_global_mean_of_one_rank():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert comm.global_mean(values).item() == 3
    assert comm.global_mean(values, torch.tensor([1.0, 1.0, 0.0])).item() == 1.5
    assert comm.global_mean(values, torch.tensor([0.25, 0.0, 0.25])).item() == 3.5


def test_global_mean_of_no_rows_is_zero_and_differentiable():
    layer = torch.ones(2, requires_grad=True)
    mean = comm.global_mean(torch.zeros(0, 2) @ layer)
    mean.backward()
    assert mean.item() == 0
    assert layer.grad is not None
    assert layer.grad.tolist() == [0.0, 0.0]
