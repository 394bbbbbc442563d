"""Work done by several processes of this machine that form a world, and by single ones."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from sslbench import comm
from sslbench.errors import SslbenchError
from sslbench.testing.report import ConformanceError

Work = Callable[[Any], Any]


def in_worlds(work: Work, jobs: Sequence[Any], world: int, timeout: float) -> tuple[list[list[Any]], list[Any]]:
    """Do each job in a world of so many processes, and in a world of one.

    Args:
        work: a function at the top of a module, from a job to tensors in plain containers.
        timeout: seconds that the processes wait for each other.

    Returns:
        Of each job the results of all ranks, and of each job the result of one process.

    Raises:
        ConformanceError: the work failed on a rank, or the ranks wait for each other for ever.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spawn(_process, args=(folder, work, list(jobs), world, timeout), nprocs=world)  # type: ignore[no-untyped-call]
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _first_failure(folder, error) from None
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
        alone = {number: found for rank in range(world) for number, found in ranks[rank]["alone"].items()}
        together = [[found["together"][number] for found in ranks] for number in range(len(jobs))]
        return together, [alone[number] for number in range(len(jobs))]


def _process(rank: int, folder: Path, work: Work, jobs: list[Any], world: int, timeout: float) -> None:
    torch.set_num_threads(1)
    try:
        comm.meet(folder, rank, world, timeout)
        together = [work(job) for job in jobs]
        comm.leave()
        # Each of the processes does some of the jobs alone.
        alone = {number: work(jobs[number]) for number in range(rank, len(jobs), world)}
        torch.save({"together": together, "alone": alone}, folder / f"rank{rank}.pt")
    except Exception as error:
        _note_failure(folder / "failure.txt", rank, error)
        raise


def _note_failure(path: Path, rank: int, error: Exception) -> None:
    """Only the first one: when a rank is gone, the others fail because of that."""
    hint = f"\n{error.hint}" if isinstance(error, SslbenchError) and error.hint else ""
    text = f"rank {rank}: {type(error).__name__}: {error}{hint}"
    try:
        with path.open("x") as file:
            file.write(f"{text}\n\n{traceback.format_exc()}")
    except FileExistsError:
        return


def _first_failure(folder: Path, error: Exception) -> ConformanceError:
    path = folder / "failure.txt"
    message = path.read_text() if path.exists() else str(error)
    hint = "run it with one process first"
    if "imed out" in message or "imeout" in message:
        hint = "every rank must call the same collectives in the same order, also a rank without suitable rows"
    return ConformanceError(message, hint=hint)
