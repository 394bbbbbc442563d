"""Signals in work that has no state to save: nothing that handles errors may keep them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from sslbench.engine.checkpoint import load_tensors
from sslbench.engine.stopping import StopSignal, stopping_at_once
from sslbench.errors import ExitCode, PreemptedError


def strike(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


def stopped_in_work(number: signal.Signals) -> None:
    with stopping_at_once("all is kept", "again"):
        with suppress(Exception):
            strike(number)
        pytest.fail("the work went on")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, ExitCode.PREEMPTED), (signal.SIGINT, ExitCode.INTERRUPTED)]
)
def test_a_handler_of_all_errors_does_not_keep_a_signal(number: signal.Signals, code: ExitCode) -> None:
    before = signal.getsignal(number)
    words = f"stopped by {number.name}; all is kept"
    with pytest.raises(PreemptedError, match=words) as caught:
        stopped_in_work(number)
    assert (caught.value.exit_code, caught.value.hint) == (code, "again")
    assert signal.getsignal(number) is before


def test_a_signal_while_a_file_is_read_does_not_make_it_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")

    def slow(*_: Any, **__: Any) -> None:
        strike(signal.SIGTERM)

    monkeypatch.setattr(torch, "load", slow)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM"), stopping_at_once("", ""):
        load_tensors(tmp_path / "a.pt")


def test_a_signal_after_the_last_step_is_not_forgotten() -> None:
    stop = StopSignal()
    with stop.listening():
        assert not stop.agreed()
        assert not stop.agreed_at_the_end()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed_at_the_end()
    assert stop.received == signal.SIGUSR1
