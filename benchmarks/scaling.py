"""How speed and memory change as one size grows: batch, views, pixels, K, prototypes, decoding workers.

    python benchmarks/scaling.py [--axes batch views ...] [--device cuda] [--quick]

Each point is a fresh process. Memory is the most it held, its workers not counted: resident on a CPU, allocated by
torch on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from harness import Case, Report, arguments, measure, open_report, python, spread, table
from images import image_file, write_photos

PHOTOS, PHOTO_SIDE = 1024, 256


class Axis(NamedTuple):
    """What grows, and what stays."""

    method: str
    option: str
    points: tuple[int, ...]
    fixed: tuple[str, ...] = ()
    photos: bool = False
    """Of JPEG files of 256 pixels rather than 32-pixel images in memory."""


AXES = {
    "batch": Axis("simclr", "train.batch_size", (32, 64, 128, 256, 512)),
    "views": Axis("swav", "method.views", (2, 4, 6, 8)),
    "pixels": Axis("simclr", "method.views", (16, 32, 64, 96), ("train.batch_size=64",)),
    "K": Axis("relationnet", "method.views", (2, 4, 8, 16, 32)),
    "prototypes": Axis("swav", "method.prototypes", (100, 300, 1000, 3000, 10_000)),
    "workers": Axis("simclr", "data.workers", (0, 1, 2, 4), ("data.resident=off", "train.batch_size=64"), True),
}


def main() -> int:
    options = parse()
    report = open_report(options, render)
    with ExitStack() as stack:
        images = stack.enter_context(image_file(None, 10_000, side=32))
        photos = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sslbench-photos-")))
        if any(AXES[name].photos for name in options.axes):
            write_photos(photos, PHOTOS, PHOTO_SIDE)
        cases = [case for name in options.axes for case in points(name, images, photos, options)]
        measure(cases, 1 if options.quick else options.rounds, report)
    print(render(report))
    return 1 if report.failures else 0


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "scaling")
    parser.add_argument("--axes", nargs="*", choices=AXES, default=tuple(AXES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def points(name: str, images: Path, photos: Path, options: argparse.Namespace) -> list[Case]:
    axis = AXES[name]
    data = ("dataset.name=folder", f"dataset.root={photos}") if axis.photos else array(images)
    common = (f"method.name={axis.method}", f"backbone.name={options.backbone}", f"train.device={options.device}")
    seconds = ("--seconds", 0.5 if options.quick else 2)
    chosen = axis.points[:2] if options.quick else axis.points
    return [
        Case(name, str(point), python("ours.py", *common, *data, *axis.fixed, setting(name, point), *seconds))
        for point in chosen
    ]


def array(images: Path) -> tuple[str, ...]:
    return ("dataset.name=array", f"dataset.images={images}")


def setting(name: str, point: int) -> str:
    """The option that puts a run at a point of an axis."""
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    view = {"count": 2, "gray": 0.2, "jitter": jitter}
    views = {
        "views": [view | {"count": point}],
        "K": [view | {"count": point}],
        "pixels": [view | {"size": point}],
    }
    return f"{AXES[name].option}={json.dumps(views[name]) if name in views else point}"


HEADER = ("images/s", "images/CPU s", "memory MB")


def render(report: Report) -> str:
    """One table per axis."""
    parts = ["# Speed and memory as one size grows"]
    for name in report.groups():
        axis = AXES[name]
        rows = [row(report, name, point) for point in report.cases(name)]
        fixed = ", ".join([axis.method, *axis.fixed])
        parts += ["", f"## {name}", "", f"{fixed}:", "", table((name, *HEADER), rows)]
    return "\n".join(parts)


def row(report: Report, name: str, point: str) -> list[str]:
    keys = ("images_per_second", "images_per_cpu_second", "memory_mb")
    return [point, *(spread(report.values(name, point, key)) for key in keys)]


if __name__ == "__main__":
    sys.exit(main())
