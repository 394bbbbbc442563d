"""How every random parameter of a view is distributed: against torchvision's own draws, two samples at a time.

Parameters are read off finished views of probe images, so what is tested is what images really get. Each
comparison is also made with a defect of the kind that reimplementations have, which must be found.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import AutoAugmentOf2021, from_pil, reference_view, seeded, to_pil
from scipy.stats import binomtest, chi2_contingency, ks_2samp
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as TF
from torchvision.transforms import v2 as T
from views_kit import boxes_of, colors, columns, jitter_of, read_parameters, views_of

from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec

COUNT = 10_000
AGREES, DEFECT = 0.01, 1e-6
"""Chance of a sample pair as different as this one: at least in agreement, at most with a defect."""
SEED = 4


def ks(ours: Tensor, theirs: Tensor) -> float:
    return float(ks_2samp(ours.numpy(), theirs.numpy(), method="asymp").pvalue)


def same_shares(ours: Tensor, theirs: Tensor) -> float:
    """Chi-square test on how often each whole number occurs."""
    size = int(max(ours.max(), theirs.max())) + 1
    counts = torch.stack([sample.long().bincount(minlength=size) for sample in (ours, theirs)])
    return float(chi2_contingency(counts[:, counts.sum(0) > 0].numpy()).pvalue)


Draw = Callable[[random.Random, float, float], float]


def uniform(generator: random.Random, low: float, high: float) -> float:
    return generator.uniform(low, high)


def log_uniform(generator: random.Random, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


def by_side(generator: random.Random, low: float, high: float) -> float:
    """Defect: uniform in the square root of the area."""
    return generator.uniform(low**0.5, high**0.5) ** 2


def plain_boxes(
    spec: ViewSpec, height: int, width: int, area: Draw = uniform, ratio: Draw = log_uniform
) -> Tensor:
    """Random resized crops by the book, image after image."""
    generator = random.Random(1)
    return torch.tensor(
        [_plain_box(generator, spec, height, width, area, ratio) for _ in range(COUNT)], dtype=torch.double
    )


def _plain_box(
    generator: random.Random, spec: ViewSpec, height: int, width: int, area: Draw, ratio: Draw
) -> list[int]:
    for _ in range(10):
        target = height * width * area(generator, *spec.scale)
        aspect = ratio(generator, *spec.ratio)
        w, h = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return [left, top, left + w, top + h]
    return [0, 0, width, height]


def torchvisions_boxes(spec: ViewSpec, height: int, width: int) -> Tensor:
    image = torch.empty(3, height, width)
    with seeded(1):
        drawn = [RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio)) for _ in range(COUNT)]
    top, left, h, w = torch.tensor(drawn).double().unbind(1)
    return torch.stack([left, top, left + w, top + h], dim=1)


def measures(box: Tensor, height: int, width: int) -> dict[str, Tensor]:
    x0, y0, x1, y1 = box.unbind(1)
    w, h = x1 - x0, y1 - y0
    return {
        "area": w * h,
        "ratio": w / h,
        "width": w,
        "left": x0,
        "bottom": y1,
        "relative left": (x0 / (width - w))[w < width],
        "relative top": (y0 / (height - h))[h < height],
    }


def least_likely(ours: Tensor, theirs: Tensor, height: int, width: int) -> float:
    first, second = measures(ours, height, width), measures(theirs, height, width)
    return min(ks(first[name], second[name]) for name in first)


CROPS = [
    (ViewSpec(scale=(0.08, 1.0)), 375, 500),
    (ViewSpec(scale=(0.2, 1.0)), 32, 32),
    (ViewSpec(scale=(0.05, 0.14)), 480, 640),
]


@pytest.mark.parametrize(("spec", "height", "width"), CROPS)
def test_random_resized_crops(spec, height, width):
    (ours,) = boxes_of([spec], height, width, COUNT, SEED)
    assert least_likely(ours, torchvisions_boxes(spec, height, width), height, width) > AGREES
    assert least_likely(ours, plain_boxes(spec, height, width), height, width) > AGREES
    assert least_likely(ours, plain_boxes(spec, height, width, area=by_side), height, width) < DEFECT
    assert least_likely(ours, plain_boxes(spec, height, width, ratio=uniform), height, width) < DEFECT


def test_a_crop_that_never_reaches_the_last_position_is_found():
    spec = CROPS[1][0]
    (ours,) = boxes_of([spec], 32, 32, COUNT, SEED)
    x0, y0, x1, y1 = plain_boxes(spec, 32, 32).unbind(1)
    early = torch.where(x1 == 32, (x0 - 1).clamp(min=0), x0)
    defective = torch.stack([early, y0, early + x1 - x0, y1], dim=1)
    assert least_likely(ours, defective, 32, 32) < DEFECT


def test_padded_crops():
    (ours,) = boxes_of([ViewSpec(crop="padded")], 32, 32, COUNT, SEED)
    crop, padded = T.RandomCrop((32, 32)), [torch.empty(3, 40, 40)]
    with seeded(1):
        drawn = [crop.make_params(padded) for _ in range(COUNT)]
    theirs = torch.tensor([(p["top"] if p["needs_crop"] else 0) * 9 + p["left"] for p in drawn])
    assert same_shares((ours[:, 1] + 4) * 9 + ours[:, 0] + 4, theirs) > AGREES
    assert same_shares((ours[:, 1] + 4) * 9 + ours[:, 0] + 4, (theirs - 1).clamp(min=0)) < DEFECT


KEY, NEAR = ViewSpec(scale=(0.2, 1.0)), ViewSpec(scale=(0.05, 0.14), near=0, overlap=0.1)


def constrained_boxes(overlap: float) -> tuple[Tensor, Tensor]:
    """Key crops and small crops drawn again until enough of their area lies within the key's, one by one."""
    generator, keys, small = random.Random(2), [], []
    for _ in range(COUNT):
        keys.append(_plain_box(generator, KEY, 480, 640, uniform, log_uniform))
        small.append(_near_box(generator, keys[-1], overlap))
    return torch.tensor(keys).double(), torch.tensor(small).double()


