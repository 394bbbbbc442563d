"""Where the launchers of all machines meet, through ``torch.distributed``'s rendezvous.

The handler there gives ranks by sorting addresses; ours lets the first machine, or the user, decide, and hands out
a fresh port for every start of the workers: a store that is kept would still hold what the last ones have written.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from sslbench.errors import LaunchError
from sslbench.launch.addresses import free_port, is_own_address, own_address
from sslbench.launch.request import LaunchRequest, Meeting
from sslbench.meeting import answered

#: Workers then meet at a port of their own, see above. Asked by torch for every rendezvous.
_SHARE_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_ANSWER_S = 60.0
_ATTEMPT_S = 5.0
_TAKEN_S = 15.0
"""After which a port of this machine that answers nothing is another program's."""
_LAST = 1 << 20


class Node(NamedTuple):
    """One machine of a launch."""

    wish: int
    """The number it would like to have."""
    address: str
    host: str
    pid: int


class Rendezvous(RendezvousHandler):
    """Gathers the machines of a launch."""

    def __init__(self, request: LaunchRequest, place: Meeting) -> None:
        fewest, most = request.nodes()
        self._single = most == 1
        here = self._single or is_own_address(place.host)
        store, self.first = (HashStore(), True) if self._single else _meet(place, here, request.peer_timeout)
        self._node = Node(
            (0 if self.first else _LAST) if request.node_rank is None else request.node_rank,
            place.host if here else own_address(place.host),
            socket.gethostname(),
            os.getpid(),
        )
        self.nodes: list[Node] = [self._node]
        wait = max(1, round(request.peer_timeout))
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=f"{place.host}:{place.port}",
            run_id=place.launch_id,
            min_nodes=fewest,
            max_nodes=most,
            local_addr=self._node.address,
            join_timeout=wait,
        )
        os.environ[_SHARE_STORE] = "1"
        self._inner = create_handler(store, C10dRendezvousBackend(store, place.launch_id), parameters)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other machines, and agree on their order and on where the workers meet."""
        found = self._inner.next_rendezvous()
        store = found.store
        store.set(f"node/{found.rank}", json.dumps(self._node))
        self.nodes = sorted(Node(*json.loads(store.get(f"node/{n}"))) for n in range(found.world_size))
        rank = self.nodes.index(self._node)
        if rank == 0:
            store.set("workers' port", str(free_port()))
        port = int(store.get("workers' port"))
        return RendezvousInfo(store, rank, found.world_size, RendezvousStoreInfo(self.nodes[0].address, port))

    def get_backend(self) -> str:
        """See base class."""
        return self._inner.get_backend()

    def is_closed(self) -> bool:
        """See base class."""
        return self._inner.is_closed()

    def set_closed(self) -> None:
        """See base class."""
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """See base class."""
        return 0 if self._single else self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        """See base class."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """See base class."""
        return self._inner.shutdown()


def _meet(place: Meeting, here: bool, wait: float) -> tuple[Store, bool]:
    """The store of all machines, and whether this launcher has it.

    Args:
        here: whether the place is on this machine, where another launcher may have the store already.
    """
    try:
        socket.getaddrinfo(place.host, place.port)
    except socket.gaierror as error:
        raise LaunchError(
            f"--rdzv-endpoint {place.host}:{place.port}: nothing here knows a machine of this name",
            hint="name its address, or see to /etc/hosts or the name server",
        ) from error
    deadline = time.monotonic() + (min(wait, _TAKEN_S) if here else wait)
    while True:
        for first in [True, False] if here else [False]:
            with suppress(ValueError, RuntimeError):
                return answered(partial(_store, place, first), _ATTEMPT_S + 1.0), first
        if time.monotonic() > deadline:
            raise _unanswered(place, here)


def _unanswered(place: Meeting, here: bool) -> LaunchError:
    if here:
        return LaunchError(
            f"port {place.port} of this machine is in use by another program (--rdzv-endpoint)",
            hint="name another port, on all machines",
        )
    return LaunchError(
        f"nobody answers at {place.host}:{place.port} (--rdzv-endpoint)",
        hint="start the command on the machine with this address, and see that the port is open",
    )


def _store(place: Meeting, first: bool) -> Store:
    store = TCPStore(
        place.host,
        place.port,
        is_master=first,
        multi_tenant=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_ATTEMPT_S),
    )
    store.set_timeout(timedelta(seconds=_ANSWER_S))
    return store
