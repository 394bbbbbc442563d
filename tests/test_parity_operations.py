"""Each operation of a view with fixed parameters against torchvision, on 8-bit Pillow images and on float tensors.

Tolerances are in units of 1/255. Against float tensors the same formula is computed in another order. To Pillow
the differences are Pillow's own: it rounds to 8 bits up to three times in one operation (blends are cut off, which
makes images 0.43 darker on average) and hues to 256 angles.
"""

from __future__ import annotations

import pytest
import torch
from reference import from_pil, photo_tiles, to_pil
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from views_kit import colors, jitter_of, read_parameters, views_of

from sslbench.data.views import ViewExecutor
from sslbench.plugin.viewspec import Blur, ViewSpec
from sslbench.rng import Draws

COUNT = 40
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
SEED = 5


def tiles(side: int = 32) -> Tensor:
    found = photo_tiles(side, side)
    return found[:: len(found) // COUNT][:COUNT]


def levels(images: Tensor) -> Tensor:
    return (images * 255).round().byte()


def largest_and_mean(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Of the absolute difference, in 1/255."""
    difference = 255 * (ours - theirs).abs()
    return difference.max().item(), difference.mean().item()


CROPS = [
    (ViewSpec(size=32, scale=(0.1, 1.0)), 32, 32),
    (ViewSpec(size=32, scale=(0.1, 1.0), interpolation="bilinear"), 48, 64),
    (ViewSpec(size=24, scale=(0.3, 1.0)), 96, 80),
    (ViewSpec(size=64, scale=(0.05, 0.3), interpolation="bilinear"), 40, 40),
]


@pytest.mark.parametrize(("spec", "height", "width"), CROPS)
def test_crop_resize_and_flip_equal_torchvisions(spec, height, width):
    """The reported box and flip, given to torchvision, whose bicubic may leave [0, 1] between passes on floats."""
    images = photo_tiles(height, width)[:COUNT]
    (view,) = views_of([spec], images, SEED)
    boxes = (view.box * view.source_size.repeat(1, 2)).round().int().tolist()
    on_levels, on_floats = [], []
    for image, (x0, y0, x1, y1), flip in zip(images, boxes, view.flip.tolist(), strict=True):
        arguments = (y0, x0, y1 - y0, x1 - x0, [spec.size] * 2, MODES[spec.interpolation])
        turn = TF.horizontal_flip if flip else lambda same: same
        on_levels.append(from_pil(turn(TF.resized_crop(to_pil(image), *arguments))))
        on_floats.append(turn(TF.resized_crop(image / 255, *arguments, antialias=True)).clamp(0, 1))
    assert 0 < view.flip.sum() < COUNT
    most, mean = largest_and_mean(view.images, torch.stack(on_levels))
    assert most < 1.6
    assert mean < 0.36
    most, mean = largest_and_mean(view.images, torch.stack(on_floats))
    assert most < (0.001 if spec.interpolation == "bilinear" else 2), "overshoots are cut after each pass"
    assert mean < 0.001


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_flip_is_exact(flip):
    images = tiles()
    (view,) = views_of([ViewSpec(size=32, crop="none", flip=flip)], images, SEED)
    assert torch.equal(levels(view.images), TF.horizontal_flip(images) if flip else images)


JITTERS = {
    # Strength, and the largest and mean difference to Pillow's 8-bit operation that is tolerated.
    "brightness": (0.8, 1.01, 0.5),
    "contrast": (0.8, 1.5, 0.5),
    "saturation": (0.8, 1.5, 0.5),
    "hue": (0.5, 12.0, 0.5),
}


@pytest.mark.parametrize("name", JITTERS)
def test_jitter_with_the_parameter_read_off_a_probe_equals_torchvisions(name):
    strength, most_allowed, mean_allowed = JITTERS[name]
    images, spec = tiles(), jitter_of(name, strength)
    parameters = read_parameters(name, spec, COUNT, SEED).tolist()
    ours = colors(spec, images / 255, SEED)
    operation = getattr(TF, f"adjust_{name}")
    on_floats = torch.stack([operation(i / 255, p) for i, p in zip(images, parameters, strict=True)])
    on_levels = torch.stack([from_pil(operation(to_pil(i), p)) for i, p in zip(images, parameters, strict=True)])
    assert largest_and_mean(ours, on_floats)[0] < 0.001
    most, mean = largest_and_mean(ours, on_levels)
    assert most < most_allowed
    assert mean < mean_allowed
    assert largest_and_mean(images / 255, on_levels)[1] > 5, "the operation must do something"


FIXED = {
    # The view, torchvision's operation, tolerances against floats and against Pillow.
    "grey": (ViewSpec(gray=1.0), lambda i: TF.rgb_to_grayscale(i, 3), 0.001, 0.6),
    "solarize": (ViewSpec(solarize=1.0), None, 0.001, 0.001),
    "blur 0.1": (ViewSpec(blur=Blur(p=1, sigma=(0.1, 0.1))), lambda i: TF.gaussian_blur(i, 3, 0.1), 0.001, 0.51),
    "blur 0.7": (ViewSpec(blur=Blur(p=1, sigma=(0.7, 0.7))), lambda i: TF.gaussian_blur(i, 3, 0.7), 0.001, 0.51),
    "blur 2.0": (
        ViewSpec(blur=Blur(p=1, sigma=(2.0, 2.0), kernel=0.375)),
        lambda i: TF.gaussian_blur(i, 13, 2.0),
        0.001,
        0.51,
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_operations_without_a_random_parameter_equal_torchvisions(name):
    spec, operation, float_tolerance, level_tolerance = FIXED[name]
    images = tiles()
    ours = colors(spec, images / 255, SEED)
    if operation is None:
        on_floats = torch.stack([TF.solarize(i / 255, 128 / 255) for i in images])
        on_levels = torch.stack([from_pil(TF.solarize(to_pil(i), 128)) for i in images])
    else:
        on_floats = torch.stack([operation(i / 255) for i in images])
        on_levels = torch.stack([from_pil(operation(to_pil(i))) for i in images])
    assert largest_and_mean(ours, on_floats)[0] < float_tolerance
    assert largest_and_mean(ours, on_levels)[0] < level_tolerance


def test_finished_views_are_normalised_as_by_torchvision():
    images, (mean, std) = tiles(), ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
    views = ViewExecutor([ViewSpec(size=32)], size=32, mean=mean, std=std, device=torch.device("cpu"))
    draws, sizes = Draws(SEED, 0, torch.arange(COUNT)), torch.tensor([[32, 32]] * COUNT)
    geometry = views.geometry(draws, sizes)
    normalised = views.finish(views.crop(images, geometry), geometry, draws, sizes)[0].images
    (plain,) = views_of([ViewSpec(size=32)], images, SEED)
    assert (normalised - TF.normalize(plain.images, mean, std)).abs().max() < 1e-5
