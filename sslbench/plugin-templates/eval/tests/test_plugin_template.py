"""plugin-template keeps the contract of sslbench, on every layer."""

import pytest
import torch
from sslbench.errors import ConfigError
from sslbench.plugin.api import Features
from sslbench.testing import check_eval

from sslbench_plugin_template.eval import PluginTemplate, cells


@pytest.mark.parametrize("layer", ["pooled", "map", "stem"])
def test_it_keeps_the_contract(layer: str) -> None:
    check_eval(PluginTemplate, options={"layer": layer}).raise_if_broken()


def test_cells_are_averages_of_the_map() -> None:
    features = Features(torch.zeros(1, 1), torch.arange(16.0).view(1, 1, 4, 4))
    assert cells(features, "map", 1).tolist() == [[7.5]]
    assert cells(features, "map", 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_a_backbone_without_a_stem_is_named() -> None:
    with pytest.raises(ConfigError, match="no stem"):
        cells(Features(torch.zeros(1, 1), torch.zeros(1, 1, 4, 4)), "stem", 1)
