"""Batch normalisation over the rows of several processes is that of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.sync_norm import SharedBatchNorm, is_shared, share_statistics

pytestmark = pytest.mark.slow  # starts four processes

WORLD = 4
CPU = torch.device("cpu")
IMAGES, ROWS = (9, 3, 5, 4), (9, 3)
SHARES = {"even": (3, 2, 2, 2), "uneven": (6, 1, 1, 1), "a rank without rows": (5, 0, 2, 2)}
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "2d": (nn.BatchNorm2d(3), IMAGES),
    "1d": (nn.BatchNorm1d(3), ROWS),
    "1d of sequences": (nn.BatchNorm1d(3), (9, 3, 6)),
    "cumulative": (nn.BatchNorm2d(3, momentum=None), IMAGES),
    "without scale": (nn.BatchNorm2d(3, affine=False), IMAGES),
    "frozen scale": (nn.BatchNorm2d(3).requires_grad_(False), IMAGES),
    "without running statistics": (nn.BatchNorm2d(3, track_running_stats=False), IMAGES),
    "far from zero": (nn.BatchNorm2d(3), IMAGES),
}


def network(name: str) -> nn.Sequential:
    norm = copy.deepcopy(CASES[name][0])
    if norm.weight is not None:
        norm.weight.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
        norm.bias.data.copy_(torch.tensor([0.1, 0.2, -0.3]))
    return nn.Sequential(norm)


def rows(name: str, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(CASES[name][1], generator=generator, dtype=torch.float64)
    return (drawn + (1000 if name == "far from zero" else 0)).to(dtype)


def weights(values: Tensor) -> Tensor:
    """Any numbers, so that the gradient is not the same for all rows."""
    return torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view(values.shape)


def mine(values: Tensor, share: tuple[int, ...]) -> Tensor:
    return values.split(share)[comm.rank()] if comm.world() > 1 else values


def two_steps(module: nn.Sequential, name: str, share: tuple[int, ...], **cast: Any) -> dict[str, Tensor]:
    """Outputs, gradients of input and parameters, and state after two batches."""
    found: dict[str, Tensor] = {}
    for step in range(2):
        everything = rows(name, step)
        own = mine(everything, share).to(**cast).requires_grad_()
        out = module(own)
        (out * mine(weights(everything), share).to(out)).sum().backward()
        assert own.grad is not None
        found |= {f"out {step}": out.detach(), f"input {step}": own.grad}
    found |= {f"grad {key}": p.grad for key, p in module.named_parameters() if p.requires_grad}
    return found | dict(module.state_dict())


def of_all_ranks(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows gathered, gradients of parameters summed as data-parallel training does; the rest as it is."""
    return {key: _joined(key, value) for key, value in found.items()}


def _joined(key: str, value: Tensor) -> Tensor:
    if key.startswith(("out", "input")):
        return comm.gather(value)
    # The sum, because the loss here is a sum over ranks and not, as in training, the same one on every rank.
    return comm.all_sum(value) if key.startswith("grad") else value


def in_groups() -> dict[str, Tensor]:
    """Two pairs of ranks, each as one process with its rows."""
    norm = share_statistics(network("2d"), 2, CPU)
    return of_all_ranks(two_steps(norm, "2d", SHARES["uneven"]))


def refusals() -> list[str]:
    messages = []
    for call in (lambda: share_statistics(network("1d"), 3, CPU), _one_value):
        try:
            call()
        except (ConfigError, ValueError) as error:
            messages.append(str(error))
    return messages


def _one_value() -> None:
    share_statistics(network("1d"), WORLD, CPU)(torch.ones(int(comm.rank() == 0), 3))


def half_precision() -> dict[str, Tensor]:
    norm = share_statistics(network("2d"), WORLD, CPU)
    share = SHARES["uneven"]
    return of_all_ranks(two_steps(norm, "2d", share, dtype=torch.bfloat16, memory_format=torch.channels_last))


def layouts() -> list[bool]:
    norm = share_statistics(nn.Sequential(nn.BatchNorm2d(8)), WORLD, CPU)
    own = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    out = norm(own)
    (out * out).sum().backward()
    assert own.grad is not None
    return [value.is_contiguous(memory_format=torch.channels_last) for value in (out, own.grad)]


