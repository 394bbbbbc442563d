"""Batches made beside the step that an accelerator computes, not after it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
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


def prefetched(batches: Batches, device: torch.device) -> Batches:
    """The same batches; on an accelerator their copies and augmentations run beside the step before.

    The host only asks a device for operations and goes on, so it draws and copies for the next batch while the
    device still computes. In the stream of training that batch would come after the step; in its own, beside it.
    No thread takes part: the host waits for nothing here, and a CPU with few cores makes batches fastest inline.
    """
    return made_beside(batches, _streams(device)) if device.type == "cuda" else batches


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
