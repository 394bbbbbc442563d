"""The same view specifications, executed the slow way: one PIL image at a time with torchvision's transforms."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import AutoAugment
from torchvision.transforms import v2 as T
from torchvision.transforms.autoaugment import _apply_op

from sslbench.plugin.viewspec import Blur, ViewSpec

PIL_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TV_MODES = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}


@lru_cache(maxsize=4)
def photo_tiles(height: int, width: int) -> Tensor:
    """Tiles of two real photographs, uint8 ``[N,3,height,width]``."""
    tiles = []
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)
        windows = photo.unfold(1, height, height).unfold(2, width, width)
        tiles.append(windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, height, width))
    return torch.cat(tiles)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 ``[3,H,W]`` to PIL."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """PIL to float ``[3,H,W]`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def reference_crop(image: Tensor, box: Tensor, flip: bool, side: int, interpolation: str) -> Tensor:
    """Crop (zeros beyond the image), resize and flip with Pillow; float ``[3,S,S]``."""
    cropped = to_pil(image).crop(tuple(int(edge) for edge in box.tolist()))
    view = cropped.resize((side, side), PIL_MODES[interpolation])
    return from_pil(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def operation_of_2021(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """One of AutoAugment's operations by torchvision, shears as it did them before 2022."""
    if name == "ShearX":
        return _sheared_in_2021(image, magnitude)
    return _apply_op(image, name, magnitude, T.InterpolationMode.NEAREST, None)


def _sheared_in_2021(image: Image.Image, magnitude: float) -> Image.Image:
    """An affine map about the centre whose shear is the magnitude in degrees, by Pillow's nearest neighbour."""
    coefficients = _inverse_affine((image.width * 0.5, image.height * 0.5), [math.degrees(magnitude), 0.0])
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


def _inverse_affine(center: tuple[float, float], shear: list[float]) -> list[float]:
    """torchvision's inverse matrix without rotation, translation and scale: C * inverse(shear) * C^-1."""
    sx, sy = (math.radians(s) for s in shear)
    forward = np.array([[1, -math.tan(sx)], [math.tan(-sy), 1 + math.tan(sy) * math.tan(sx)]])
    inverse = np.linalg.inv(forward)
    offset = np.array(center) - inverse @ np.array(center)
    return [*inverse[0], offset[0], *inverse[1], offset[1]]


class AutoAugmentOf2021(AutoAugment):
    """torchvision's, with the shears of 2021."""

    def forward(self, img: Image.Image) -> Image.Image:
        number, uniform, signs = self.get_params(len(self.policies))
        for n, (name, p, level) in enumerate(self.policies[number]):
            magnitudes, signed = self._augmentation_space(10, (img.height, img.width))[name]
            magnitude = float(magnitudes[level]) if level is not None else 0.0
            if uniform[n] <= p:
                img = operation_of_2021(img, name, -magnitude if signed and signs[n] == 0 else magnitude)
        return img


class ResizeBlur:
    """Shrink and enlarge by a factor drawn from a list."""

    def __init__(self, factors: tuple[float, ...]) -> None:
        self.factors = factors

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        factor = random.choice(self.factors)
        small = image.resize((int(width / factor), int(height / factor)), Image.Resampling.BICUBIC)
        return small.resize((width, height), Image.Resampling.BICUBIC)


def _crop_steps(spec: ViewSpec, height: int, width: int) -> list[object]:
    side, mode = [spec.size, spec.size], TV_MODES[spec.interpolation]
    if spec.crop == "resized":
        return [T.RandomResizedCrop(side, scale=spec.scale, ratio=spec.ratio, interpolation=mode)]
    if spec.crop == "padded":
        padding = [round(width * spec.padding), round(height * spec.padding)]
        return [T.Pad(padding), T.RandomCrop((height, width)), T.Resize(side, interpolation=mode)]
    square = round(min(height, width) * spec.center)
    return [T.CenterCrop(square), T.Resize(side, interpolation=mode)]


def _blur(blur: Blur, side: int) -> object:
    if blur.kind == "resize":
        return ResizeBlur(blur.factors)
    return T.GaussianBlur(2 * max(1, int(blur.kernel * side) // 2) + 1, sigma=blur.sigma)


def _color_steps(spec: ViewSpec) -> list[object]:
    steps: list[object] = []
    if spec.jitter:
        j = spec.jitter
        steps.append(T.RandomApply([T.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue)], p=j.p))
    steps.append(T.RandomGrayscale(spec.gray))
    if spec.blur:
        assert spec.size is not None
        steps.append(T.RandomApply([_blur(spec.blur, spec.size)], p=spec.blur.p))
    return [*steps, T.RandomSolarize(128, spec.solarize)]


def reference_transform(spec: ViewSpec, height: int, width: int) -> T.Compose:
    """PIL image to PIL image, random numbers from torch's and Python's global generators."""
    assert spec.size is not None
    assert spec.near is None, "a crop that depends on another view's is not a transform of the image alone"
    colors = _color_steps(spec)
    if spec.autoaugment:
        either = [AutoAugmentOf2021(), T.Compose(colors)]
        colors = [T.RandomChoice(either, p=[spec.autoaugment, 1 - spec.autoaugment])]
    return T.Compose([*_crop_steps(spec, height, width), T.RandomHorizontalFlip(spec.flip), *colors])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators that transforms draw from, seeded; torch's is as before afterwards."""
    random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def reference_view(image: Image.Image, spec: ViewSpec) -> Tensor:
    """One random view of one image: float ``[3,S,S]`` in [0, 1]."""
    return from_pil(_transform(spec, image.height, image.width)(image))


_transform = lru_cache(maxsize=256)(reference_transform)


def reference_views(spec: ViewSpec, images: Tensor, seed: int) -> Tensor:
    """One random view of each image: uint8 ``[N,3,H,W]`` to float ``[N,3,S,S]`` in [0, 1]."""
    with seeded(seed):
        return torch.stack([reference_view(to_pil(image), spec) for image in images])
