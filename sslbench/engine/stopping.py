"""Signals that ask a run to stop: SIGTERM and SIGUSR1 of a scheduler, SIGINT (Ctrl-C) of a person."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from sslbench import comm
from sslbench.errors import ExitCode, PreemptedError, StopNow

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class StopSignal:
    """Notes a signal, so that the training loop can finish its step and save."""

    received: int | None = None
    _asked: Callable[[], torch.Tensor] | None = field(default=None, repr=False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of signals inside instead of dying of them."""
        with _handling(self._receive):
            yield

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step to end
        self.received = number

    def agreed_at_the_end(self) -> bool:
        """Whether any rank was asked to stop by now, after the last step; all ranks get the same answer."""
        if self._asked is not None:
            self._asked()
        return bool(comm.all_max(torch.tensor(float(self.received is not None))))

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer at the same call.

        Among several ranks it is the answer to what the call before asked, so that nobody waits for it: a signal
        counts one call later.
        """
        if comm.world() == 1:
            return self.received is not None
        if self._asked is not None and bool(self._asked()):
            return True
        self._asked = comm.begin_sum(torch.tensor(float(self.received is not None)))
        return False


def stopped_by(number: int | None, message: str, hint: str) -> PreemptedError:
    """The error that ends a stopped run: exit code 130 after Ctrl-C, else 75, which schedulers start again."""
    name = signal.Signals(number).name if number else "another rank's signal"
    error = PreemptedError(f"stopped by {name}; {message}", hint=hint)
    error.title = "Interrupted" if number == signal.SIGINT else "Preempted"
    if number == signal.SIGINT:
        error.exit_code = ExitCode.INTERRUPTED
    return error


@contextmanager
def stopping_at_once(message: str, hint: str) -> Iterator[None]:
    """For work that has no state to save: a signal ends it where it is.

    Raises:
        PreemptedError: there was one; inside it is a :class:`~sslbench.errors.StopNow`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopNow(stopped_by(number, message, hint))

    try:
        with _handling(stop):
            yield
    except StopNow as stopped:
        raise stopped.error from None


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