def _near_box(generator: random.Random, key: list[int], overlap: float) -> list[int]:
    for _ in range(10):
        box = _plain_box(generator, NEAR, 480, 640, uniform, log_uniform)
        x = min(box[2], key[2]) - max(box[0], key[0])
        y = min(box[3], key[3]) - max(box[1], key[1])
        if max(x, 0) * max(y, 0) >= overlap * (box[2] - box[0]) * (box[3] - box[1]):
            return box
    return _plain_box(generator, NEAR, 480, 640, uniform, log_uniform)


def shared(key: Tensor, box: Tensor) -> Tensor:
    extent = (torch.minimum(box[:, 2:], key[:, 2:]) - torch.maximum(box[:, :2], key[:, :2])).clamp(min=0)
    return extent.prod(1) / (box[:, 2:] - box[:, :2]).prod(1)


@pytest.mark.parametrize(("overlap", "agrees"), [(0.1, True), (0.3, False), (0.0, False)])
def test_constrained_crops(overlap, agrees):
    key, ours = boxes_of([KEY, NEAR], 480, 640, COUNT, SEED)
    their_key, theirs = constrained_boxes(overlap)
    chances = [ks(shared(key, ours), shared(their_key, theirs)), least_likely(ours, theirs, 480, 640)]
    assert min(chances) > AGREES if agrees else min(chances) < DEFECT


