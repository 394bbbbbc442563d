"""Checks that a plugin keeps its contracts, for the tests of its authors.

from sslbench.testing import check_method

def test_it_keeps_the_contract():
    check_method(MyMethod, options={"prototypes": 12}).raise_if_broken()
"""

from sslbench.testing.backbones import check_backbone
from sslbench.testing.datasets import check_dataset
from sslbench.testing.evals import check_eval
from sslbench.testing.methods import check_method
from sslbench.testing.ranks import check_ranks
from sslbench.testing.report import ConformanceError, Difference, RankReport
from sslbench.testing.rules import Checkup, Verdict

__all__ = [
    "Checkup",
    "ConformanceError",
    "Difference",
    "RankReport",
    "Verdict",
    "check_backbone",
    "check_dataset",
    "check_eval",
    "check_method",
    "check_ranks",
]
