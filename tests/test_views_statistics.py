"""Whole views against the per-sample reference executor: the same distributions of image statistics."""

from __future__ import annotations

import pytest
import torch
from reference import photo_tiles, reference_views
from scipy.stats import ks_2samp

from sslbench.data.views import ViewExecutor
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

STRONG = Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
SPECS = {
    "crop": ViewSpec(size=32),
    "padded": ViewSpec(size=40, crop="padded"),
    "simclr": ViewSpec(size=32, scale=(0.08, 1.0), jitter=STRONG, gray=0.2, blur=Blur(p=0.5)),
    "scrl": ViewSpec(
        size=40,
        jitter=Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        gray=0.2,
        blur=Blur(p=1.0, kind="resize"),
        solarize=0.2,
    ),
}


def statistics(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """One number per image each: brightness, contrast, colourfulness, sharpness, left-right balance."""
    gray = images.mean(1)
    return {
        "red": images[:, 0].mean((1, 2)),
        "blue": images[:, 2].mean((1, 2)),
        "contrast": gray.std((1, 2)),
        "color": (images.amax(1) - images.amin(1)).mean((1, 2)),
        "sharpness": gray.diff(dim=2).abs().mean((1, 2)),
        "balance": gray[:, :, :8].mean((1, 2)) - gray[:, :, -8:].mean((1, 2)),
        "black": (images < 1 / 255).float().mean((1, 2, 3)),
        "white": (images > 254 / 255).float().mean((1, 2, 3)),
    }


def our_views(spec: ViewSpec, images: torch.Tensor) -> torch.Tensor:
    cpu = torch.device("cpu")
    views = ViewExecutor([spec], size=32, mean=(0, 0, 0), std=(1, 1, 1), device=cpu)
    draws = Draws(21, 0, torch.arange(len(images)))
    sizes = torch.tensor(images.shape[-2:]).expand(len(images), 2)
    geometry = views.geometry(draws, sizes)
    return views.finish(views.crop(images, geometry), geometry, draws, sizes)[0].images


@pytest.mark.parametrize("name", SPECS)
def test_views_have_the_references_statistics(name):
    images = photo_tiles(40, 40)[:320].repeat(2, 1, 1, 1)
    ours = our_views(SPECS[name], images)
    theirs = reference_views(SPECS[name], images, seed=3)
    assert abs(ours.mean() - theirs.mean()) < 4 * theirs.mean((1, 2, 3)).std() * (2 / len(images)) ** 0.5
    expected = statistics((theirs * 255).round() / 255)
    for key, values in statistics((ours * 255).round() / 255).items():
        assert ks_2samp(values.numpy(), expected[key].numpy()).pvalue > 1e-3, key
