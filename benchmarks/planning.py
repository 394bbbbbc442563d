"""How far the predictions of ``sslbench plan`` are from runs: on this CPU, and from published times on GPUs.

    python benchmarks/planning.py [--quick] [--out FOLDER] [--cases NAME ...]

Memory: the peak of a real ``sslbench pretrain --limit 3`` against the prediction from counts. Speed: real steps of
one thread, in seconds of CPU time so that a busy machine does not matter, against counts alone and against three
measured steps of a quarter of the batch. Published times: counts alone, nothing was run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Case(NamedTuple):
    """A run to predict and to make."""

    name: str
    options: tuple[str, ...]
    rows: tuple[int, ...]
    """Sizes of the batch."""


SMALL = ("dataset.name=digits", "dataset.size=32")
LARGE = ("dataset.name=digits", "dataset.size=64")
CASES = [
    Case("simclr conv4", ("method.name=simclr", "backbone.name=conv4", *SMALL), (128, 512)),
    Case("byol conv4", ("method.name=byol", "backbone.name=conv4", *SMALL), (128, 512)),
    Case("moco conv4", ("method.name=moco", "backbone.name=conv4", *SMALL), (128, 512)),
    Case("swav conv4", ("method.name=swav", "backbone.name=conv4", *SMALL), (128, 512)),
    Case("relationnet conv4", ("method.name=relationnet", "backbone.name=conv4", *SMALL), (64, 256)),
    Case("simclr resnet8", ("method.name=simclr", "backbone.name=resnet8", *SMALL), (128,)),
    Case("simclr resnet18", ("method.name=simclr", "backbone.name=resnet18", *SMALL), (32, 128)),
    Case("byol resnet18", ("method.name=byol", "backbone.name=resnet18", *SMALL), (32,)),
    Case(
        "swav resnet50, 64 px, imagenet stem",
        ("method.name=swav", "backbone.name=resnet50", "backbone.stem=imagenet", *LARGE),
        (32, 128),
    ),
]


class Published(NamedTuple):
    """A time that others published."""

    what: str
    recipe: str
    options: tuple[str, ...]
    kind: str
    devices: int
    nodes: int
    seconds_per_epoch: float
    source: str


_SWAV = "SwAV paper and repository"
_HALF = "train.precision=bf16"
_MOCO = (
    "method.name=moco",
    "backbone.name=resnet50",
    "dataset.name=imagenet",
    "train.batch_size=256",
    "train.precision=fp32",
    "method.queue=65536",
    "method.bn_groups=8",
)
PUBLISHED = [
    Published("SwAV 2x224+6x96, batch 4096", "swav/imagenet-r50-800ep", (_HALF,), "v100", 64, 8, 220, _SWAV),
    Published("SwAV 2x224+6x96, batch 256", "swav/imagenet-r50-200ep-bs256", (_HALF,), "v100", 4, 1, 3130, _SWAV),
    Published(
        "DeepCluster-v2 2x160+4x96, fp32", "deepcluster_v2/imagenet-r50-400ep", (), "v100", 64, 8, 193, _SWAV
    ),
    Published(
        "SimCLR 2x224, batch 4096",
        "swav/imagenet-r50-400ep-2x224",
        (_HALF, "method.name=simclr"),
        "v100",
        64,
        8,
        144,
        "SwAV paper: 1000 epochs in 40 h",
    ),
    Published(
        "MoCo v2 2x224, batch 256, fp32", "", _MOCO, "v100", 8, 1, 954, "MoCo repository: 200 epochs in 53 h"
    ),
]


def main() -> int:
    options = parse()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.options, options.rows)))
        return 0
    chosen = [case for case in CASES if not options.cases or case.name in options.cases]
    samples = list(measured(chosen[:1] if options.quick else chosen))
    published = [] if options.quick or options.no_published else [compare_published(entry) for entry in PUBLISHED]
    text = render(samples, published)
    folder = options.out or (Path(tempfile.gettempdir()) if options.quick else HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({"samples": samples, "published": published}, indent=1) + "\n")
    (folder / "plan.md").write_text(text)
    print(text)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--cases", nargs="+", help="names of cases (default: all; none: published times alone)")
    parser.add_argument("--no-published", action="store_true", help="this machine only")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs="*", default=(), help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    for case in cases:
        for rows in case.rows:
            found = child("speed", case.options, rows)
            found["peak_bytes"] = peak_of_run(case.options, rows)
            print(case.name, rows, found, file=sys.stderr)
            yield {"case": case.name, "rows": rows, **found}


def child(kind: str, options: Sequence[str], rows: int) -> dict[str, Any]:
    """What a process of its own, with one thread, finds out."""
    command = [sys.executable, __file__, "--child", kind, "--rows", str(rows), "--options", *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_of_run(options: Sequence[str], rows: int) -> int:
    """Resident bytes of a real run of three steps, at most."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "sslbench", "--runs", f"{folder}/runs", "pretrain", "--limit", "3", "--no-evals",
            *options, f"train.batch_size={rows}", "probe.every=0", f"run.tracking_uri=sqlite:///{folder}/mlflow.db",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise ChildProcessError(f"{' '.join(command)} ended with {status}")
        return usage.ru_maxrss << 10


