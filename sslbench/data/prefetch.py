"""Batches made beside the step before them, not after it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sslbench.plugin.api import Batch

Batches = Generator[Batch, None, None]


class Streams(Protocol):
    """Two queues of a device: the one that training uses, and one beside it."""

    def follow(self) -> None:
        """Let the side stream wait for what training has asked for so far."""
        ...

    def beside(self) -> AbstractContextManager[object]:
        """Within it operations go to the side stream."""
        ...

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Let training wait for the side stream, whose memory of ``tensors`` is not used again before training has
        done what it does with them."""
        ...


class CudaStreams:
    """Those of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        training = torch.cuda.current_stream(self._device)
        training.wait_stream(self._side)
        for tensor in tensors:
            tensor.record_stream(training)


def prefetched(batches: Batches, device: torch.device, *, forks: bool) -> Batches:
    """The same batches, made while training computes the step before.

    An accelerator computes them in a stream of its own: the host only asks for operations and waits for nothing,
    so no thread takes part. A CPU makes them in a thread of its own: half of that work is many small operations
    that occupy one core while training could use the others. With one core they are made in turn.

    Args:
        forks: making them starts processes, which are busy beside training anyway; a thread had better not fork.
    """
    if device.type == "cuda":
        return made_beside(batches, _streams(device))
    return batches if forks or torch.get_num_threads() == 1 else made_ahead(batches)


def made_ahead(batches: Batches) -> Batches:
    """Make each batch in a thread while the one before is used. Closing this closes ``batches``.

    One batch is made per batch taken, not as many as fit into a queue: when a step has ended its thread rests, so
    whatever comes between two steps has all cores, and may fork.
    """
    with closing(batches), ThreadPoolExecutor(1, "sslbench-batches") as thread:
        _share_cores(thread)
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _share_cores(thread: ThreadPoolExecutor) -> None:
    """A quarter of the cores for batches; training goes on with all of them, and takes what the thread leaves."""
    threads = torch.get_num_threads()
    thread.submit(_use_threads, max(1, threads // 4)).result()
    torch.set_num_threads(threads)  # of this thread again, and of those yet to start


def _use_threads(number: int) -> None:
    torch.set_num_threads(number)
    torch.get_num_threads()  # a thread that asks for the first time takes the last number that any thread has set


@lru_cache(maxsize=8)
def _streams(device: torch.device) -> CudaStreams:
    """One side stream for all loaders: the memory that torch keeps for a stream serves no other one."""
    return CudaStreams(device)


def made_beside(batches: Batches, streams: Streams) -> Batches:
    """Make each batch on the side stream when it is asked for. Closing this closes ``batches``."""
    streams.follow()
    with closing(batches):
        while True:
            with streams.beside():
                batch = next(batches, None)
            if batch is None:
                return
            streams.hand_over(_on_accelerator(batch))
            yield batch


def _on_accelerator(batch: Batch) -> Iterator[Tensor]:
    tensors = [batch.index, batch.labels, *(tensor for view in batch.views for tensor in view)]
    return (tensor for tensor in tensors if tensor is not None and tensor.device.type != "cpu")
