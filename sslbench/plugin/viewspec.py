"""Views as data: what a method wants to see of each image. The core executes them in batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sslbench.config.options import Options


class Jitter(Options):
    """Colour jitter: each strength s draws a factor from [max(0, 1-s), 1+s] (hue: a shift from [-s, s])."""

    p: float = Field(0.8, ge=0, le=1)
    """Probability that an image is jittered."""
    brightness: float = Field(0.4, ge=0)
    """Strength s of the brightness factor."""
    contrast: float = Field(0.4, ge=0)
    """Strength s of the contrast factor."""
    saturation: float = Field(0.4, ge=0)
    """Strength s of the saturation factor."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest hue shift as a fraction of the colour circle."""


class Blur(Options):
    """Blur by a Gaussian kernel, or by shrinking and enlarging the image."""

    p: float = Field(0.5, ge=0, le=1)
    """Probability that an image is blurred."""
    kind: Literal["gaussian", "resize"] = "gaussian"
    """`gaussian`: separable kernel; `resize`: bicubic down to side/factor and up again (as the SCRL authors
    ran it)."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation in pixels of the view."""
    kernel: float = Field(0.1, gt=0, le=1)
    """Kernel side as a fraction of the view's side; the radius is int(kernel*side)//2, at least 1. Pillow's
    blur has no such limit: up to sigma 2, a radius of 6 equals it (0.375 at 32 pixels, 0.125 at 96, 0.1 from
    120)."""
    factors: tuple[float, ...] = (1.1, 1.2, 1.5)
    """`resize` only: shrink factors, one drawn uniformly per image."""

    @model_validator(mode="after")
    def _is_a_blur(self) -> Blur:
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma must be two ascending numbers above 0, got {list(self.sigma)}")
        if not self.factors or min(self.factors) < 1:
            raise ValueError(f"factors must be numbers of 1 or more, at least one, got {list(self.factors)}")
        return self


class ViewSpec(Options):
    """One kind of view: crop, flip, colour. Steps run in the order of the fields."""

    count: int = Field(1, ge=1)
    """How many views of this kind each image gives."""
    size: int | None = Field(None, ge=4)
    """Side of the square view in pixels; unset: the data set's own image size (224 if that varies)."""
    crop: Literal["resized", "padded", "none"] = "resized"
    """`resized`: random resized crop; `padded`: random crop after zero padding; `none`: the image
    cut to a centred square and resized."""
    center: float = Field(1.0, gt=0, le=1)
    """`none`: side of that square as a fraction of the short side (0.875 is "resize 256, crop 224")."""
    scale: tuple[float, float] = (0.2, 1.0)
    """`resized`: range of the crop's area as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """`resized`: range of the crop's aspect ratio, drawn log-uniformly."""
    near: int | None = Field(None, ge=0)
    """`resized`: number of an earlier view whose crop this one must overlap; unset: none. Views are counted from
    0, each one of a `count` by itself."""
    overlap: float = Field(0.1, gt=0, le=1)
    """`near`: least overlap as a fraction of this crop's target area, in pixels of the source image. If ten tries
    fail, the crop is drawn without the constraint."""
    padding: float = Field(0.125, ge=0, le=1)
    """`padded`: zero padding per side as a fraction of the image (4 pixels of 32)."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Antialiased, as PIL's resize."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    autoaugment: float = Field(0.0, ge=0, le=1)
    """Probability that AutoAugment's ImageNet policy takes the place of the colour operations below; it works
    on the view's pixels rounded to 8 bits."""
    jitter: Jitter | None = None
    """Colour jitter in a random order per image."""
    gray: float = Field(0.0, ge=0, le=1)
    """Probability of greyscale."""
    blur: Blur | None = None
    """Blur, of one strength per image."""
    solarize: float = Field(0.0, ge=0, le=1)
    """Probability of inverting all pixels at or above 128 of 255."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> ViewSpec:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        if self.near is not None and self.crop != "resized":
            raise ValueError(f"near needs crop 'resized', got '{self.crop}'")
        return self
