"""Training speed on one CUDA device, on synthetic images that are resident there, beside lightly if it is there.

    python benchmarks/gpu.py [--peer-python PYTHON] [--only NAME ...] [--quick]
    python benchmarks/gpu.py --device cpu --tiny        the same path without a GPU; its numbers mean nothing

Never run on a GPU so far. Exit code 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Case, Report, arguments, measure, open_report, python, ratio, spread, table
from images import image_file
from peers import OURS, STRONG, imports_lightly, view

AUGMENTATION = ("geometry", "crop", "colours")


class Training(NamedTuple):
    """One training; sizes in pixels."""

    method: str
    backbone: str
    batch: int
    views: list[dict[str, Any]] | None
    options: dict[str, Any]
    large: bool = False
    """Of photos of 256 pixels rather than images of 32."""
    peer: bool = True
    """Whether lightly has the same."""


def crops(size: int, scale: tuple[float, float], count: int) -> dict[str, Any]:
    return view(scale[0], STRONG, blur={"p": 0.5}, count=count, size=size) | {"scale": scale}


TWO = [crops(224, (0.08, 1), 2)]
MULTI = [crops(224, (0.14, 1), 2), crops(96, (0.05, 0.14), 6)]
SMALL = {"simclr": {"hidden": 512}, "byol": {"hidden": 1024}, "swav": {"hidden": 512, "prototypes": 512}}
TRAININGS = {
    **{
        f"{method} ResNet-18, 32 px": Training(method, "resnet18", 512, OURS[method][0], options)
        for method, options in SMALL.items()
    },
    "scrl ResNet-18, 32 px": Training("scrl", "resnet18", 512, None, {}, peer=False),
    "simclr ResNet-50, 2x224": Training("simclr", "resnet50", 256, TWO, {"hidden": 2048}, large=True),
    "swav ResNet-50, 2x224+6x96": Training(
        "swav", "resnet50", 128, MULTI, {"hidden": 2048, "prototypes": 512}, large=True
    ),
    "simclr ViT-S/16, 2x224": Training("simclr", "vit_s16", 256, TWO, {"hidden": 384}, large=True, peer=False),
}


def main() -> int:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is there: nothing is measured (--device cpu --tiny tries the path)", file=sys.stderr)
        return 2
    report = open_report(options, render)
    # Others' use of the CPU matters little here, and a container shows that of the whole host.
    report.limit = None
    small, large = (64, 16) if options.tiny else (50_000, 2_048)
    with (
        image_file(None, small, side=32) as icons,
        image_file(None, large, side=40 if options.tiny else 256) as photos,
    ):
        cases = [case for name in options.only for case in both(name, icons, photos, options)]
        measure(cases, options.rounds, report)
    print(render(report))
    return 1 if report.failures else 0


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "gpu")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that can import lightly")
    parser.add_argument("--only", nargs="*", choices=TRAININGS, default=tuple(TRAININGS), metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--no-peer", action="store_true", help="without lightly")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    options.quick = options.quick or options.tiny
    options.seconds = 0.2 if options.tiny else 1 if options.quick else 4
    options.peer = not options.no_peer and imports_lightly(options.peer_python)
    return options


def both(name: str, icons: Path, photos: Path, options: argparse.Namespace) -> list[Case]:
    training = shrunk(TRAININGS[name]) if options.tiny else TRAININGS[name]
    images = photos if training.large else icons
    cases = [Case(name, "sslbench", ours(training, images, options))]
    if training.peer and options.peer:
        peer = lightly(training, images, options)
        cases.append(Case(name, "lightly", peer))
        cases += [] if training.large else [Case(name, "lightly, bf16", (*peer, "--bf16"))]
    return cases


def ours(training: Training, images: Path, options: argparse.Namespace) -> tuple[str, ...]:
    seconds = options.seconds
    method = dict(training.options) | ({"views": training.views} if training.views else {})
    chosen = [
        *(
            f"method.name={training.method}",
            f"backbone.name={training.backbone}",
            f"train.device={options.device}",
        ),
        *("dataset.name=array", f"dataset.images={images}", f"train.batch_size={training.batch}"),
        *(
            "optim.name=sgd",
            "optim.lr=0.03",
            *(f"method.{key}={json.dumps(value)}" for key, value in method.items()),
        ),
    ]
    return python("ours.py", *chosen, "--seconds", seconds, "--ceiling", seconds / 2, "--phases", seconds / 2)


def lightly(training: Training, images: Path, options: argparse.Namespace) -> tuple[str, ...]:
    """With a loader worker per core but two, 16 at most; bf16 is not in its raw loops.

    Workers deliver in bursts where they are what binds, so windows are longer then.
    """
    seconds = options.seconds * (3 if training.large else 1)
    workers = max(2, min(16, (os.cpu_count() or 4) - 2))
    size = ("--size", training.views[0]["size"]) if training.large and training.views else ()
    return python(
        *("lightly_loop.py", training.method, "--images", images, "--backbone", training.backbone, *size),
        *("--hidden", training.options["hidden"], "--batch", training.batch, "--workers", workers),
        *("--device", options.device, "--seconds", seconds, "--warmup", seconds, "--ceiling", options.seconds / 2),
        interpreter=options.peer_python,
    )


def shrunk(training: Training) -> Training:
    views = training.views and [
        spec | ({"size": spec["size"] // 7} if "size" in spec else {}) for spec in training.views
    ]
    return training._replace(batch=4, views=views)


HEADER = (
    *("training", "batch", "sslbench images/s", "in memory", "share %", "data and augmentation %", "memory MB"),
    *("lightly", "sslbench / lightly", "lightly, bf16", "sslbench / this"),
)


def render(report: Report) -> str:
    """One row per training."""
    rows = [row(report, name) for name in report.groups()]
    return "\n".join(["# Training on one GPU", "", table(HEADER, rows)])


def row(report: Report, name: str) -> list[str]:
    def own(key: str) -> dict[int, float]:
        return report.values(name, "sslbench", key)

    rates, ceiling = own("images_per_second"), own("ceiling.images_per_second")
    peers = [report.values(name, case) for case in ("lightly", "lightly, bf16")]
    shares = {number: 100 * rates[number] / ceiling[number] for number in ceiling}
    numbers = (rates, ceiling, shares, augmentation(report, name), own("memory_mb"))
    return [
        *(name, spread(own("batch"), 0), *(spread(values) for values in numbers)),
        *(cell for peer in peers for cell in (spread(peer), ratio(rates, peer))),
    ]


def augmentation(report: Report, name: str) -> dict[int, float]:
    """The device's time for it as percent of a step, by round; beside the step, so that it may cost nothing."""
    return {
        number: 100
        * sum(phases["milliseconds"][phase] for phase in AUGMENTATION)
        / (1000 * phases["seconds"])
        * phases["steps"]
        for number, phases in report.values(name, "sslbench", "phases").items()
    }


if __name__ == "__main__":
    sys.exit(main())
