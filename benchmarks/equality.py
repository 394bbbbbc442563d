"""Several processes train as one: how far every built-in method is from it.

    python benchmarks/equality.py [--worlds 2 4] [--methods simclr "moco, groups" ...] [--quick]

Each method trains five steps on toy images, in two epochs, with batches that the processes share evenly and not,
on a network with batch normalisation and on one without, and is compared with one process that does the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import HERE, machine, table

from sslbench.testing import RankReport
from sslbench.testing.ranks import Checked, check_all
from sslbench.testing.trial import QUANTITIES

_SMALL = {"hidden": 16, "out_dim": 8}
_CLUSTERS = {**_SMALL, "prototypes": (6, 5, 4)}
_MOCO = {**_SMALL, "knn_weight": 0.4, "knn_topk": 3}
#: Barlow: correlations of so few rows bend within a usual step. SeLa-v2: rounding takes it past a ReLU's corner.
_SHORT_STEPS = {"optim": {"lr": 1e-4}}
_ONE_GROUP = {"train": {"sync_bn": True}}

#: Every method that trains, small, and those settings of it that meet other collectives.
METHODS = (
    Checked("barlow", _SMALL, _SHORT_STEPS, title="barlow, short steps"),
    Checked("byol", _SMALL),
    Checked("deepcluster", {"clusters": 5}),
    Checked("deepcluster_v2", _CLUSTERS),
    Checked("deepinfomax", {"global_weight": 0.5, "cells": 20}),
    Checked("dino", {"hidden": 16, "bottleneck": 8, "prototypes": 12, "freeze_epochs": 0}),
    Checked("mae", {"decoder_dim": 16, "decoder_heads": 2}),
    Checked("moco", {**_MOCO, "bn_groups": 4}, uneven=False, title="moco, groups"),
    Checked("moco", {**_MOCO, "bn_groups": 1}, _ONE_GROUP, title="moco, one group"),
    Checked("nnclr", {**_SMALL, "predictor_hidden": 16, "queue": 56}),
    Checked("relationnet", {"hidden": 16}),
    Checked("rotationnet"),
    Checked("scrl", {**_SMALL, "boxes": {"per_image": 3}}),
    Checked("sela_v2", _CLUSTERS, _SHORT_STEPS, title="sela_v2, short steps"),
    Checked("simclr", _SMALL),
    Checked("simclr", {**_SMALL, "loss": "log-mean"}, title="simclr, log-mean"),
    Checked("simsiam", {**_SMALL, "bottleneck": 4}),
    Checked("supervised"),
    Checked("swav", {**_SMALL, "prototypes": 6}),
    Checked("swav", {**_SMALL, "prototypes": 6, "queue": 16, "queue_from_epoch": 0}, title="swav, queue"),
    Checked("vicreg", _SMALL),
)
_HEAD = """# Several processes train as one

The largest difference of any entry of any tensor from a run of one process, over the largest entry of its tensor
(or over a hundredth of the largest entry of all tensors of the kind, if that is more), in five steps of SGD on toy
images: the largest over a network with batch normalisation and one without, and over batches of 8 images and of 7,
which the processes cannot share evenly (`moco, groups`: of 8; `short steps`: learning rate 1e-4). `start`:
parameters and buffers after the first `start_epoch`; gradients: of the first and of the last step; all else at the
end. `ranks`: whether the processes agree with each other to the bit, in everything."""


def main() -> int:
    options = parse()
    chosen = [checked for checked in METHODS if not options.methods or title(checked) in options.methods]
    norms = ("batch",) if options.quick else ("batch", "group")
    out = options.out or (Path(tempfile.gettempdir(), "sslbench-quick") if options.quick else HERE / "results")
    reports = [
        report
        for world in options.worlds
        for report in check_all(chosen, world=world, norms=norms, timeout=options.timeout)
    ]
    write(out, reports)
    print(render(reports))
    for report in reports:
        if report.error:
            print(f"\n{report.error}", file=sys.stderr)
    return int(any(report.error for report in reports))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--worlds", type=int, nargs="*", default=(2, 4), help="numbers of processes")
    parser.add_argument("--methods", nargs="*", help="some of the rows only")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that processes wait for each other")
    return parser.parse_args()


def title(checked: Checked) -> str:
    return checked.title or str(checked.method)


def write(out: Path, reports: Sequence[RankReport]) -> None:
    facts = machine() | {"versions": versions()}
    out.mkdir(parents=True, exist_ok=True)
    content = {"facts": facts, "samples": [sample(report) for report in reports]}
    (out / "equality.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "equality.md").write_text(f"{render(reports)}\n\n{describe(facts)}\n")


def sample(report: RankReport) -> dict[str, Any]:
    found = {each.quantity: vars(each) for each in report.differences}
    return {
        "method": report.method,
        "world": report.world,
        "identical": report.identical,
        "cases": list(report.cases),
        "error": report.error and report.error.message,
        "differences": found,
    }


def render(reports: Sequence[RankReport]) -> str:
    parts = [_HEAD]
    for world in dict.fromkeys(report.world for report in reports):
        rows = [row(report) for report in reports if report.world == world]
        parts += ["", f"## {world} processes", "", table(("method", *QUANTITIES, "ranks"), rows)]
    return "\n".join(parts)


def row(report: RankReport) -> list[str]:
    found = [report.largest(quantity) for quantity in QUANTITIES]
    shown = ["" if each is None else "0" if each.relative == 0 else f"{each.relative:.0e}" for each in found]
    return [
        report.method + (" **wrong**" if report.error else ""),
        *shown,
        "equal" if report.identical else "differ",
    ]


def versions() -> dict[str, str]:
    return {"sslbench": version("sslbench"), "torch": version("torch"), "Python": platform.python_version()}


def describe(facts: dict[str, Any]) -> str:
    rows = [
        f"`{facts['command']}` at {facts['commit'] or 'an unknown commit'}, {facts['date']}.",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, gloo.",
        ", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + ".",
    ]
    return "  \n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
