"""SCRL on two processes of which one has no image with boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_kit import batch, make, rows
from sslbench_plugins.methods.scrl import SCRL
from torch import Tensor

from sslbench import comm
from sslbench.nn.sync_norm import share_statistics
from sslbench.plugin.api import Batch
from sslbench.testing.compare import relative_difference
from sslbench.testing.worlds import in_worlds

pytestmark = pytest.mark.slow  # starts two processes

SIZE, SPLIT = 6, 4  # rank 0 has four images, rank 1 two
WITHOUT = {"one of rank 0": slice(1, 2), "all of rank 1": slice(SPLIT, SIZE), "all": slice(0, SIZE)}


def share(without: slice) -> Batch:
    whole = batch(SIZE, seed=2)
    whole.views[0].box[without] = torch.tensor([0.0, 0.0, 0.4, 0.4])
    whole.views[1].box[without] = torch.tensor([0.6, 0.6, 1.0, 1.0])
    start, stop = ((0, SPLIT), (SPLIT, SIZE))[comm.rank()] if comm.world() > 1 else (0, SIZE)
    return rows(whole, start, stop)


def step(case: tuple[str, bool]) -> dict[str, Tensor]:
    """Loss, averaged gradients and statistics; with statistics over both processes, or each its own."""
    name, sync_bn = case
    method = share_statistics(make(SCRL, boxes={"per_image": 3}), sync_bn, torch.device("cpu"))
    loss = method(share(WITHOUT[name]))["loss"]
    loss.backward()
    found: dict[str, Any] = {"loss": loss.detach(), **method.state_dict()}
    for key, parameter in method.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {key}"] = comm.all_sum(parameter.grad) / comm.world()
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, bool], tuple[list[dict[str, Tensor]], dict[str, Tensor]]]:
    cases = [(name, sync_bn) for name in WITHOUT for sync_bn in (True, False)]
    together, alone = in_worlds(step, cases, world=2, timeout=60)
    return dict(zip(cases, zip(together, alone, strict=True), strict=True))


@pytest.mark.parametrize("name", WITHOUT)
def test_two_ranks_equal_one(name: str, found) -> None:
    together, alone = found[name, True]
    for rank in together:
        assert rank.keys() == alone.keys()
        for key, value in alone.items():
            assert relative_difference(rank[key], value, floor=1e-3) < 1e-4, key


def test_statistics_of_each_process_get_along_with_a_rank_without_boxes(found) -> None:
    for name in WITHOUT:
        together, _ = found[name, False]
        assert all(bool(value.isfinite().all()) for value in together[1].values()), name
