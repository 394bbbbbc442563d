"""The command line in two processes gives the weights of one, with batch normalisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli
from test_launch import journal, launch
from torch import Tensor

pytestmark = pytest.mark.slow  # three runs, two of them in two processes

STEPS = 20
OPTIONS = (
    "--dataset", "digits", "train.batch_size=63", f"train.limit={STEPS}", "optim.name=sgd", "train.log_every=1",
    "optim.schedule=constant", "probe.every=0", "run.evals=[]", "--json",
)  # fmt: skip
RATES = {"simclr": "optim.lr=0.002", "supervised": "optim.lr=0.002"}
"""At large rates no two machines agree: an activation that rounding puts on the other side of a ReLU's corner
changes a gradient by up to some per cent, and large steps carry that on."""
LOSS, WEIGHTS = 5e-3, 2e-3
"""Largest relative differences: of a loss, and of all weights together."""


def weights(run: Path) -> Tensor:
    state = torch.load(next(run.glob("checkpoints/step-*")) / "backbone.pt", weights_only=True)
    return torch.cat([value.flatten().double() for value in state.values()])


def losses(run: Path) -> list[float]:
    return [values["train/loss"] for _, values in sorted(journal(run).items())]


@pytest.mark.parametrize(("method", "backbone"), [("simclr", "conv4"), ("supervised", "resnet8")])
def test_two_processes_train_as_one_with_batch_normalisation(
    method: str, backbone: str, cli: Cli, workdir: Path
) -> None:
    command = ("pretrain", "--method", method, "--backbone", backbone, *OPTIONS, RATES[method])
    cli(*command, "run.name=one")
    launch((*command, "run.name=two"), workdir, world=2)
    launch((*command, "run.name=apart", "train.sync_bn=false"), workdir, world=2)
    one, two, apart = ((workdir / "runs" / name).resolve() for name in ("one", "two", "apart"))
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=LOSS)
    off, unshared = (float((weights(run) - weights(one)).norm() / weights(one).norm()) for run in (two, apart))
    assert off < WEIGHTS, f"{off:.1e}"
    assert unshared > 5 * off, f"{unshared:.1e} without shared statistics against {off:.1e}"
