"""Several processes train as one, with every built-in method: losses, gradients, weights, queues, banks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from equality import METHODS, title

from sslbench.plugin.catalog import Catalog
from sslbench.testing import RankReport
from sslbench.testing.ranks import Checked, check_all

QUICK = [checked for checked in METHODS if title(checked) in ("byol", "deepcluster_v2", "moco, groups")]
FURTHER = (
    Checked("relationnet", {"hidden": 16, "aggregation": "max", "loss": "bce"}, title="relationnet, max"),
    Checked(
        "moco", {"hidden": 16, "out_dim": 8, "bn_groups": 2, "shuffle_bn": False}, uneven=False, title="moco, 2"
    ),
)
ALL = (*METHODS, *FURTHER)


def test_two_ranks_equal_one_quickly() -> None:
    """An EMA, memory banks and clusters, a queue and shuffled keys."""
    for report in check_all(QUICK, norms=("batch",)):
        assert report.error is None, str(report.error)
        assert report.identical


@pytest.fixture(scope="module")
def reports() -> dict[str, RankReport]:
    return {title(checked): report for checked, report in zip(ALL, check_all(ALL, timeout=300), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [title(checked) for checked in ALL])
def test_two_ranks_equal_one(name: str, reports) -> None:
    report = reports[name]
    assert report.error is None, str(report.error)
    assert report.identical


def test_no_method_is_left_out() -> None:
    catalog = Catalog()
    trained = {name for name in catalog.names("method") if catalog.load("method", name).trains}
    assert trained == {str(checked.method) for checked in METHODS}
