"""plugin-template keeps the contract of sslbench, for models of several families."""

import pytest
import torch
from sslbench.errors import ConfigError
from sslbench.testing import check_backbone

from sslbench_plugin_template.backbone import PluginTemplate, PluginTemplateOptions

pytest.importorskip("timm")

FAMILIES = ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"]


def built(size: int, model: str = "resnet18", stage: int = -1) -> PluginTemplate:
    return PluginTemplate(PluginTemplateOptions(model=model, stage=stage), image_size=size)


def test_it_keeps_the_contract() -> None:
    check_backbone(PluginTemplate).raise_if_broken()


@pytest.mark.parametrize("model", FAMILIES)
def test_dim_and_stride_are_those_of_the_map(model: str) -> None:
    backbone = built(64, model).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 64, 64))
    side = 64 // backbone.stride
    assert features.map.shape == (2, backbone.dim, side, side)
    assert torch.allclose(features.pooled, features.map.mean((2, 3)))


def test_an_earlier_stage_has_a_finer_map() -> None:
    last, before = (built(32, stage=stage) for stage in (-1, -2))
    assert (last.stride, before.stride) == (32, 16)


def test_a_misspelt_model_is_answered_with_its_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        built(32, "resnet_18")


def test_a_stage_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage 9 of 'resnet18'"):
        built(32, stage=9)