STRENGTHS = {"brightness": 0.8, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def torchvisions_parameter(name: str, strength: float) -> Tensor:
    jitter = ColorJitter(**{name: strength})
    limits = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    with seeded(2):
        drawn = [ColorJitter.get_params(*limits) for _ in range(COUNT)]
    return torch.tensor([parameters[1 + list(STRENGTHS).index(name)] for parameters in drawn])


@pytest.mark.parametrize("name", STRENGTHS)
def test_jitter_parameters(name):
    strength = STRENGTHS[name]
    ours = read_parameters(name, jitter_of(name, strength), COUNT, SEED)
    assert ks(ours, torchvisions_parameter(name, strength)) > AGREES
    assert ks(ours, torchvisions_parameter(name, strength / 2)) < DEFECT
    assert ks(ours[ours > ours.median()], torchvisions_parameter(name, strength)) < DEFECT


def test_jitter_strengths_above_one_are_cut_at_zero():
    spec = jitter_of("brightness", 1.6)
    ours = read_parameters("brightness", spec, COUNT, SEED)
    assert ks(ours, torchvisions_parameter("brightness", 1.6)) > AGREES
    assert ours.min() < 0.01


COLORFUL = columns((0.9, 0.3, 0.1), (0.2, 0.7, 0.3), (0.1, 0.2, 0.8), (0.95, 0.9, 0.5))
TELLTALES = (0, 3)
"""Its pixels whose red depends most on the order of operations."""
FEWER = 2000


def torchvisions_jitter(jitter: ColorJitter, order: list[int] | None) -> Tensor:
    """Red of the telltales after all four operations in torchvision's random order, or in a fixed one."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    limits = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    results = []
    with seeded(3):
        for _ in range(FEWER):
            drawn, *parameters = ColorJitter.get_params(*limits)
            image = COLORFUL
            for number in order or drawn.tolist():
                image = operations[number](image, parameters[number])
            results.append(image[0, 0, TELLTALES])
    return torch.stack(results)


@pytest.mark.parametrize(("order", "agrees"), [(None, True), ([0, 1, 2, 3], False)])
def test_jitter_operations_come_in_a_random_order(order, agrees):
    spec = ViewSpec(jitter=Jitter(p=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2))
    ours = colors(spec, COLORFUL.expand(FEWER, -1, -1, -1), SEED)[:, 0, 0, TELLTALES]
    theirs = torchvisions_jitter(ColorJitter(0.8, 0.8, 0.8, 0.2), order)
    chances = [ks(a, b) for a, b in zip(ours.T, theirs.T, strict=True)]
    assert min(chances) > AGREES if agrees else min(chances) < DEFECT


POINT = torch.zeros(3, 9, 9)
POINT[:, 4, 4] = 1.0


def read_sigma(spec: ViewSpec) -> Tensor:
    """From the blurred point: its centre to its neighbour is as 1 to exp(-1 / (2 sigma^2))."""
    views = colors(spec, POINT.expand(COUNT, -1, -1, -1), SEED)[:, 0, 4].double()
    return (0.5 / (views[:, 4] / views[:, 5]).log()).sqrt()


@pytest.mark.parametrize("limits", [(0.2, 2.0), (0.3, 0.9)])
def test_blur_strengths(limits):
    ours = read_sigma(ViewSpec(blur=Blur(p=1.0, sigma=limits)))
    blur = T.GaussianBlur(3, limits)
    with seeded(4):
        theirs = torch.tensor([blur.make_params([])["sigma"][0] for _ in range(COUNT)])
    assert ks(ours, theirs) > AGREES
    generator = random.Random(4)
    by_logarithm = torch.tensor([log_uniform(generator, *limits) for _ in range(COUNT)])
    assert ks(ours, by_logarithm) < DEFECT


def test_shrinking_factors_of_the_resize_blur():
    factors, count = (1.1, 1.2, 1.5), 3000
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spec = ViewSpec(size=24, crop="none", flip=0.0, blur=Blur(p=1.0, kind="resize", factors=factors))
    possible = torch.stack(
        [
            reference_view(
                to_pil(image), spec.model_copy(update={"blur": Blur(p=1.0, kind="resize", factors=(f,))})
            )
            for f in factors
        ]
    )
    ours = colors(spec, (image / 255).expand(count, -1, -1, -1), SEED)
    distance = (ours[:, None] - possible).abs().flatten(2).mean(2)
    assert distance.amin(1).max() < 1 / 255
    generator = random.Random(5)
    theirs = torch.tensor([factors.index(generator.choice(factors)) for _ in range(count)])
    assert same_shares(distance.argmin(1), theirs) > AGREES
    assert same_shares(distance.argmin(1), theirs.clamp(min=1)) < DEFECT


SHARES = {
    "jitter": (ViewSpec(jitter=Jitter(p=0.8, brightness=0.8)), 0.8),
    "gray": (ViewSpec(gray=0.2), 0.2),
    "blur": (ViewSpec(blur=Blur(p=0.5, sigma=(1.0, 2.0))), 0.5),
    "rare blur": (ViewSpec(blur=Blur(p=0.1, sigma=(1.0, 2.0))), 0.1),
    "solarize": (ViewSpec(solarize=0.2), 0.2),
    "policy instead": (ViewSpec(autoaugment=0.7, gray=1.0), 0.3),
}


def changed(spec: ViewSpec) -> Tensor:
    """Which of COUNT views of one image have lost its colour or contrast."""
    return (colors(spec, COLORFUL.expand(COUNT, -1, -1, -1), SEED) - COLORFUL).abs().flatten(1).amax(1) > 1e-4


def grey(spec: ViewSpec) -> Tensor:
    views = colors(spec, COLORFUL.expand(COUNT, -1, -1, -1), SEED)
    return (views.amax(1) - views.amin(1)).flatten(1).amax(1) < 1e-4


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_images_that_get_an_operation(name):
    spec, share = SHARES[name]
    found = int((grey if name == "policy instead" else changed)(spec).sum())
    assert binomtest(found, COUNT, share).pvalue > AGREES
    assert binomtest(found, COUNT, 0.8 * share).pvalue < DEFECT


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_share_of_flipped_images(share):
    image = (COLORFUL * 255).byte()
    (view,) = views_of([ViewSpec(size=4, crop="none", flip=share)], image.expand(COUNT, -1, -1, -1), SEED)
    flipped = ((view.images * 255 - image.flip(2)).abs() < 0.5).all(3).all(2).all(1)
    assert torch.equal(flipped, view.flip)
    assert binomtest(int(flipped.sum()), COUNT, share).pvalue > AGREES
    assert binomtest(int(flipped.sum()), COUNT, 0.8 * share).pvalue < DEFECT


def outcomes(images: Tensor) -> Tensor:
    """A number for each distinct image of levels ``[N,...]``; two that differ by a level at most are the same."""
    distinct, number = images.flatten(1).unique(dim=0, return_inverse=True)
    same = torch.cdist(distinct.float(), distinct.float(), p=float("inf")) <= 1
    return same.int().argmax(1)[number]


def test_autoaugment_gives_torchvisions_images_as_often():
    """One image has some fifty possible results; both must give all of them, equally often."""
    image = torch.randint(0, 140, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    ours = colors(ViewSpec(autoaugment=1.0), (image / 255).expand(COUNT, -1, -1, -1), SEED)
    transform, source = AutoAugmentOf2021(), to_pil(image)
    with seeded(8):
        theirs = torch.stack([from_pil(transform(source)) for _ in range(FEWER)])
    number = outcomes((torch.cat([ours, theirs]) * 255).round().byte())
    often = number.bincount()[number] >= 20
    assert often.float().mean() > 0.99
    assert 40 < len(number[often].unique()) < 60
    ours, theirs = number[:COUNT][often[:COUNT]], number[COUNT:][often[COUNT:]]
    assert same_shares(ours, theirs) > AGREES
    rather_common = theirs.bincount().argsort(descending=True)[4]
    assert same_shares(ours, theirs[theirs != rather_common]) < DEFECT, "a pair that is never drawn is found"


def test_parameters_of_one_view_are_independent():
    box = boxes_of([ViewSpec()], 375, 500, COUNT, SEED)[0]
    drawn = [
        (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
        *(read_parameters(name, jitter_of(name, 0.5), COUNT, SEED).double() for name in STRENGTHS),
        read_sigma(ViewSpec(blur=Blur(p=1.0, sigma=(0.2, 2.0)))),
        *(changed(SHARES[name][0]).double() for name in ("jitter", "gray", "blur", "solarize")),
    ]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 4.5 / COUNT**0.5
