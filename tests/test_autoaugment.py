"""AutoAugment against torchvision on PIL images: every operation, every pair, and how often each is drawn.

Shears are compared with what torchvision did in 2021, written down here, because it has changed them since.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from reference import operation_of_2021, photo_tiles, to_pil
from scipy.stats import binomtest, chisquare
from torchvision.transforms import autoaugment as tv
from torchvision.transforms import functional as tvf
from torchvision.transforms.functional import InterpolationMode

from sslbench.data.autoaugment import (
    IMAGENET_POLICY,
    MAGNITUDES,
    OPERATIONS,
    Decisions,
    autoaugment,
    decide,
)
from sslbench.data.photometric import augment_colors, changes_colors
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

THEIR_NAMES = {
    "shear_x": "ShearX",
    "autocontrast": "AutoContrast",
} | {name: name.capitalize() for name in OPERATIONS if name not in ("shear_x", "autocontrast")}
SPACE = tv.AutoAugment()._augmentation_space(MAGNITUDES, (32, 32))
ENHANCERS = ("color", "contrast", "sharpness")
NAMES = list(OPERATIONS)
SIGNIFICANCE = 1e-3


@pytest.fixture(params=[32, 33])
def images(request):
    """uint8 photographs and awkward cases: constant, black, white, random, grey, few levels, two levels."""
    side = request.param
    images = photo_tiles(side, side)[::25].clone()
    images[0], images[1], images[2] = 128, 0, 255
    images[3] = torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(0))
    images[4] = images[4, :1]
    images[5] //= 64
    images[6] = (images[6] > 128) * 255
    return images


def apply_theirs(image: Image.Image, name: str, strength: float) -> Image.Image:
    """torchvision adds the 1 of the enhancers itself."""
    magnitude = strength - 1 if name in ENHANCERS else strength
    return operation_of_2021(image, THEIR_NAMES[name], magnitude)


def levels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def strengths(name: str) -> list[float]:
    values, neutral = OPERATIONS[name].strengths, OPERATIONS[name].neutral
    if values is None:
        return [0.0]
    mirrored = [] if neutral is None else [2 * neutral - v for v in values.tolist()]
    return values.tolist() + mirrored


@pytest.mark.parametrize("name", NAMES)
def test_operations_equal_torchvisions_to_the_bit(images, name):
    before = images.clone()
    for strength in strengths(name):
        expected = torch.stack([levels(apply_theirs(to_pil(i), name, strength)) for i in images])
        ours = OPERATIONS[name](images, torch.full((len(images),), strength))
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, expected), strength
    assert torch.equal(images, before), "the input must stay as it was"


@pytest.mark.parametrize("magnitude", [0.3, 0.5 / 3, 0.1, -0.3])
def test_shears_hold_the_centre_as_before_2022(images, magnitude):
    """Two more sources: today's general affine map, and rows shifted one by one. Today's AutoAugment differs."""
    ours = OPERATIONS["shear_x"](images, torch.full((len(images),), magnitude))
    pictures = [to_pil(image) for image in images]
    affine = [tvf.affine(p, 0, [0, 0], 1.0, [math.degrees(magnitude), 0.0]) for p in pictures]
    assert torch.equal(ours, torch.stack([levels(p) for p in affine]))
    assert torch.equal(ours, shifted_rows(images, magnitude))
    today = [tv._apply_op(p, "ShearX", magnitude, InterpolationMode.NEAREST, None) for p in pictures]
    assert not torch.equal(ours, torch.stack([levels(p) for p in today]))


def shifted_rows(images: torch.Tensor, magnitude: float) -> torch.Tensor:
    """Each row moved to the left by the tangent times the distance of its middle below the centre."""
    side = images.shape[-1]
    result = torch.zeros_like(images)
    for y in range(side):
        source = np.arange(side) + 0.5 + math.tan(magnitude) * (y + 0.5 - side / 2)
        column = np.floor(source).astype(int)
        inside = np.flatnonzero((column >= 0) & (column < side))
        result[..., y, inside] = images[..., y, column[inside]]
    return result


def test_the_policy_is_torchvisions():
    theirs = tv.AutoAugment(tv.AutoAugmentPolicy.IMAGENET).policies
    ours = [tuple((THEIR_NAMES[name], p, m) for name, p, m in pair) for pair in IMAGENET_POLICY]
    assert ours == [tuple((name, p, m or 0) for name, p, m in pair) for pair in theirs]


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_and_signs_are_torchvisions_except_solarise(name):
    theirs, signed = SPACE[THEIR_NAMES[name]]
    ours, neutral = OPERATIONS[name].strengths, OPERATIONS[name].neutral
    assert (neutral is not None) == signed
    if ours is None:
        assert theirs.ndim == 0
    elif name == "solarize":
        assert torch.allclose(ours, 256 / 255 * theirs)
        assert (ours[0], ours[-1]) == (256, 0)
    else:
        assert torch.allclose(ours - (neutral or 0), theirs.float())


def all_decisions() -> list[list[tuple[str, float] | None]]:
    """Every pair, with each subset of its operations and both signs."""
    found = []
    for number in range(len(IMAGENET_POLICY)):
        for first, second, sign in [(0, 0, 0.9), (0, 1, 0.9), (1, 0, 0.1), (0, 0, 0.1)]:
            uniform = torch.tensor([[(number + 0.5) / 25, first, second, sign, sign]]) * 0.9999
            code, strength = (part[0].tolist() for part in decide(uniform))
            found.append([None if c < 0 else (NAMES[c], s) for c, s in zip(code, strength, strict=True)])
    return found


def test_whole_pairs_equal_torchvisions_in_one_batch():
    decisions = all_decisions()
    tiles = photo_tiles(32, 32)[: len(decisions)]
    expected = []
    for tile, pair in zip(tiles, decisions, strict=True):
        image = to_pil(tile)
        for step in filter(None, pair):
            image = apply_theirs(image, *step)
        expected.append(levels(image))
    code = torch.tensor([[-1 if step is None else NAMES.index(step[0]) for step in pair] for pair in decisions])
    strength = torch.tensor([[0.0 if step is None else step[1] for step in pair] for pair in decisions])
    images = tiles.float() / 255
    before = images.clone()
    result = autoaugment(images, Decisions(code, strength))
    assert torch.equal((result * 255).round().byte(), torch.stack(expected))
    assert torch.allclose(result * 255, (result * 255).round(), atol=1e-4)
    assert torch.equal(images, before)


def test_decisions_use_the_policys_strengths():
    uniform = torch.tensor(
        [[0.001, 0.39, 0.59, 0.9, 0.9], [0.001, 0.41, 0.59, 0.1, 0.1], [0.59, 0.5, 0.9, 0.1, 0.9]]
    )
    code, strength = decide(uniform)
    rotate, color, contrast = (NAMES.index(name) for name in ("rotate", "color", "contrast"))
    assert code.tolist() == [[NAMES.index("posterize"), rotate], [-1, rotate], [color, contrast]]
    assert strength[:, 1].tolist() == pytest.approx([-30, 30, 0.2])
    assert strength[0, 0] == 4
    assert strength[2, 0] == pytest.approx(1.4)


def test_pairs_coins_and_signs_come_as_often_as_they_should():
    count = 100_000
    uniform = Draws(5, 0, torch.arange(count)).uniform("v/autoaugment", 6)[:, 1:]
    pair = (uniform[:, 0] * 25).long()
    assert chisquare(pair.bincount(minlength=25).numpy()).pvalue > SIGNIFICANCE
    code, strength = decide(uniform)
    for number, steps in enumerate(IMAGENET_POLICY):
        rows = pair == number
        for turn, (name, probability, _) in enumerate(steps):
            applied = code[rows, turn] >= 0
            assert (code[rows, turn][applied] == NAMES.index(name)).all()
            fair = binomtest(int(applied.sum()), int(rows.sum()), probability)
            assert fair.pvalue > SIGNIFICANCE / 50, (number, turn)
    turned = strength[code == NAMES.index("rotate")]
    assert binomtest(int((turned > 0).sum()), len(turned), 0.5).pvalue > SIGNIFICANCE
    both = (code >= 0).double()[pair == 2]
    assert abs(torch.corrcoef(both.T)[0, 1]) < 4 / len(both) ** 0.5, "the two coins are independent"


REGULAR = ViewSpec(jitter=Jitter(), gray=0.2, blur=Blur(), solarize=0.2)


def colors(spec: ViewSpec, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return augment_colors(images, spec, Draws(9, 3, positions), "view1")


def test_the_policy_takes_the_place_of_the_other_colour_operations():
    """An image gets either exactly what a policy-only view gives it or exactly the regular colours."""
    images, positions = photo_tiles(32, 32)[:200].float() / 255, torch.arange(200)
    before = images.clone()
    mixed = colors(REGULAR.model_copy(update={"autoaugment": 0.5}), images, positions)
    policy = colors(ViewSpec(autoaugment=1.0), images, positions)
    regular = colors(REGULAR, images, positions)
    by_policy = (mixed - policy).abs().flatten(1).amax(1) < 1e-4
    by_colors = (mixed - regular).abs().flatten(1).amax(1) < 1e-4
    assert (by_policy | by_colors).all()
    assert binomtest(int(by_policy.sum()), 200, 0.5).pvalue > SIGNIFICANCE
    assert torch.equal(images, before)


@pytest.mark.parametrize("share", [1, 5])
def test_the_rest_of_the_batch_does_not_matter(share):
    images, positions = photo_tiles(32, 32)[:20].float() / 255, torch.arange(20)
    spec = ViewSpec(autoaugment=0.8)
    parts = [colors(spec, images[p], p) for p in positions.split(share)]
    assert torch.equal(colors(spec, images, positions), torch.cat(parts))


def test_a_probability_of_zero_draws_and_costs_nothing():
    assert not changes_colors(ViewSpec())
    assert changes_colors(ViewSpec(autoaugment=0.1))
