"""The fused form of colours: equal to the exact one where nothing is approximated, and near it elsewhere."""

from __future__ import annotations

import pytest
import torch
from reference import photo_tiles

from sslbench.data.augment import Normalization
from sslbench.data.fused import compose_affine, run_affine
from sslbench.data.grouping import Arranged
from sslbench.data.jitter import compose, run
from sslbench.data.photometric import apply_colors, draw_colors, jitter_orders
from sslbench.data.views import ViewExecutor
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

NORMALIZATION = Normalization(torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


@pytest.fixture
def images():
    return photo_tiles(24, 24)[::10].float() / 255


def both(images, spec):
    draws = Draws(3, 1, torch.arange(len(images)))
    return [apply_colors(images, spec, draw_colors(spec, draws, ["v"], fused)) for fused in (False, True)]


def test_equal_to_the_exact_form_where_no_clamp_acts_and_no_hue_turns(images):
    """Values between 0.3 and 0.6 and factors between 0.75 and 1.25, in all orders, some to grey, normalised."""
    images = 0.3 + 0.3 * images
    count = len(images)
    draws = Draws(0, 0, torch.arange(count))
    factors = 0.75 + 0.5 * draws.uniform("factors", 4)
    orders = jitter_orders(torch.arange(count) % 24 / 24)
    flags = draws.uniform("flags", 2)
    arguments = (orders, factors, flags[:, 0] < 0.8, False, flags[:, 1] < 0.3)
    arranged = Arranged(images)
    run(arranged, compose(*arguments), NORMALIZATION)
    fused = run_affine(images, compose_affine(*arguments), NORMALIZATION)
    assert (fused - images).abs().mean() > 0.1
    assert (fused - arranged.restore()).abs().max() < 1e-5


def test_turning_by_thirds_permutes_the_channels(images):
    count = len(images)
    factors = torch.tensor([1.0, 1.0, 1.0, 1 / 3]).repeat(count, 1)
    everyone = torch.ones(count, dtype=torch.bool)
    colors = compose_affine(torch.arange(4).expand(count, 4), factors, everyone, True, ~everyone)
    assert (run_affine(images, colors, None) - images[:, [2, 0, 1]]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("jitter", "bound"),
    [
        (Jitter(p=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.0), 6),
        (Jitter(p=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2), 12),
        (Jitter(p=1), 9),
    ],
)
def test_mean_difference_in_levels_is_bounded(images, jitter, bound):
    exact, fused = both(images, ViewSpec(jitter=jitter, gray=0.2))
    assert fused.min() >= 0
    assert fused.max() <= 1
    assert 0.1 < 255 * (exact - fused).abs().mean() < bound < 255 * (exact - images).abs().mean() / 2


def test_same_images_are_jittered_greyed_and_blurred(images):
    spec = ViewSpec(jitter=Jitter(p=0.5), gray=0.3, blur=Blur(p=0.5, sigma=(1.0, 2.0)), solarize=0.2)
    exact, fused = both(images, spec)
    for property_of in (
        lambda views: ((views - images).abs() > 1e-3).flatten(1).any(1),
        lambda views: ((views - views[:, :1]).abs() < 1e-5).flatten(1).all(1),
    ):
        assert torch.equal(property_of(exact), property_of(fused))


def test_executor_offers_both_forms():
    images, positions = photo_tiles(32, 32)[:48], torch.arange(48)
    spec = ViewSpec(count=2, jitter=Jitter(hue=0), gray=0.2, blur=Blur(), autoaugment=0.2)
    results = []
    for colors in ("exact", "fused"):
        views = ViewExecutor(
            [spec], size=32, mean=(0.5,) * 3, std=(0.25,) * 3, device=torch.device("cpu"), colors=colors
        )
        draws, sizes = Draws(9, 5, positions), torch.tensor([32, 32]).expand(48, 2)
        geometry = views.geometry(draws, sizes)
        results.append(views.finish(views.crop(images, geometry), geometry, draws, sizes))
    for exact, fused in zip(*results, strict=True):
        assert torch.equal(exact.box, fused.box)
        assert 0 < (exact.images - fused.images).abs().mean() < 0.1
