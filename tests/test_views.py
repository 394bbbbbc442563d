"""Geometry and pixels of the view executor against Pillow and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from reference import photo_tiles, reference_crop
from scipy.stats import binomtest, chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop

from sslbench.data.cropping import Geometry, crop_image
from sslbench.data.views import ViewExecutor, expand
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGNIFICANCE = 1e-3
FULL = ViewSpec(
    jitter=Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    gray=0.2,
    blur=Blur(p=0.5),
    solarize=0.2,
)


def executor(*specs: ViewSpec, size: int = 32, **options) -> ViewExecutor:
    return ViewExecutor(specs, size=size, mean=MEAN, std=STD, device=torch.device("cpu"), **options)


def same_sizes(count: int, height: int, width: int) -> torch.Tensor:
    return torch.tensor([height, width]).expand(count, 2)


def boxes(spec: ViewSpec, count: int, height: int, width: int) -> torch.Tensor:
    draws = Draws(11, 0, torch.arange(count))
    return executor(spec).geometry(draws, same_sizes(count, height, width))[0].box


def one(geometry: list[Geometry], row: int) -> list[Geometry]:
    return [Geometry(g.box[row : row + 1], g.flip[row : row + 1]) for g in geometry]


def test_expand_multiplies_counts_and_fills_sizes():
    specs = expand([ViewSpec(count=2), ViewSpec(count=3, size=16)], 40)
    assert [(s.count, s.size) for s in specs] == [(1, 40), (1, 40), (1, 16), (1, 16), (1, 16)]


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(32, 32, (0.2, 1.0)), (375, 500, (0.08, 1.0)), (60, 200, (0.5, 1.0)), (500, 100, (0.9, 1.0))],
)
def test_random_resized_boxes_are_distributed_as_torchvisions(height, width, scale):
    spec = ViewSpec(scale=scale)
    ours = boxes(spec, 1500, height, width)
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn = [RandomResizedCrop.get_params(image, list(scale), list(spec.ratio)) for _ in range(1500)]
    top, left, h, w = torch.tensor(drawn).unbind(1)
    theirs = torch.stack([left, top, left + w, top + h], dim=1).float()
    assert torch.equal(ours, ours.round())
    for name, statistic in {
        "x0": lambda b: b[:, 0],
        "y1": lambda b: b[:, 3],
        "area": lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        "ratio": lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
    }.items():
        result = ks_2samp(statistic(ours).numpy(), statistic(theirs).numpy())
        assert result.pvalue > SIGNIFICANCE, name


@pytest.mark.parametrize("crop", ["resized", "none"])
def test_boxes_stay_inside_images_of_any_size(crop):
    sizes = torch.randint(1, 90, (4000, 2), generator=torch.Generator().manual_seed(0))
    spec = ViewSpec(crop=crop, scale=(0.05, 1.0))
    box = executor(spec).geometry(Draws(0, 0, torch.arange(4000)), sizes)[0].box
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] <= sizes.flip(1)).all()
    assert (box[:, 2:] - box[:, :2] >= 1).all()


def test_fallback_is_torchvisions_central_crop():
    spec = ViewSpec(scale=(1.0, 1.0))
    assert boxes(spec, 1, 30, 100).tolist() == [[30, 0, 70, 30]]
    assert boxes(spec, 1, 100, 30).tolist() == [[0, 30, 30, 70]]


def test_padded_boxes_reach_every_offset_equally_often():
    box = boxes(ViewSpec(crop="padded"), 8100, 32, 32)
    assert torch.equal(box[:, 2:] - box[:, :2], torch.full((8100, 2), 32.0))
    cells = (box[:, 1] + 4) * 9 + box[:, 0] + 4
    assert chisquare(torch.bincount(cells.long(), minlength=81).numpy()).pvalue > SIGNIFICANCE


def test_center_box_is_resize_and_center_crop():
    assert boxes(ViewSpec(crop="none", center=0.875), 1, 256, 320).tolist() == [[48, 16, 272, 240]]
    assert boxes(ViewSpec(crop="none"), 1, 20, 10).tolist() == [[0, 5, 10, 15]]


def test_flip_rate():
    geometry = executor(ViewSpec(flip=0.3)).geometry(Draws(2, 0, torch.arange(5000)), same_sizes(5000, 8, 8))
    assert binomtest(int(geometry[0].flip.sum()), 5000, 0.3).pvalue > SIGNIFICANCE


def test_views_and_steps_draw_independently():
    views = executor(ViewSpec(count=2))
    first, second = views.geometry(Draws(0, 0, torch.arange(500)), same_sizes(500, 99, 99))
    later = views.geometry(Draws(0, 1, torch.arange(500)), same_sizes(500, 99, 99))[0]
    for other in (second, later):
        correlation = torch.corrcoef(torch.stack([first.box[:, 0], other.box[:, 0]]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(500)


CROPS = [
    (ViewSpec(), 32, 32, 32),
    (ViewSpec(scale=(0.05, 0.4)), 32, 32, 32),
    (ViewSpec(interpolation="bilinear"), 48, 64, 32),
    (ViewSpec(scale=(0.3, 1.0)), 96, 80, 24),
    (ViewSpec(interpolation="bilinear", scale=(0.05, 0.3)), 40, 40, 64),
    (ViewSpec(crop="padded"), 32, 32, 32),
    (ViewSpec(crop="padded", padding=0.3, interpolation="bilinear"), 30, 44, 20),
    (ViewSpec(crop="none", center=0.875), 64, 48, 32),
]


@pytest.mark.parametrize(("spec", "height", "width", "size"), CROPS)
def test_crops_equal_pillows(spec, height, width, size):
    """Both the batched and the one-image path; Pillow rounds to 8 bits after each of its two passes."""
    images = photo_tiles(height, width)[:64]
    views = executor(spec, size=size)
    geometry = views.geometry(Draws(1, 0, torch.arange(len(images))), same_sizes(len(images), height, width))
    box, flip = geometry[0]
    expected = torch.stack(
        [
            reference_crop(i, b, bool(f), size, spec.interpolation)
            for i, b, f in zip(images, box, flip, strict=True)
        ]
    )
    batched = views.crop(images, geometry)[0]
    single = torch.stack([crop_image(image, views.specs, one(geometry, k))[0] for k, image in enumerate(images)])
    assert single.dtype == torch.uint8
    assert batched.is_contiguous()
    difference = 255 * (batched - expected)
    assert difference.abs().max() < 1.6
    assert difference.abs().mean() < 0.36
    assert abs(difference.mean()) < 0.05, "rounding must not shift the mean"
    assert 255 * (single / 255 - expected).abs().max() < 2.5, "torch rounds the weights, too"
    assert 255 * (single / 255 - expected).abs().mean() < 0.1


def test_crop_one_reads_strided_images():
    image = photo_tiles(48, 64)[3]
    views = executor(ViewSpec(count=3))
    geometry = views.geometry(Draws(1, 0, torch.arange(1)), same_sizes(1, 48, 64))
    decoded = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for a, b in zip(*(crop_image(i, views.specs, geometry) for i in (image, decoded)), strict=True):
        assert (a.int() - b.int()).abs().max() <= 1


def test_reported_box_and_flip_recreate_the_view():
    images = photo_tiles(40, 56)[:32]
    views = executor(ViewSpec(), ViewSpec(crop="padded"), size=24)
    draws, sizes = Draws(4, 2, torch.arange(32)), same_sizes(32, 40, 56)
    geometry = views.geometry(draws, sizes)
    for view in views.finish(views.crop(images, geometry), geometry, draws, sizes):
        assert view.source_size.tolist() == [[56, 40]] * 32
        box = (view.box * view.source_size.repeat(1, 2)).round()
        pixels = view.images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        again = torch.stack(
            [reference_crop(i, b, bool(f), 24, "bicubic") for i, b, f in zip(images, box, view.flip, strict=True)]
        )
        assert 255 * (pixels - again).abs().mean() < 0.36
        assert view.flip.any()
        assert not view.flip.all()


def run(views: ViewExecutor, images: torch.Tensor, positions: torch.Tensor):
    draws, sizes = Draws(9, 5, positions), same_sizes(len(images), *images.shape[-2:])
    geometry = views.geometry(draws, sizes)
    return geometry, views.finish(views.crop(images, geometry), geometry, draws, sizes)


@pytest.mark.parametrize("share", [1, 7, 24])
def test_the_rest_of_the_batch_does_not_matter(share):
    """Together, in halves or one by one: equal geometry, equal images up to float rounding."""
    images = photo_tiles(32, 32)[:48]
    views = executor(FULL.model_copy(update={"count": 2}), FULL.model_copy(update={"size": 16}))
    geometry, whole = run(views, images, torch.arange(48))
    parts = [run(views, images[r], r) for r in torch.arange(48).split(share)]
    for v, view in enumerate(whole):
        assert torch.equal(geometry[v].box, torch.cat([g[v].box for g, _ in parts]))
        assert torch.equal(geometry[v].flip, torch.cat([g[v].flip for g, _ in parts]))
        assert torch.equal(view.box, torch.cat([p[v].box for _, p in parts]))
        difference = (view.images - torch.cat([p[v].images for _, p in parts])).abs()
        # A pixel at the solarisation threshold may fall on either side of it.
        assert (difference > 1e-4).float().mean() < 1e-4


def test_finish_accepts_8_bit_crops_and_leaves_its_input_alone():
    images = photo_tiles(32, 32)[:40]
    views = executor(ViewSpec(jitter=Jitter(p=1), gray=0.5))
    draws, sizes = Draws(0, 0, torch.arange(40)), same_sizes(40, 32, 32)
    geometry = views.geometry(draws, sizes)
    crops = [
        torch.cat([crop_image(image, views.specs, one(geometry, k))[0][None] for k, image in enumerate(images)])
    ]
    floats = [crops[0] / 255]
    kept = floats[0].clone()
    from_bytes = views.finish(crops, geometry, draws, sizes)[0].images
    from_floats = views.finish(floats, geometry, draws, sizes)[0].images
    assert torch.equal(floats[0], kept)
    assert torch.allclose(from_bytes, from_floats, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    _, (view,) = run(executor(FULL, channels_last=channels_last), photo_tiles(32, 32)[:8], torch.arange(8))
    assert view.images.is_contiguous(memory_format=layout)


EVERYTHING = [
    FULL,
    ViewSpec(jitter=Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2), gray=0.2, blur=Blur()),
    ViewSpec(crop="padded", gray=0.3),
    ViewSpec(jitter=Jitter(hue=0), blur=Blur(kind="resize"), interpolation="bilinear"),
    ViewSpec(autoaugment=0.5, jitter=Jitter()),
    ViewSpec(),
]


@pytest.mark.parametrize("spec", EVERYTHING)
def test_views_of_one_kind_are_computed_together_as_if_alone(spec):
    """Three views of one specification, against each of them between views of other kinds."""
    images, positions = photo_tiles(32, 32)[:40], torch.arange(40)
    geometry, together = run(executor(spec.model_copy(update={"count": 3})), images, positions)
    others = [ViewSpec(size=number) for number in (5, 6, 7)]
    for v in range(3):
        apart_geometry, apart = run(executor(*others[:v], spec, *others[v + 1 :]), images, positions)
        assert torch.equal(apart_geometry[v].box, geometry[v].box)
        assert torch.equal(apart[v].box, together[v].box)
        assert torch.equal(apart[v].flip, together[v].flip)
        difference = (apart[v].images - together[v].images).abs()
        assert (difference > 1e-4).float().mean() < 1e-4, "thresholds may fall on either side of a value"
    assert (together[0].images - together[1].images).abs().mean() > 0.01


@pytest.mark.parametrize("spec", EVERYTHING)
def test_cutting_a_batch_into_cached_pieces_changes_nothing(spec, monkeypatch):
    images, positions = photo_tiles(32, 32)[:40], torch.arange(40)
    views = executor(spec.model_copy(update={"count": 2}))
    _, whole = run(views, images, positions)
    monkeypatch.setattr("sslbench.data.views._CACHED_VALUES", 7 * images[0].numel() + 1)
    _, pieces = run(views, images, positions)
    for a, b in zip(whole, pieces, strict=True):
        difference = (a.images - b.images).abs()
        assert (difference > 1e-4).float().mean() < 1e-4, "thresholds may fall on either side of a value"


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_tables_of_matrices_and_single_images_crop_alike(crop, monkeypatch):
    images, positions = photo_tiles(36, 48)[:24], torch.arange(24)
    views = executor(ViewSpec(crop=crop, size=24, count=2))
    geometry = views.geometry(Draws(1, 0, positions), same_sizes(24, 36, 48))
    by_table = views.crop(images, geometry)
    monkeypatch.setattr("sslbench.data.resample._TABLE_LIMIT", 0)
    for a, b in zip(by_table, views.crop(images, geometry), strict=True):
        assert (a - b).abs().max() < 1e-6
    monkeypatch.setattr("sslbench.data.views._MOST_PRODUCTS", 0)
    for a, b in zip(by_table, views.crop(images, geometry), strict=True):
        assert b.dtype == torch.uint8
        assert (255 * a - b).abs().mean() < 0.4
        assert (255 * a - b).abs().max() < 2.5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_autoaugment_may_take_all_images_of_a_batch_or_none(share: float) -> None:
    views = executor(FULL.model_copy(update={"autoaugment": share}))
    for position in range(6):
        _, (view,) = run(views, photo_tiles(32, 32)[:1], torch.tensor([position]))
        assert view.images.shape == (1, 3, 32, 32)
        assert bool(view.images.isfinite().all())
