"""Rotation prediction: what a quarter turn is, the order of the batch, and the method."""

from __future__ import annotations

import pytest
import torch
from methods_kit import batch, make
from pydantic import ValidationError
from sslbench_plugins.methods.rotationnet import RotationNet, RotationNetConfig, four_rotations


def test_turns_are_counter_clockwise() -> None:
    image = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).expand(1, 3, 2, 2)
    turned, _ = four_rotations(image)
    assert [t[0].tolist() for t in turned] == [
        [[0, 1], [2, 3]],
        [[1, 3], [0, 2]],
        [[3, 2], [1, 0]],
        [[2, 0], [3, 1]],
    ]


def test_all_images_of_one_rotation_follow_each_other() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 4, 4)
    turned, turns = four_rotations(images)
    assert turned.shape == (12, 3, 4, 4)
    assert turned[:, 0, 0, 0].tolist() == [0, 1, 2] * 4
    assert turns.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_loss_and_accuracy_are_those_of_the_linear_classifier() -> None:
    method = make(RotationNet).eval()
    data = batch()
    images, turns = four_rotations(data.views[0].images)
    logits = method.classifier(method.backbone(images).pooled)
    found = method(data)
    assert tuple(method.classifier.weight.shape) == (4, 16)
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(logits, turns))
    assert float(found["accuracy"]) == pytest.approx(100 * float((logits.argmax(1) == turns).float().mean()))


@pytest.mark.parametrize("views", [[], [{"count": 2}]])
def test_wrong_views_are_refused(views) -> None:
    with pytest.raises(ValidationError, match="one view"):
        RotationNetConfig(views=views)


def test_learns_which_way_is_up() -> None:
    """Images that are bright at the top."""
    method = make(RotationNet)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for step in range(30):
        data = batch(16, views=1, seed=step)
        data.views[0].images[:, :, :16] += 2
        output = method(data)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    assert float(output["accuracy"]) > 90
