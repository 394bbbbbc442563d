"""Each colour kernel against torchvision's operation with the same fixed parameter."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from reference import from_pil, photo_tiles, to_pil
from torchvision.transforms.v2 import functional as TF

from sslbench.data import augment
from sslbench.data.grouping import Arranged
from sslbench.data.jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION, compose, run
from sslbench.data.photometric import augment_colors, blur_radius, changes_colors, jitter_factors, jitter_orders
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

FLOAT_TOLERANCE = 3e-6
"""The same formula in another order of operations."""


@pytest.fixture
def images():
    """Photographs and awkward cases: constant, grey, black, white, saturated and random pixels."""
    images = photo_tiles(24, 24)[::20].float() / 255
    generator = torch.Generator().manual_seed(0)
    images[0] = 0.5
    images[1] = images[1, :1]
    images[2], images[3] = 0, 1
    images[4] = (torch.rand(3, 24, 24, generator=generator) > 0.5).float()
    images[5] = torch.rand(3, 24, 24, generator=generator)
    return images


JITTERS = [
    ("brightness", BRIGHTNESS, TF.adjust_brightness, (0.0, 1.9)),
    ("contrast", CONTRAST, TF.adjust_contrast, (0.0, 1.9)),
    ("saturation", SATURATION, TF.adjust_saturation, (0.0, 1.9)),
    ("hue", HUE, TF.adjust_hue, (-0.5, 0.5)),
]


def adjust(images: torch.Tensor, operation: int, parameter: torch.Tensor) -> torch.Tensor:
    """One operation of jitter, the others neutral."""
    count = len(images)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1)
    factors[:, operation] = parameter
    everyone, nobody = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    arranged = Arranged(images)
    orders = torch.arange(4).expand(count, 4)
    run(arranged, compose(orders, factors, everyone, turns=operation == HUE, gray=nobody), None)
    return arranged.restore()


@pytest.mark.parametrize(("name", "operation", "theirs", "limits"), JITTERS, ids=[j[0] for j in JITTERS])
def test_jitter_kernels_equal_torchvision(images, name, operation, theirs, limits):
    parameter = torch.linspace(*limits, len(images))[torch.randperm(len(images))]
    before = images.clone()
    expected = torch.stack([theirs(i, p.item()) for i, p in zip(images, parameter, strict=True)])
    assert (adjust(images, operation, parameter) - expected).abs().max() < FLOAT_TOLERANCE
    assert torch.equal(images, before), "the input must stay as it was"


@pytest.mark.parametrize(("name", "operation", "theirs", "limits"), JITTERS, ids=[j[0] for j in JITTERS])
def test_neutral_parameter_changes_nothing(images, name, operation, theirs, limits):
    neutral = torch.full((len(images),), 0.0 if name == "hue" else 1.0)
    assert (adjust(images, operation, neutral) - images).abs().max() < FLOAT_TOLERANCE


def test_grayscale_equals_torchvision(images):
    gray = augment_colors(images, ViewSpec(gray=1.0), Draws(0, 0, torch.arange(len(images))), "v")
    assert (gray - TF.rgb_to_grayscale(images, 3)).abs().max() < FLOAT_TOLERANCE


def test_solarize_equals_pil_on_every_grey_level():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = from_pil(TF.solarize(to_pil(levels[0]), 128))
    assert torch.allclose(augment.solarize(levels.float() / 255)[0], expected, atol=1e-6)


@pytest.mark.parametrize("radius", [1, 4, 11])
def test_gaussian_blur_equals_torchvision(images, radius):
    sigma = torch.linspace(0.1, 2.0, len(images))
    taps = [2 * radius + 1] * 2
    expected = torch.stack([TF.gaussian_blur(i, taps, [s.item()] * 2) for i, s in zip(images, sigma, strict=True)])
    assert (augment.gaussian_blur(images, sigma, radius) - expected).abs().max() < FLOAT_TOLERANCE


@pytest.mark.parametrize("factor", [1.1, 1.2, 1.5])
@pytest.mark.parametrize("side", [32, 56])
def test_resize_blur_equals_pil(factor, side):
    tiles = photo_tiles(side, side)[:60]
    small = int(side / factor)
    bicubic = Image.Resampling.BICUBIC
    twice = [to_pil(t).resize((small, small), bicubic).resize((side, side), bicubic) for t in tiles]
    difference = 255 * (
        augment.resize_blur(tiles.float() / 255, factor) - torch.stack([from_pil(t) for t in twice])
    )
    assert difference.abs().max() < 3, "Pillow rounds to 8 bits four times"
    assert difference.abs().mean() < 0.5


@pytest.mark.parametrize(("factor", "small"), [(1.1, 203), (1.2, 186), (1.5, 149)])
def test_resize_blur_of_a_published_view(factor, small):
    """224 pixels are shrunk to 203, 186 or 149."""
    tile = photo_tiles(224, 224)[0]
    bicubic = Image.Resampling.BICUBIC
    twice = from_pil(to_pil(tile).resize((small, small), bicubic).resize((224, 224), bicubic))
    difference = 255 * (augment.resize_blur(tile[None].float() / 255, factor)[0] - twice)
    assert difference.abs().max() < 3
    assert difference.abs().mean() < 0.5


def test_normalize(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = TF.normalize(images, mean.tolist(), std.tolist())
    assert torch.allclose(augment.normalize(images, mean, std), expected, atol=2e-6)


def test_blur_radius_follows_the_documented_rule():
    assert [blur_radius(Blur(), side) for side in (32, 64, 96, 224)] == [1, 3, 4, 11]
    assert blur_radius(Blur(kernel=0.01), 32) == 1


def test_jitter_ranges_are_uniform_and_clipped_at_zero():
    factors = jitter_factors(
        Jitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1), torch.eye(4)[:, [0] * 4]
    )
    assert torch.allclose(factors[1], torch.tensor([0.6, 0.0, 0.8, -0.1]))
    assert torch.allclose(factors[0], torch.tensor([1.4, 2.5, 1.2, 0.1]))


def test_jitter_orders_are_all_permutations_equally_often():
    orders = jitter_orders(Draws(0, 0, torch.arange(24_000)).uniform("order"))
    unique, counts = orders.unique(dim=0, return_counts=True)
    assert len(unique) == 24
    assert torch.equal(unique.sort(1).values, torch.arange(4).expand(24, 4))
    # 23 degrees of freedom: above 49.7 with probability 0.001
    assert ((counts - 1000).double().square() / 1000).sum() < 49.7


def test_jitter_applies_the_drawn_operations_in_the_drawn_order(images):
    draws = Draws(3, 1, torch.arange(len(images)))
    jitter = Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    uniform = draws.uniform("v/jitter", 6)
    factors, orders = jitter_factors(jitter, uniform[:, 2:]), jitter_orders(uniform[:, 1])
    expected = images.clone()
    for i in (uniform[:, 0] < jitter.p).nonzero().flatten().tolist():
        for op in orders[i].tolist():
            expected[i] = JITTERS[op][2](expected[i], factors[i, op].item())
    result = augment_colors(images, ViewSpec(jitter=jitter), draws, "v")
    assert (result - expected).abs().max() < 2e-5, "small hue errors grow where colours nearly vanish"


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        (ViewSpec(gray=0.2), 0.2),
        (ViewSpec(solarize=0.3), 0.3),
        (ViewSpec(jitter=Jitter(p=0.8)), 0.8),
        (ViewSpec(blur=Blur(p=0.5, sigma=(1.0, 2.0))), 0.5),
        (ViewSpec(blur=Blur(p=0.1, kind="resize")), 0.1),
    ],
)
def test_each_operation_changes_its_share_of_the_images(spec, share):
    images = torch.rand(4000, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    changed = augment_colors(images, spec, Draws(7, 0, torch.arange(4000)), "v")
    fraction = (changed != images).flatten(1).any(1).float().mean().item()
    assert abs(fraction - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_probability_and_strength_zero_cost_no_copy(images):
    off = ViewSpec(jitter=Jitter(p=0), blur=Blur(p=0))
    assert not changes_colors(off)
    draws = Draws(0, 0, torch.arange(len(images)))
    assert augment_colors(images, off, draws, "v") is images
    flat = ViewSpec(jitter=Jitter(p=1, brightness=0, contrast=0, saturation=0, hue=0))
    assert torch.equal(augment_colors(images, flat, draws, "v"), images)
