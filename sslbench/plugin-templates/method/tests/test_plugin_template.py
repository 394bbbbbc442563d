"""plugin-template keeps the contract of sslbench, and computes what its paper says."""

import torch
from sslbench.testing import check_method

from sslbench_plugin_template.method import PluginTemplate, negative_cosine, spread


def test_it_keeps_the_contract() -> None:
    check_method(PluginTemplate).raise_if_broken()


def test_without_a_bottleneck_too() -> None:
    options = {"out_dim": 8, "bottleneck": 1}
    check_method(PluginTemplate, options=options, processes=False, compiled=False).raise_if_broken()


def test_the_loss_is_a_cosine() -> None:
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert torch.allclose(negative_cosine(rows, 2 * rows), torch.tensor([-1.0, -1.0]))
    assert torch.allclose(negative_cosine(rows, rows.flip(0)), torch.tensor([-0.6, -0.6]))


def test_the_spread_tells_collapse() -> None:
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    assert spread(rows) > 0.95
    assert spread(torch.ones(1000, 16)) < 1e-3
