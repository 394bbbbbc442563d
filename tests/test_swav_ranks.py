"""SwAV on two processes has the codes, queue, loss and gradients of SwAV on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from methods_kit import batch, make, rows
from sslbench_plugins.methods.swav import SwAV
from test_sinkhorn import CODES, SCORES
from torch import Tensor

from sslbench import comm
from sslbench.nn.sinkhorn import sinkhorn

pytestmark = pytest.mark.slow  # starts two processes

SIZE, SPLIT, STEPS = 8, 5, 4  # rank 0 has five images, rank 1 three


def train_with_queue(start: int, stop: int) -> dict[str, Tensor]:
    """Losses, the last step's gradients and codes, and the queue; the fourth step uses it for the first time."""
    # Without normalisation, which would see each rank's rows only.
    method = make(SwAV, norm=False, prototypes=12, head_norm=False, queue=3 * SIZE, queue_from_epoch=0)
    found: list[Tensor] = []
    original = method._codes
    method._codes = lambda scores, stored: found.append(original(scores, stored)) or found[-1]
    losses = []
    for step in range(STEPS):
        method.zero_grad()
        loss = method(rows(batch(SIZE, seed=step, step=step), start, stop))["loss"]
        loss.backward()
        losses.append(loss.detach())
        average_gradients(method)
        with torch.no_grad():
            for parameter in method.parameters():
                parameter -= 0.1 * parameter.grad
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    codes = torch.stack([comm.gather(each) for each in found[-2:]])
    return {"losses": torch.stack(losses), "codes": codes, **method.queue.state_dict(), **gradients}


def average_gradients(method: SwAV) -> None:
    for parameter in method.parameters():
        parameter.grad = comm.all_sum(parameter.grad) / comm.world()


def sinkhorn_of_shares(start: int, stop: int) -> dict[str, Tensor]:
    shared = {f"{epsilon}": comm.gather(sinkhorn(SCORES[start:stop], epsilon, 3)) for epsilon in (0.05, 0.01)}
    alone = SCORES if comm.rank() == 0 else SCORES[:0]
    return shared | {"a rank without rows": comm.gather(sinkhorn(alone, 0.05, 3))}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = train_with_queue(*((0, SPLIT) if rank == 0 else (SPLIT, SIZE)))
    codes = sinkhorn_of_shares(*((0, 2) if rank == 0 else (2, 6)))
    largest = comm.all_max(torch.tensor([float(rank), -float(rank)], requires_grad=True))
    torch.save((found, codes, largest), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_training_with_a_queue(of_ranks) -> None:
    expected = train_with_queue(0, SIZE)
    for found, _, _ in of_ranks:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}"
            )


def test_codes_are_balanced_over_all_ranks(of_ranks) -> None:
    for _, codes, _ in of_ranks:
        torch.testing.assert_close(codes["0.05"], CODES, rtol=0, atol=1e-5)
        torch.testing.assert_close(codes["a rank without rows"], CODES, rtol=0, atol=1e-5)
        torch.testing.assert_close(codes["0.01"], sinkhorn(SCORES, 0.01, 3))


def test_maximum_over_ranks(of_ranks) -> None:
    for _, _, largest in of_ranks:
        assert largest.tolist() == [1.0, 0.0]
        assert not largest.requires_grad