def _subject(options: Sequence[str], rows: int, recipe: str | None = None) -> Any:
    from sslbench.commands.options import Session, compose_pretrain
    from sslbench.planning.subject import describe
    from sslbench.plugin.catalog import Catalog

    session = Session(Catalog.from_options(()), None, Path("runs"))
    items = [*options, *([f"train.batch_size={rows}"] if rows else [])]
    return describe(compose_pretrain(session, recipe, None, items, None)[0], None)


def child_speed(options: Sequence[str], rows: int) -> dict[str, Any]:
    """Counts, and CPU seconds of real steps of the whole batch and of a quarter of it."""
    import time

    import torch

    from sslbench.engine.machine import prepare_process
    from sslbench.planning.devices import this_cpu
    from sslbench.planning.measuring import measure
    from sslbench.planning.prediction import Cluster, predict

    prepare_process()
    torch.set_num_threads(1)
    device = this_cpu(torch.backends.cpu.get_cpu_capability(), 1, 1e12, has_bf16=False)
    subject = _subject(options, rows)
    quarter = subject.with_batch(max(8, rows // 4))
    counted, part = (predict(s, Cluster(device, 1, 1), 1) for s in (subject, quarter))
    real = measure(subject, rows, 4, time.process_time)
    small = measure(quarter, quarter.batch, 3, time.process_time)
    return {
        "needed_bytes": counted.needed,
        "counted_seconds": counted.seconds,
        "seconds": real.seconds,
        "scaled_seconds": small.seconds * counted.seconds / part.seconds,
        "limit": counted.limit,
    }


def child_published(options: Sequence[str], rows: int) -> dict[str, Any]:
    """Predicted seconds of an epoch; the first words are recipe, kind, devices and nodes."""
    from sslbench.planning.machine import find_device
    from sslbench.planning.prediction import Cluster, predict

    recipe, kind, devices, nodes, *rest = options
    subject = _subject([*rest, "dataset.root=unnamed"], 0, recipe or None)
    found = predict(subject, Cluster(find_device(kind), int(devices), int(nodes)), 8)
    if found.problem:
        raise SystemExit(found.problem)
    return {
        "seconds_per_epoch": found.seconds * subject.steps_per_epoch,
        "needed_bytes": found.needed,
        "pace": found.pace.parts,
        "sent": found.step.exchanges.sent,  # type: ignore[union-attr]
    }


CHILDREN = {"speed": child_speed, "published": child_published}


def compare_published(entry: Published) -> dict[str, Any]:
    words = (entry.recipe, entry.kind, str(entry.devices), str(entry.nodes), *entry.options)
    found = child("published", words, 0)
    print(entry.what, found, file=sys.stderr)
    return {**entry._asdict(), "predicted": found}


def render(samples: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]]) -> str:
    lines = ["# Predictions of sslbench plan against runs", "", "## Memory on this CPU", ""]
    lines += _memory_lines(samples)
    lines += ["", "## Speed on one core of this CPU", "", *_speed_lines(samples)]
    if published:
        lines += ["", "## Published times on GPUs, from counts alone", "", *_published_lines(published)]
    import torch

    lines += [
        "",
        f"`python benchmarks/planning.py`, torch {torch.__version__}; how is told in docs/benchmarks.md.",
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(samples: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Most resident memory of a run of three steps, in MB."
    yield ""
    yield "| run | batch | measured | predicted | error |"
    yield "|:--|--:|--:|--:|--:|"
    for s in samples:
        peak, needed = s["peak_bytes"] / 1e6, s["needed_bytes"] / 1e6
        yield f"| {s['case']} | {s['rows']} | {peak:,.0f} | {needed:,.0f} | {needed / peak - 1:+.0%} |"


def _speed_lines(samples: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Images per second of CPU time, views included; *scaled*: from three steps of a quarter of the batch."
    yield ""
    yield "| run | batch | measured | from counts | error | scaled | error |"
    yield "|:--|--:|--:|--:|--:|--:|--:|"
    for s in samples:
        real, counted, scaled = (s["rows"] / s[k] for k in ("seconds", "counted_seconds", "scaled_seconds"))
        yield (
            f"| {s['case']} | {s['rows']} | {real:,.3g} | {counted:,.3g} | {counted / real - 1:+.0%} "
            f"| {scaled:,.3g} | {scaled / real - 1:+.0%} |"
        )


def _published_lines(published: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "16-bit numbers unless fp32 is written. Published times include work between epochs and waiting."
    yield ""
    head = "| run | devices | published s/epoch | predicted | error | device hours of 100 epochs | GB/device |"
    yield f"{head} source |"
    yield "|:--|:--|--:|--:|--:|--:|--:|:--|"
    for p in published:
        found, real = p["predicted"]["seconds_per_epoch"], p["seconds_per_epoch"]
        hours = found * 100 / 3600 * p["devices"]
        yield (
            f"| {p['what']} | {p['devices']} {p['kind']} | {real:,.0f} | {found:,.0f} | {found / real - 1:+.0%} "
            f"| {hours:,.0f} | {p['predicted']['needed_bytes'] / 1e9:.1f} | {p['source']} |"
        )


if __name__ == "__main__":
    sys.exit(main())