def evaluated() -> Tensor:
    norm = share_statistics(network("2d"), WORLD, CPU)
    norm(mine(rows("2d", 0), SHARES["even"]))
    return norm.eval()(rows("2d", 1))


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    found = {
        (name, share): of_all_ranks(two_steps(share_statistics(network(name), WORLD, CPU), name, SHARES[share]))
        for name in CASES
        for share in SHARES
    }
    others = {
        "groups": in_groups(), "refusals": refusals(), "half": half_precision(), "layouts": layouts(),
        "evaluated": evaluated(),
    }  # fmt: skip
    torch.save({"cases": found, **others}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("norm")
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name: str, share: str, ranks) -> None:
    expected = two_steps(network(name), name, (9,))
    tolerance = 2e-3 if name == "far from zero" else 2e-6
    for rank in ranks:
        found = rank["cases"][name, share]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=tolerance, atol=tolerance, msg=lambda t, k=key: k + t
            )


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(name: str, ranks) -> None:
    first, *others = (rank["cases"][name, "uneven"] for rank in ranks)
    assert all(torch.equal(other[key], first[key]) for other in others for key in first)


def test_without_sharing_the_ranks_differ(ranks) -> None:
    """Otherwise the equality above would show nothing."""
    whole = two_steps(network("2d"), "2d", (9,))
    part = network("2d")(rows("2d", 0)[:6])
    assert (part - whole["out 0"][:6]).abs().max() > 0.05


def test_far_from_zero_is_closer_to_exact_than_sums_of_squares_would_be(ranks) -> None:
    """In fp32 a mean of squares of 1e6 is good to 0.06, and the variance here is 1."""
    exact = rows("far from zero", 0, torch.float64).var((0, 2, 3))
    found = ranks[0]["cases"]["far from zero", "uneven"]
    first = rows("far from zero", 1, torch.float64).var((0, 2, 3))
    expected = 0.9 * (0.9 + 0.1 * exact) + 0.1 * first
    torch.testing.assert_close(found["0.running_var"].double(), expected, rtol=1e-5, atol=0)


def test_groups_are_processes_of_their_own(ranks) -> None:
    for start, stop, pair in ((0, 7, (0, 1)), (7, 9, (2, 3))):
        norm = network("2d")
        for step in range(2):
            out = norm(rows("2d", step)[start:stop])
            for rank in pair:
                torch.testing.assert_close(ranks[rank]["groups"][f"out {step}"][start:stop], out)
        for rank in pair:
            torch.testing.assert_close(ranks[rank]["groups"]["0.running_var"], norm[0].running_var)


def test_sizes_of_groups_and_of_batches_are_checked(ranks) -> None:
    for rank in ranks:
        size, values = rank["refusals"]
        assert size == "train.sync_bn=3 must divide the number of processes (4)"
        assert values == "expected more than 1 value per channel over 4 ranks in training, got 1"


def test_half_precision_keeps_its_type_and_uses_fp32_inside(ranks) -> None:
    expected = two_steps(network("2d"), "2d", (9,))
    found = ranks[0]["half"]
    assert found["out 0"].dtype == found["input 0"].dtype == torch.bfloat16
    assert found["0.running_mean"].dtype == torch.float32
    for key, value in expected.items():
        torch.testing.assert_close(found[key].to(value), value, rtol=2e-2, atol=2e-2, msg=lambda t, k=key: k + t)


def test_layout_is_kept_and_eval_mode_is_ordinary(ranks) -> None:
    assert ranks[0]["layouts"] == [True, True]
    ordinary = network("2d")
    ordinary(rows("2d", 0))
    for rank in ranks:
        torch.testing.assert_close(rank["evaluated"], ordinary.eval()(rows("2d", 1)))


def test_one_process_is_untouched() -> None:
    ordinary = network("2d")
    assert type(share_statistics(ordinary, True, CPU)[0]) is nn.BatchNorm2d
    shared = nn.Sequential(SharedBatchNorm.like(copy.deepcopy(ordinary)[0], 2))
    assert (is_shared(ordinary), is_shared(shared)) == (False, True)
    assert torch.equal(copy.deepcopy(shared)(rows("2d", 0)), ordinary(rows("2d", 0)))
    assert shared.state_dict().keys() == ordinary.state_dict().keys()
