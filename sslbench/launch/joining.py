"""Being one of several processes: entering their world, and noticing that others are gone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sslbench import comm
from sslbench.config.schema import TrainOptions
from sslbench.engine.setup import choose_device
from sslbench.errors import LaunchError, PreemptedError, SslbenchError, described
from sslbench.launch.addresses import interface_towards
from sslbench.launch.environment import is_worker, settle_environment
from sslbench.launch.report import is_regrouping, write_report

PEER_TIMEOUT_S = 600.0
_ROLL_CALL_S = 5.0


class LostPeersError(LaunchError):
    """Other processes of the launch do not answer. Starting all of them again may help."""


@contextmanager
def joined_world(options: TrainOptions, peer_timeout: float = PEER_TIMEOUT_S) -> Iterator[bool]:
    """Be one of the processes that the environment describes; without a launcher, a world of one.

    Args:
        peer_timeout: seconds to wait for another process before it counts as gone.

    Yields:
        Whether this process is the one that reports results.

    Raises:
        LaunchError: variables are missing, or other processes cannot be reached, or no longer.
    """
    if not settle_environment():
        yield True
        return
    with _reporting():
        _join(options, peer_timeout)
        try:
            yield comm.rank() == 0
        except Exception as error:
            if not comm.is_lost_contact(error):
                raise
            raise _lost_peers(error, peer_timeout) from error
        finally:
            comm.leave()


def _join(options: TrainOptions, peer_timeout: float) -> None:
    interface = interface_towards(os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        comm.join(choose_device(options), peer_timeout)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostPeersError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others "
            f"at {address}: {error}",
            hint="check that MASTER_ADDR and MASTER_PORT are those of rank 0 on every node",
        ) from error


def _lost_peers(error: BaseException, peer_timeout: float) -> LostPeersError:
    silent = comm.silent_ranks(_ROLL_CALL_S)
    late = "imed out" in str(error)
    who = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
    what = f"did not answer within {peer_timeout:g} s" if late else "is gone"
    return LostPeersError(
        f"rank {comm.rank()} of {comm.world()} on {socket.gethostname()}: {who} {what}",
        hint="give the same command with --resume NAME to continue from the last checkpoint"
        + ("; --peer-timeout sets how long to wait" if late else ""),
    )


@contextmanager
def _reporting() -> Iterator[None]:
    """Let our launcher know why this process ends; what it will tell the user is not said twice."""
    try:
        yield
    except Exception as error:
        lost = isinstance(error, LostPeersError)
        known: SslbenchError = described(error)
        write_report(known, lost=lost)
        told_by_launcher = lost or (isinstance(error, PreemptedError) and is_regrouping())
        if told_by_launcher and is_worker():
            raise SystemExit(int(known.exit_code)) from error
        raise
