"""Matched boxes and region pooling against golden vectors, statistics and torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop

from sslbench.data.views import ViewExecutor
from sslbench.nn.regions import (
    BoxSampling,
    Crop,
    MatchedBoxes,
    first_distinct,
    grid_draws,
    grid_rectangles,
    iou,
    jittered,
    match_boxes,
    overlap,
    project,
)
from sslbench.nn.roi import roi_vectors
from sslbench.plugin.api import Batch, View, ViewSpec
from sslbench.rng import Draws

SIDE = 224


def crop(top: int, left: int, height: int, width: int, flip: int) -> Crop:
    box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
    return Crop(box, torch.tensor([bool(flip)]))


def as_view(box: torch.Tensor, flip: torch.Tensor, size: tuple[int, int]) -> View:
    """A view without content; ``box`` in source pixels, ``size`` width and height."""
    source = torch.tensor(size, dtype=torch.float32).expand(len(box), 2)
    return View(torch.empty(len(box), 0, SIDE, SIDE), box / source.repeat(1, 2), flip, source)


def uniform(size: int, start: int = 0):
    """The numbers a batch gives to these positions of the global batch."""
    positions = torch.arange(start, start + size)
    return Batch((), positions, Draws(seed=3, step=1, positions=positions)).uniform


def place(first: Crop, second: Crop, rectangles: torch.Tensor) -> tuple[list[float], list[float]]:
    shared = overlap(first, second, SIDE)
    one, two = (project(rectangles[None], shared, view, SIDE)[0] for view in (first, second))
    return one.tolist(), two.tolist()


GRID = [
    (
        (50, 30, 200, 300, 0),
        (80, 100, 150, 150, 1),
        [2, 1, 1, 0, 40, 60, 5, 20],
        [113.2667, 53.6, 153.2667, 113.6],
        [22.0, 26.6667, 102.0, 106.6667],
    ),
    (
        (0, 0, 300, 400, 1),
        (20, 40, 240, 320, 1),
        [1, 2, 0, 1, 100, 70, 3, 2],
        [98.6, 105.9333, 198.6, 175.9333],
        [95.25, 113.75, 220.25, 201.25],
    ),
]


@pytest.mark.parametrize(("t1", "t2", "draws", "expected1", "expected2"), GRID)
def test_grid_boxes_of_explicit_draws(t1, t2, draws, expected1, expected2) -> None:
    first, second = crop(*t1), crop(*t2)
    extent = overlap(first, second, SIDE).extent
    boxes = place(first, second, grid_rectangles(torch.tensor([draws], dtype=torch.float32), extent)[0])
    assert boxes[0] == pytest.approx(expected1, abs=1e-3)
    assert boxes[1] == pytest.approx(expected2, abs=1e-3)


@pytest.mark.parametrize(
    ("flip2", "expected2"),
    [(1, [159.0, 41.25, 209.0, 116.25]), (0, [15.0, 41.25, 65.0, 116.25])],
)
def test_free_boxes_of_explicit_draws(flip2, expected2) -> None:
    first, second = crop(0, 0, 300, 400, 0), crop(20, 40, 240, 320, flip2)
    boxes = place(first, second, torch.tensor([12.0, 33.0, 40.0, 60.0]))
    assert boxes[0] == pytest.approx([34.4, 47.9333, 74.4, 107.9333], abs=1e-3)
    assert boxes[1] == pytest.approx(expected2, abs=1e-3)


def test_reference_frame_takes_each_axis_from_the_wider_view() -> None:
    shared = overlap(crop(50, 30, 200, 300, 0), crop(80, 100, 150, 150, 1), SIDE)
    assert shared.corner.tolist() == [[100, 80]]
    assert shared.scale[0].tolist() == pytest.approx([0.746667, 1.12], abs=1e-5)
    assert shared.extent.tolist() == [[112, 168]]


@pytest.mark.parametrize("t2", [(90, 90, 200, 200, 0), (100, 0, 100, 100, 0), (300, 300, 50, 50, 1)])
def test_views_that_hardly_overlap_have_no_boxes(t2) -> None:
    views = [as_view(*c, (600, 600)) for c in (crop(0, 0, 100, 100, 0), crop(*t2))]
    boxes = match_boxes(*views, BoxSampling(), 32, uniform(1))
    assert boxes.valid.tolist() == [False]
    assert all(torch.isfinite(each).all() for each in boxes[:2])


def test_grid_draws_stay_in_their_ranges() -> None:
    extent = torch.tensor([112.0, 168.0])
    draws = grid_draws(torch.rand(20_000, 8).clamp_max(1 - 2**-24), extent, 32)
    grid, cell, size, offset = draws.split(2, dim=1)
    assert grid.amin(0).tolist() == [1, 1]
    assert grid.amax(0).tolist() == [3, 5]
    assert (cell >= 0).all()
    assert (cell < grid).all()
    assert (size >= 32).all()
    assert (offset >= 0).all()
    assert (offset + size <= extent / grid).all()
    rectangles = grid_rectangles(draws, extent)
    assert (rectangles[:, :2] + rectangles[:, 2:] <= extent).all()


def test_jitter_moves_and_scales_by_the_original_sides() -> None:
    box = torch.tensor([[10.0, 20.0, 50.0, 100.0]])
    moved = jittered(box, torch.tensor([[1.1, 0.9, 1.05, 0.95]]))
    torch.testing.assert_close(moved, torch.tensor([[14.0, 12.0, 56.0, 88.0]]))


def test_iou_value() -> None:
    a = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]]])
    b = torch.tensor([[[1.0, 1.0, 3.0, 3.0]]])
    torch.testing.assert_close(iou(a[:, :, None], b[:, None]), torch.tensor([[[1 / 7], [0.0]]]))


def test_first_distinct_takes_the_first_try_that_keeps_away_and_else_the_last() -> None:
    here, there, far = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    candidates = torch.tensor([[[here, far, far], [there, far, here], [far, there, here]]])
    assert first_distinct(candidates, 0.5).tolist() == [[0, 1, 2]]


def random_crops(count: int, size: tuple[int, int], scale: tuple[float, float]) -> Crop:
    """Random resized crops of images of ``size`` (width, height), in whole pixels."""
    image = torch.empty(1, size[1], size[0])
    rows = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, height, width = torch.tensor(rows, dtype=torch.float32).unbind(1)
    return Crop(torch.stack([left, top, left + width, top + height], 1), torch.rand(count) < 0.5)


def sample(
    sampling: BoxSampling, size: tuple[int, int], scale: tuple[float, float], count: int = 2000
) -> tuple[MatchedBoxes, Crop, Crop]:
    torch.manual_seed(0)
    crops = random_crops(count, size, scale), random_crops(count, size, scale)
    views = [as_view(*each, size) for each in crops]
    return match_boxes(*views, sampling, 32, uniform(count)), *crops


def violations(boxes: torch.Tensor, threshold: float) -> float:
    """Percentage of boxes that overlap an earlier one of their image by ``threshold`` or more."""
    overlaps = iou(boxes[:, :, None], boxes[:, None]).tril(diagonal=-1)
    return 100 * float((overlaps.amax(dim=2) >= threshold).float().mean())


@pytest.mark.parametrize(
    ("size", "mode", "scale", "kept", "sides", "violating"),
    [
        ((500, 375), "grid", (0.2, 1.0), 98.6, (62, 62), 0.06),
        ((500, 375), "grid", (0.08, 1.0), 94.1, (65, 65), 0.6),
        ((500, 375), "free", (0.2, 1.0), 98.9, (91, 99), 0.2),
        ((640, 480), "grid", (0.2, 1.0), 98.6, (63, 63), 0.04),
        ((224, 224), "grid", (0.2, 1.0), 99.7, (63, 63), 0.02),
    ],
)
def test_statistics_of_the_sampler(size, mode, scale, kept, sides, violating) -> None:
    matched, _, _ = sample(BoxSampling(mode=mode), size, scale)
    boxes = matched.first[matched.valid]
    assert 100 * float(matched.valid.float().mean()) == pytest.approx(kept, abs=1.2)
    width, height = (boxes[..., 2:] - boxes[..., :2]).mean(dim=(0, 1)).tolist()
    assert (width + height) / 2 == pytest.approx(sum(sides) / 2, abs=2.5)
    assert violations(boxes, 0.5) <= 3 * violating + 0.05
    least = (boxes[..., 2:] - boxes[..., :2]).min()
    assert 31 < float(least) <= 33
    assert float(boxes.min()) >= 0
    assert float(boxes.max()) <= SIDE


def to_source(boxes: torch.Tensor, crop: Crop) -> torch.Tensor:
    """View pixels back to source pixels, written out independently of the sampler."""
    left, top, right, bottom = boxes.unbind(-1)
    flip = crop.flip[:, None]
    left, right = torch.where(flip, SIDE - right, left), torch.where(flip, SIDE - left, right)
    x0, y0, x1, y1 = crop.box[:, :, None].unbind(1)
    zoom_x, zoom_y = (x1 - x0) / SIDE, (y1 - y0) / SIDE
    return torch.stack([x0 + left * zoom_x, y0 + top * zoom_y, x0 + right * zoom_x, y0 + bottom * zoom_y], -1)


@pytest.mark.parametrize("mode", ["grid", "free"])
def test_both_boxes_of_a_pair_show_the_same_source_pixels(mode) -> None:
    matched, first, second = sample(BoxSampling(mode=mode), (500, 375), (0.2, 1.0), count=200)
    one, two = to_source(matched.first, first), to_source(matched.second, second)
    # The overlap is rounded to whole reference pixels, so a box may stick out of a view a little, where it is cut.
    torch.testing.assert_close(one[matched.valid], two[matched.valid], atol=2.0, rtol=0)
    assert float((one - two)[matched.valid].abs().median()) < 1e-3


def test_jitter_changes_view_2_alone() -> None:
    plain, _, _ = sample(BoxSampling(), (500, 375), (0.2, 1.0), count=50)
    moved, _, _ = sample(BoxSampling(jitter=0.1), (500, 375), (0.2, 1.0), count=50)
    assert torch.equal(plain.first, moved.first)
    distance = (plain.second - moved.second)[plain.valid].abs()
    assert 0.1 < float(distance.mean()) < 10


def test_threshold_one_accepts_every_first_candidate() -> None:
    matched, _, _ = sample(BoxSampling(iou_threshold=1.0), (500, 375), (0.2, 1.0), count=500)
    assert violations(matched.first[matched.valid], 0.5) > 5


def test_a_rank_draws_the_same_boxes_for_its_rows() -> None:
    torch.manual_seed(0)
    crops = [random_crops(12, (500, 375), (0.2, 1.0)) for _ in range(2)]
    whole = match_boxes(*(as_view(*c, (500, 375)) for c in crops), BoxSampling(), 32, uniform(12))
    share = [as_view(c.box[5:], c.flip[5:], (500, 375)) for c in crops]
    part = match_boxes(*share, BoxSampling(), 32, uniform(7, start=5))
    assert torch.equal(part.first, whole.first[5:])
    assert torch.equal(part.second, whole.second[5:])


RAMP = torch.arange(49.0).view(1, 1, 7, 7)


@pytest.mark.parametrize(("aligned", "plain", "mirrored"), [(False, 23, 22), (True, 19, 19)])
def test_only_aligned_pooling_agrees_with_the_mirror_image(aligned, plain, mirrored) -> None:
    box = torch.tensor([[[32.0, 64.0, 96.0, 128.0]]])
    mirror = torch.tensor([[[224.0 - 96, 64.0, 224.0 - 32, 128.0]]])
    assert float(roi_vectors(RAMP, box, SIDE, aligned)) == pytest.approx(plain, abs=1e-4)
    assert float(roi_vectors(RAMP.flip(-1), mirror, SIDE, aligned)) == pytest.approx(mirrored, abs=1e-4)


def random_boxes(images: int, count: int, side: int) -> torch.Tensor:
    corners = torch.rand(images, count, 2, 2) * side
    return torch.cat([corners.amin(2), corners.amax(2)], dim=-1)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("cells", "side"), [(7, 224), (8, 32), (3, 28)])
def test_pooling_and_its_gradient_equal_torchvision(aligned, cells, side) -> None:
    torch.manual_seed(1)
    maps = torch.randn(3, 5, cells, cells, requires_grad=True)
    boxes = random_boxes(3, 20, side)
    expected = roi_align(maps, list(boxes), 1, cells / side, -1, aligned).view(3, 20, 5)
    ours = roi_vectors(maps, boxes, side, aligned)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    probe = torch.randn(3, 20, 5)
    (grad,) = torch.autograd.grad((ours * probe).sum(), maps)
    (expected_grad,) = torch.autograd.grad((expected * probe).sum(), maps)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


def test_pooling_is_fp32_under_autocast() -> None:
    maps, boxes = torch.randn(2, 4, 7, 7), random_boxes(2, 3, SIDE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = roi_vectors(maps, boxes, SIDE)
        assert roi_vectors(maps.bfloat16(), boxes, SIDE).dtype == torch.float32
    assert torch.equal(pooled, roi_vectors(maps, boxes, SIDE))


@pytest.mark.parametrize("crop_kind", ["resized", "padded"])
def test_matched_boxes_show_the_same_content_in_executed_views(crop_kind) -> None:
    """The sampler and the view executor agree on frames: each pixel holds its own source coordinates."""
    x = torch.arange(240).expand(180, 240)
    y = torch.arange(180)[:, None].expand(180, 240)
    images = torch.stack([x, y, 0 * x]).to(torch.uint8).expand(16, 3, 180, 240).contiguous()
    sizes, positions = torch.tensor([[180, 240]]).expand(16, 2), torch.arange(16)
    spec = ViewSpec(count=2, scale=(0.4, 1.0), crop=crop_kind, padding=0.05, interpolation="bilinear")
    executor = ViewExecutor([spec], size=96, mean=[0.0] * 3, std=[1.0] * 3, device=torch.device("cpu"))
    draws = Draws(0, 0, positions)
    geometry = executor.geometry(draws, sizes)
    first, second = executor.finish(executor.crop(images, geometry), geometry, draws, sizes)
    boxes = match_boxes(first, second, BoxSampling(), 16, uniform(16))
    assert (first.flip != second.flip).any()
    one = 255 * roi_vectors(first.images, boxes.first, 96)
    two = 255 * roi_vectors(second.images, boxes.second, 96)
    difference = (one - two)[boxes.valid].abs()
    assert len(difference) >= 10
    assert float(difference[..., :2].quantile(0.9)) < 0.3
