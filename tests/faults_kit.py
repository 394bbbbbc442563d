"""The command line in this process, on tiny runs, with an MLflow store that refuses connections at once."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from sslbench.cli import run
from sslbench.tracking import store

NOWHERE = "http://127.0.0.1:9"
METHOD = "--method simclr --backbone conv4 method.hidden=8 method.out_dim=4 evals.linear.epochs=1 probe.every=0"
DIGITS = f"{METHOD} --dataset digits train.batch_size=256 train.epochs=1"


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Command]:
    """Type a command; it fails unless the exit code is as expected, and if a traceback is shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setattr(store, "_outages", {})

    def type_in(line: str, code: int = 0) -> Done:
        capsys.readouterr()
        caplog.clear()
        found = int(run(shlex.split(line)))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert found == code, f"exit code {found}\n{out}\n{err}"
        return Done(found, out, err + caplog.text)  # pytest takes log lines away from stderr

    yield type_in
    torch.set_deterministic_debug_mode("default")


def run_dir(name: str, root: str = "runs") -> Path:
    return Path(root, name).resolve()


def status(name: str, root: str = "runs") -> str:
    return str(json.loads((run_dir(name, root) / "run.json").read_text())["status"])


def checkpoints(name: str, root: str = "runs") -> list[Path]:
    return sorted(run_dir(name, root).glob("checkpoints/step-????????"))


def make_images(
    root: Path, splits: tuple[str, ...] = ("train", "test"), classes: str = "ab", count: int = 8, side: int = 12
) -> None:
    """A folder data set of noise."""
    rng = np.random.default_rng(0)
    for folder in (root / split / name for split in splits for name in classes):
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
