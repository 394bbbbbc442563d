"""SCRL's own behaviour: which boxes count, what happens without any, and a step at full size."""

from __future__ import annotations

import pytest
import torch
from methods_kit import batch, make
from sslbench_plugins.methods import scrl

from sslbench.nn.bootstrap import BootstrapConfig
from sslbench.plugin.api import Batch, Build, Method, Progress, View
from sslbench.rng import Draws


def without_overlap(data: Batch, images: slice) -> Batch:
    data.views[0].box[images] = torch.tensor([0.0, 0.0, 0.4, 0.4])
    data.views[1].box[images] = torch.tensor([0.6, 0.6, 1.0, 1.0])
    return data


def gradients(method: Method) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


def test_a_batch_without_any_box_gives_zero_loss_attached_to_every_parameter() -> None:
    method = make(scrl.SCRL)
    out = method(without_overlap(batch(), slice(None)))
    out["loss"].backward()
    assert float(out["loss"].detach()) == 0
    assert float(out["boxes"]) == 0
    for name, grad in gradients(method).items():
        assert grad is not None, name
        assert not grad.any(), name


def test_one_image_with_one_box_is_enough() -> None:
    out = make(scrl.SCRL, boxes={"per_image": 1})(without_overlap(batch(), slice(1, None)))
    assert float(out["boxes"]) == pytest.approx(1 / 8)
    assert torch.isfinite(out["loss"])
    assert float(out["loss"].detach()) > 0


def test_images_without_boxes_have_no_influence() -> None:
    method = make(scrl.SCRL, norm=False)
    data, other = (without_overlap(batch(), slice(0, 3)) for _ in range(2))
    other.views[0].images[0:3] = 1.0
    torch.testing.assert_close(method(data)["loss"], method(other)["loss"])
    other.views[0].images[3] = 1.0
    assert not torch.allclose(method(data)["loss"], method(other)["loss"])


def test_boxes_depend_on_the_step() -> None:
    method = make(scrl.SCRL)
    assert not torch.equal(method(batch(step=0))["loss"], method(batch(step=1))["loss"])


def test_least_side_is_one_cell_of_the_map_unless_set() -> None:
    def boxes(**options: object) -> float:
        return float(make(scrl.SCRL, boxes=options)(batch())["boxes"])

    assert boxes() == boxes(min_size=8) == 10
    assert boxes(min_size=31) == 0


def test_identical_views_and_a_copied_target_differ_only_by_the_predictor() -> None:
    """With the predictor replaced by the identity the loss of one view against itself vanishes."""
    method = make(scrl.SCRL, target_init="copy")
    method.predictor = torch.nn.Identity()
    data = batch()
    data.views = (data.views[0], data.views[0])
    assert float(method(data)["loss"].detach()) == pytest.approx(0, abs=1e-5)


def test_views_follow_the_papers_asymmetry() -> None:
    first, second = BootstrapConfig().views
    assert (first.blur.p, second.blur.p) == (1.0, 0.1)
    assert (first.solarize, second.solarize) == (0.0, 0.2)


@pytest.mark.slow
def test_a_resnet50_step_at_224_pixels() -> None:
    from sslbench_plugins.backbones.resnet import ResNet50

    torch.manual_seed(0)
    build = Build(lambda: ResNet50(ResNet50.Config(), 224), 2, 2, 10, 1)
    method = scrl.SCRL(scrl.SCRLConfig(), build)
    assert method.projector[0].out_features == 4096
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.1, 0.9, 0.9]])
    size = torch.tensor([[500.0, 375.0]]).expand(2, 2)
    flips = (torch.tensor([False, True]), torch.tensor([True, True]))
    views = tuple(View(torch.randn(2, 3, 224, 224), whole, flip, size) for flip in flips)
    index = torch.arange(2)
    out = method(Batch(views, index, Draws(0, 0, index)))
    out["loss"].backward()
    assert float(out["boxes"]) == 10
    for name, grad in gradients(method).items():
        assert grad is not None, name
        assert torch.isfinite(grad).all(), name
    before = method.target_backbone.module.conv1.weight.clone()
    method.after_step(Progress(0, 10, 1))
    assert not torch.equal(method.target_backbone.module.conv1.weight, before)
