"""Batches made on a side stream: in the right order, safe to free, and the same. The device is simulated."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sslbench.data.prefetch import Batches, made_beside, prefetched
from sslbench.plugin.api import Batch, View
from sslbench.rng import Draws


class SimulatedStreams:
    """Notes what happens in which order; tensors are on the meta device, which is no CPU."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.handed: list[list[Tensor]] = []

    def follow(self) -> None:
        self.events.append("follow")

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.events.append("beside")
        yield
        self.events.append("back")

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        self.handed.append(list(tensors))
        self.events.append("hand over")


def _batch(labels: Tensor | None = None) -> Batch:
    parts = [torch.empty(2, device="meta") for _ in range(5)]
    draws = Draws(1, 0, torch.arange(2))
    return Batch((View(*parts[:4]), View(*parts[:4])), parts[4], draws, labels)


def _produce(streams: SimulatedStreams, made: list[Batch], broken: bool = False) -> Batches:
    try:
        for batch in made:
            streams.events.append("make")
            yield batch
        if broken:
            raise OSError("disk")
    finally:
        streams.events.append("closed")


def test_a_batch_is_made_beside_and_handed_over_before_it_is_used() -> None:
    streams, made = SimulatedStreams(), [_batch(), _batch()]
    seen = []
    for batch in made_beside(_produce(streams, made), streams):
        streams.events.append("step")
        seen.append(batch)
    assert seen == made
    one = ["beside", "make", "back", "hand over", "step"]
    assert streams.events == ["follow", *one, *one, "beside", "closed", "back"]


def test_every_tensor_of_a_batch_is_handed_over_once_made() -> None:
    labels, streams = torch.empty(2, device="meta"), SimulatedStreams()
    (batch,) = made_beside(_produce(streams, [_batch(labels)]), streams)
    wanted = {id(tensor) for view in batch.views for tensor in view} | {id(batch.index), id(labels)}
    assert {id(tensor) for tensor in streams.handed[0]} == wanted


def test_tensors_on_the_host_belong_to_no_stream() -> None:
    streams = SimulatedStreams()
    list(made_beside(_produce(streams, [_batch(torch.zeros(2))]), streams))
    assert all(tensor.device.type == "meta" for tensor in streams.handed[0])


def test_nothing_is_made_that_is_not_asked_for() -> None:
    streams = SimulatedStreams()
    batches = made_beside(_produce(streams, [_batch()] * 9), streams)
    next(batches)
    assert streams.events.count("make") == 1
    batches.close()
    assert streams.events[-1] == "closed"


def test_an_error_comes_through_and_leaves_the_side_stream() -> None:
    streams = SimulatedStreams()
    with pytest.raises(OSError, match="disk"):
        list(made_beside(_produce(streams, [_batch()], broken=True), streams))
    assert streams.events.count("closed") == 1


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _numbered(made: list[tuple[int, str, int]], count: int, broken: bool = False) -> Batches:
    """Notes number, thread and torch's threads of each batch."""
    try:
        for number in range(count):
            made.append((number, threading.current_thread().name, torch.get_num_threads()))
            yield _batch(torch.tensor(number))
        if broken:
            raise OSError("disk")
    finally:
        made.append((-1, "closed", 0))


def test_on_a_cpu_each_batch_is_made_in_a_thread_while_the_one_before_is_used(two_cores: None) -> None:
    made: list[tuple[int, str, int]] = []
    batches = prefetched(_numbered(made, 4), torch.device("cpu"), forks=False)
    for number, batch in enumerate(batches):
        assert batch.labels == number
        deadline = time.monotonic() + 60
        while len(made) < number + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(made) == number + 2, "the next one, and no more"
    names = {name for _, name, _ in made[:-1]}
    assert len(names) == 1
    assert threading.current_thread().name not in names
    assert {threads for _, _, threads in made[:-1]} == {1}
    assert torch.get_num_threads() == 2
    assert made[-1] == (-1, "closed", 0)


def test_closing_ends_the_thread_and_the_batches(two_cores: None) -> None:
    made: list[tuple[int, str, int]] = []
    batches = prefetched(_numbered(made, 9), torch.device("cpu"), forks=False)
    next(batches)
    batches.close()
    assert made[-1] == (-1, "closed", 0)
    assert len(made) == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sslbench-batches")]


def test_an_error_in_the_thread_comes_through_in_its_turn(two_cores: None) -> None:
    batches = prefetched(_numbered([], 2, broken=True), torch.device("cpu"), forks=False)
    assert [int(next(batches).labels) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(batches)


@pytest.mark.parametrize(("threads", "forks"), [(1, False), (2, True)])
def test_one_core_and_forking_sources_make_batches_inline(threads: int, forks: bool, two_cores: None) -> None:
    torch.set_num_threads(threads)
    batches = _produce(SimulatedStreams(), [])
    assert prefetched(batches, torch.device("cpu"), forks=forks) is batches
