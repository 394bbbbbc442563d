"""Where the time of a training step goes, by method and backbone.

    python benchmarks/phases.py [--methods simclr byol ...] [--backbones conv4 resnet18] [--device cuda] [--quick]

A stopwatch wraps what the real loop calls: wall time on a CPU, events on a GPU. "rest" is the loop itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from harness import Case, Report, arguments, measure, open_report, python, table
from images import image_file

PHASES = ("geometry", "crop", "colours", "forward", "backward", "optimiser", "after step", "meter", "rest")
METHODS = ("simclr", "byol", "moco", "swav", "scrl", "relationnet")


def main() -> int:
    options = parse()
    report = open_report(options, render)
    seconds = 0.5 if options.quick else 3
    with image_file(options.data, 20_000, side=32) as images:
        cases = [
            Case(backbone, method, command(method, backbone, images, options, seconds))
            for backbone in options.backbones
            for method in options.methods
        ]
        measure(cases, 1 if options.quick else 3, report)
    print(render(report))
    return 1 if report.failures else 0


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "phases")
    parser.add_argument("--data", type=Path, help="folder of images of one size; unset: textures")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--backbones", nargs="*", default=("conv4",))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more options of all runs")
    return parser.parse_args()


def command(
    method: str, backbone: str, images: Path, options: argparse.Namespace, seconds: float
) -> tuple[str, ...]:
    chosen = [
        *(f"method.name={method}", f"backbone.name={backbone}", f"train.device={options.device}"),
        *("dataset.name=array", f"dataset.images={images}", *options.set),
    ]
    return python("ours.py", *chosen, "--seconds", seconds, "--phases", seconds)


def render(report: Report) -> str:
    """Milliseconds and percent of each phase."""
    head = "Milliseconds a step (percent of the step), each method with its own defaults."
    parts = ["# Phases of a training step", "", head]
    for backbone in report.groups():
        rows = [
            row(report, backbone, method, clock)
            for method in report.cases(backbone)
            for clock in ("milliseconds", "host")
            if report.values(backbone, method, f"phases.{clock}")
        ]
        parts += ["", f"## {backbone}", "", table(("method", "images/s", *PHASES), rows)]
    return "\n".join(parts)


def row(report: Report, backbone: str, method: str, clock: str) -> list[str]:
    """``host``: time of the process that asks a GPU for operations."""

    def median(key: str) -> float:
        return float(statistics.median(report.values(backbone, method, key).values()))

    step = 1000 * median("phases.seconds") / median("phases.steps")
    spent = [median(f"phases.{clock}.{phase}") for phase in PHASES]
    title = f"{method}, host" if clock == "host" else method
    return [title, f"{median('images_per_second'):,.0f}", *(f"{ms:.1f} ({100 * ms / step:.0f})" for ms in spent)]


if __name__ == "__main__":
    sys.exit(main())
