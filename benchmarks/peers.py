"""Training speed beside lightly, and beside views made image by image with PIL.

    python benchmarks/peers.py [--peer-python PYTHON] [--data FOLDER] [--backbone conv4|resnet18] [--quick]

Both sides: the same backbone, views, heads, optimiser, batch of 128 and images (``--data``: a folder of CIFAR-10
as JPEG files, decoded once; else textures), fresh processes in interleaved rounds. Docs: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Case, Report, arguments, measure, open_report, python, ratio, spread, table
from images import image_file

from sslbench.engine.layout import has_fast_bf16

WAYS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
WEAK = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
BLUR = {"p": 0.5, "kernel": 0.375}
"""The whole kernel, as Pillow's blur has it."""


class Setting(NamedTuple):
    """How thoroughly a backbone is measured, so that all of it ends in minutes."""

    rounds: int
    ways: tuple[str, ...]
    methods: tuple[str, ...]
    relations: tuple[int, ...]
    """Numbers K of views for which relational reasoning is measured."""
    hidden: int


METHODS = ("simclr", "byol", "moco", "swav")
SETTINGS = {
    "conv4": Setting(3, ("as shipped", "passive", "1 thread"), METHODS, (4, 16), 256),
    "resnet18": Setting(2, ("as shipped",), METHODS, (), 512),
}


def view(scale: float, jitter: dict[str, float], **more: Any) -> dict[str, Any]:
    common = {"interpolation": "bilinear", "gray": 0.2, "jitter": {"p": 0.8, **jitter}}
    return {"scale": [scale, 1.0], **common, **more}


OURS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "simclr": ([view(0.08, STRONG, count=2)], {}),
    "byol": ([view(0.08, WEAK), view(0.08, WEAK, solarize=0.2)], {}),
    "moco": ([view(0.2, WEAK | {"saturation": 0.4}, count=2, blur=BLUR)], {"bn_groups": 1, "queue": 4096}),
    "swav": ([view(0.14, STRONG, count=2, blur=BLUR)], {"prototypes": 512}),
}
"""The views and options that compute what lightly's documented CIFAR-10 settings compute."""


def main() -> int:
    options = parse()
    setting = SETTINGS[options.backbone]
    report = open_report(options, render)
    with image_file(options.data, 20_000 if options.quick else 50_000, side=32) as images:
        cases = [case for method in options.methods for case in contrast(method, str(images), options)]
        cases += [case for views in options.relations for case in relation(views, str(images), options)]
        measure(cases, 1 if options.quick else options.rounds or setting.rounds, report)
    print(render(report))
    return 1 if report.failures else 0


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "peers")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that can import lightly")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as image files")
    parser.add_argument("--backbone", choices=SETTINGS, default="conv4")
    parser.add_argument("--methods", nargs="*", choices=METHODS)
    parser.add_argument("--relations", nargs="*", type=int, metavar="K", help="relational reasoning with K views")
    parser.add_argument("--ways", nargs="*", choices=WAYS, help="how the peer is run")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="length of a window (default: 4; quick: 1)")
    options = parser.parse_args()
    setting = SETTINGS[options.backbone]
    for name in ("methods", "relations", "ways"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(setting, name))
    options.seconds = options.seconds or (1.0 if options.quick else 4.0)
    options.name = f"peers-{options.backbone}"
    options.has_lightly = imports_lightly(options.peer_python)
    return options


def imports_lightly(interpreter: str) -> bool:
    probe = subprocess.run([interpreter, "-c", "import lightly"], capture_output=True, check=False)
    if probe.returncode:
        print(
            f"{interpreter} cannot import lightly: it is left out (--peer-python names another)", file=sys.stderr
        )
    return probe.returncode == 0


def contrast(method: str, images: str, options: argparse.Namespace) -> list[Case]:
    """One method by both sides."""
    windows = ("--seconds", options.seconds, "--ceiling", options.seconds / 2.5)
    hidden = 2 * SETTINGS[options.backbone].hidden if method == "byol" else SETTINGS[options.backbone].hidden
    cases = ours(method, f"method.hidden={hidden}", *own_options(method, images, options), windows=windows)
    peer = ("--images", images, "--backbone", options.backbone, "--hidden", hidden, *windows)
    command = python("lightly_loop.py", method, *peer, interpreter=options.peer_python)
    return cases + (in_ways(method, "lightly", command, options.ways) if options.has_lightly else [])


def own_options(method: str, images: str, options: argparse.Namespace) -> list[str]:
    views, more = OURS[method]
    return [
        *(f"method.name={method}", f"method.views={json.dumps(views)}", f"backbone.name={options.backbone}"),
        *("dataset.name=array", f"dataset.images={images}", "train.batch_size=128", "train.device=cpu"),
        *("optim.name=sgd", "optim.lr=0.03", "optim.momentum=0", "optim.weight_decay=0", "optim.warmup_epochs=0"),
        *(f"method.{key}={value}" for key, value in more.items()),
    ]


def relation(views: int, images: str, options: argparse.Namespace) -> list[Case]:
    """Relational reasoning with K views of each image, batch 64."""
    group = f"relationnet K={views}"
    windows = ("--seconds", options.seconds, "--ceiling", options.seconds / 2.5)
    chosen = [
        *("method.name=relationnet", f"method.views={json.dumps([view(0.08, STRONG, count=views)])}"),
        *(f"backbone.name={options.backbone}", "dataset.name=array", f"dataset.images={images}"),
        *("train.batch_size=64", "train.device=cpu"),
    ]
    plain = python("pil_loop.py", "--images", images, "--views", views, "--backbone", options.backbone, *windows)
    ways = [way for way in options.ways if way != "1 thread"]
    return ours(group, *chosen, windows=windows) + in_ways(group, "per-image PIL pipeline", plain, ways)


def ours(group: str, *chosen: str, windows: tuple[object, ...]) -> list[Case]:
    """In its automatic settings, and in bf16 where the CPU computes in it."""
    cases = [Case(group, "sslbench", python("ours.py", *chosen, "train.precision=fp32", *windows))]
    if has_fast_bf16(torch.device("cpu")):
        cases.append(Case(group, "sslbench bf16", python("ours.py", *chosen, "train.precision=bf16", *windows)))
    return cases


def in_ways(group: str, peer: str, command: tuple[str, ...], ways: list[str]) -> list[Case]:
    return [Case(group, f"{peer}, {way}", command, WAYS[way], 1 if way == "1 thread" else None) for way in ways]


HEADER = ("program", "images/s", "in memory", "share %", "cores used", "images/CPU s", "sslbench / this")


def render(report: Report) -> str:
    """One table per method."""
    parts = ["# Training speed beside others", "", f"{report.name}: source images per second."]
    for group in report.groups():
        rows = [row(report, group, case) for case in report.cases(group)]
        parts += ["", f"## {group}", "", table(HEADER, rows)]
    return "\n".join(parts)


def row(report: Report, group: str, case: str) -> list[str]:
    rates = report.values(group, case)
    ceiling = report.values(group, case, "ceiling.images_per_second")
    shares = {number: 100 * rates[number] / ceiling[number] for number in ceiling}
    own = report.values(group, "sslbench")
    return [
        case,
        spread(rates),
        spread(ceiling),
        spread(shares),
        spread(report.values(group, case, "cores"), 2),
        spread(report.values(group, case, "images_per_cpu_second")),
        "" if case == "sslbench" else ratio(own, rates),
    ]


if __name__ == "__main__":
    sys.exit(main())
