"""Checks that a plugin keeps its contracts, for the tests of its authors.

from sslbench.testing import check_ranks

def test_several_processes_train_as_one():
    check_ranks(MyMethod, options={"prototypes": 12})
"""

from sslbench.testing.backbones import check_backbone
from sslbench.testing.datasets import check_dataset
from sslbench.testing.ranks import check_ranks
from sslbench.testing.report import ConformanceError, Difference, RankReport

__all__ = ["ConformanceError", "Difference", "RankReport", "check_backbone", "check_dataset", "check_ranks"]
