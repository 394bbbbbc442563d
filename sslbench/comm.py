"""The only collectives. Every one is exact in its gradient: N ranks give one rank's gradient.

Without an initialised process group each function is the identity of a world of one.

The convention: each rank holds its rows of the global batch; data-parallel training averages parameter gradients
over ranks. A loss built from :func:`global_mean` has, on every rank, the value of the global mean, and a
gradient that becomes the gradient of that mean after averaging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from sslbench.meeting import Meetings, of_this_attempt

#: What plugins may use; all else is for the core.
__all__ = [
    "all_max",
    "all_sum",
    "barrier",
    "broadcast",
    "broadcast_object",
    "gather",
    "global_mean",
    "on_first_rank",
    "patiently",
    "rank",
    "row_offset",
    "world",
]

Collective = Literal["all_reduce", "all_gather", "broadcast"]


@dataclass(frozen=True)
class Rehearsal:
    """A world that does not exist, for counting what would be exchanged in it."""

    world: int
    note: Callable[[Collective, Tensor], None]
    """Is told each collective and what this rank puts in."""


_rehearsal: Rehearsal | None = None
_meetings: Meetings | None = None
_peer_timeout = 600.0


@contextmanager
def rehearsing(world: int, note: Callable[[Collective, Tensor], None]) -> Iterator[None]:
    """Act as the first rank of a world of so many, all of which hold what this one holds.

    Shapes are those of the real world, values are not.
    """
    global _rehearsal
    before, _rehearsal = _rehearsal, Rehearsal(world, note)
    try:
        yield
    finally:
        _rehearsal = before


def is_active() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the world."""
    if _rehearsal is not None:
        return 0
    return dist.get_rank() if is_active() else 0


def world() -> int:
    """How many processes train together."""
    if _rehearsal is not None:
        return _rehearsal.world
    return dist.get_world_size() if is_active() else 1


def join(device: torch.device, timeout: float = 600.0) -> None:
    """Enter the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, to train on ``device``.

    Args:
        timeout: seconds after which a process that does not answer counts as gone.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Signals and other host values travel through gloo, so that asking for them never waits for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    global _peer_timeout
    _peer_timeout, patience = timeout, timedelta(seconds=timeout)
    store, rank, world, *_ = next(rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    store = of_this_attempt(store, rank, world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def _the_meetings() -> Meetings:
    """Those of the world there is."""
    global _meetings
    store = dist.distributed_c10d._get_default_store()
    if _meetings is None or _meetings.store is not store:
        _meetings = Meetings(store, rank(), world(), _peer_timeout)
    return _meetings


def is_lost_contact(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that other processes are gone or do not answer."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__
    return False


def silent_ranks(seconds: float) -> list[int]:
    """After lost contact: the ranks that do not report within so many seconds to the store they met at."""
    return _the_meetings().silent(seconds)


def meet(folder: Path, rank: int, world: int, timeout: float) -> None:
    """Enter a world of processes of this machine that meet in a folder, to compute on the CPU.

    Args:
        timeout: seconds after which a process that does not answer counts as gone.
    """
    global _peer_timeout
    _peer_timeout, patience = timeout, timedelta(seconds=timeout)
    place = f"file://{folder.resolve()}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world, timeout=patience)


def leave() -> None:
    """Leave the world; each process is then one of its own."""
    global _meetings
    _meetings = None
    _groups.clear()
    dist.destroy_process_group()


def _all_reduce(value: Tensor, operation: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None) -> None:
    if _rehearsal is not None:
        _rehearsal.note("all_reduce", value)
    else:
        dist.all_reduce(value, operation, group)


def _all_gather(parts: list[Tensor], value: Tensor, group: dist.ProcessGroup | None = None) -> None:
    if _rehearsal is not None:
        _rehearsal.note("all_gather", value)
        torch._foreach_copy_(parts, [value] * len(parts))
    else:
        dist.all_gather(parts, value, group)


def _broadcast(value: Tensor, source: int) -> None:
    if _rehearsal is not None:
        _rehearsal.note("broadcast", value)
    else:
        dist.broadcast(value, source)


_groups: dict[int, dist.ProcessGroup] = {}


def neighbours(ranks: int) -> dist.ProcessGroup | None:
    """The group of this rank among groups of so many consecutive ranks; None: the whole world.

    The first call for a size makes the groups, so all ranks must make it at the same point.

    Args:
        ranks: divides the number of ranks.
    """
    if ranks == world() or _rehearsal is not None:
        return None
    if ranks not in _groups:
        # Every rank makes every group in the same order, also those it is not in.
        made = [dist.new_group(list(range(start, start + ranks))) for start in range(0, world(), ranks)]
        _groups[ranks] = cast(dist.ProcessGroup, made[rank() // ranks])
    return _groups[ranks]


def stack(value: Tensor, ranks: int) -> Tensor:
    """``[ranks, ...]``: a tensor of one shape from each of this rank's :func:`neighbours`, without gradient."""
    parts = [torch.empty_like(value) for _ in range(ranks)]
    _all_gather(parts, value, neighbours(ranks))
    return torch.stack(parts)


def add_up(value: Tensor, ranks: int) -> Tensor:
    """Overwrite ``value`` with its sum over this rank's :func:`neighbours`, without gradient, and return it."""
    _all_reduce(value, group=neighbours(ranks))
    return value


class _Gather(torch.autograd.Function):
    """Concatenate rows of all ranks; the backward sums the gradients all ranks have for our rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        sizes = _row_counts(rows)
        ctx.sizes = sizes
        parts = [rows.new_empty((n, *rows.shape[1:])) for n in sizes]
        if len(set(sizes)) == 1:
            _all_gather(parts, rows.contiguous())
        else:
            for source, part in enumerate(parts):
                if source == rank():
                    part.copy_(rows)
                _broadcast(part, source)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        _all_reduce(total)
        start = sum(ctx.sizes[: rank()])
        return total[start : start + ctx.sizes[rank()]]


class _AllSum(torch.autograd.Function):
    """Sum over ranks; the backward sums the gradients of all ranks, each of which used the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        _all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        _all_reduce(total)
        return total


def _row_counts(rows: Tensor) -> list[int]:
    # On the host, because a count on the device would be read by waiting for all its work.
    count = torch.tensor([rows.shape[0]])
    counts = [torch.zeros_like(count) for _ in range(world())]
    _all_gather(counts, count)
    return [int(c) for c in counts]


def gather(rows: Tensor) -> Tensor:
    """Concatenate ``[B, ...]`` of all ranks in rank order to ``[sum B, ...]``, differentiably."""
    if world() == 1:
        return rows
    return cast(Tensor, _Gather.apply(rows))


def row_offset(rows: Tensor) -> int:
    """How many rows of other ranks come before this rank's own in :func:`gather`."""
    return sum(_row_counts(rows)[: rank()]) if world() > 1 else 0


def all_sum(value: Tensor) -> Tensor:
    """Sum a tensor over ranks, differentiably."""
    if world() == 1:
        return value
    return cast(Tensor, _AllSum.apply(value))


def all_max(value: Tensor) -> Tensor:
    """Elementwise maximum over ranks, without gradient."""
    largest = value.detach().clone()
    if world() > 1:
        _all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def global_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of per-row values over the rows of all ranks.

    Args:
        values: ``[N]``; ``N`` may differ between ranks and may be zero.
        weights: ``[N]`` non-negative, or None for ones.

    Returns:
        Scalar, equal on all ranks. With no row anywhere it is 0 and still attached to the graph.
    """
    weights = torch.ones_like(values) if weights is None else weights
    total = all_sum((values * weights).sum())
    count = all_sum(weights.sum().detach())
    return total / count.clamp_min(torch.finfo(total.dtype).tiny)


def broadcast(value: Tensor, source: int = 0) -> Tensor:
    """Overwrite ``value`` with the source rank's copy and return it."""
    if world() > 1:
        _broadcast(value, source)
    return value


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return the source rank's Python object on every rank."""
    if world() == 1 or _rehearsal is not None:
        return value
    box = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1 and _rehearsal is None:
        dist.barrier()


_T = TypeVar("_T")


def patiently(work: Callable[[], _T]) -> _T:
    """Do work that may take hours, and not equally long everywhere, and wait until all ranks have done it.

    For decoding a data set, say. Ranks that are done ask from time to time whether the others are, at the place
    where they have met: in a collective they would run into its time limit.

    A rank that is not heard of while it works, for as long as a collective would wait for it, counts as gone.

    Raises:
        LaunchError: the work has failed on another rank.
        PreemptedError: another rank was asked to stop.
        DistStoreError: another rank is gone; see :func:`is_lost_contact`.
    """
    if world() == 1 or _rehearsal is not None:
        return work()
    meeting = _the_meetings().next()
    with meeting.working():
        result = work()
    meeting.wait()
    return result


def on_first_rank(work: Callable[[], _T]) -> _T:
    """Have the first rank do something quick and tell the others what it gives.

    Raises:
        LaunchError: on the others, if it has failed there; the first rank gets its own error.
    """
    result = patiently(lambda: work() if rank() == 0 else None)
    return cast(_T, broadcast_object(result))


def begin_sum(value: Tensor) -> Callable[[], Tensor]:
    """Start to sum a tensor of the host over ranks and go on; the result waits for the sum and returns it."""
    total = value.clone()
    work = dist.all_reduce(total, async_op=True) if world() > 1 and _rehearsal is None else None

    def finished() -> Tensor:
        if work is not None:
            work.wait()
        return total

    return finished


def shard(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Keep only this rank's rows of each module's parameters on ``device``, and the others while it computes.

    That is torch's FSDP2. A parameter of a module is sharded by the first of the modules that holds it, so inner
    modules come first. Between two passes parameters and their gradients are distributed tensors
    (:func:`own_rows`); gradients are averaged over ranks.
    """
    # Imported here: it takes longer than all of torch that other runs need.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(value: Any) -> bool:
    """Whether a tensor is one of which each rank keeps some rows."""
    return hasattr(value, "to_local")


def own_rows(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's rows of sharded tensors, over the same memory and without graph; others as they are."""
    return [cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def share_of(whole: Tensor) -> Tensor:
    """The rows of a whole tensor that this rank keeps after :func:`shard`; the last ranks may have fewer."""
    rows = -(-len(whole) // world())
    return whole[rank() * rows : (rank() + 1) * rows].clone()
