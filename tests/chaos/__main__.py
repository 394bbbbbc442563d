"""``cd tests && python -m chaos --out FOLDER``: inflict every fault and write what came of it."""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from chaos.report import Row, find_faults, inflict, write


def main() -> int:
    options = _parse()
    faults = find_faults(options.only)
    if not faults:
        sys.exit(f"no fault fits --only {options.only}; --list shows all")
    if options.list:
        print("\n".join(f"{key:60} {fault.name}" for key, fault in faults.items()))
        return 0
    _isolate()
    console = Console(stderr=True, highlight=False)
    work = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.work))
    rows: list[Row] = []
    shown = Table("fault", "tried", "held", "most lost steps", "seconds", "result", box=box.SIMPLE_HEAD)
    with Live(shown, console=console, vertical_overflow="visible"):
        for key, fault in faults.items():
            times = options.times or max(1, round(fault.times * options.times_factor))
            rows.append(inflict(key, fault, work / key, times, options.seed))
            _show(rows[-1], shown, console)
            write(rows, options.out)  # whoever stops it keeps what has been found
            if rows[-1].held:
                shutil.rmtree(work / key, ignore_errors=True)
    console.print(f"written: {options.out / 'chaos.md'}, {options.out / 'chaos.json'}")
    if all(row.held for row in rows):
        shutil.rmtree(work, ignore_errors=True)
        return 0
    console.print(f"[red]{sum(not row.held for row in rows)} did not hold[/red]; their folders are in {work}")
    return 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="part or pattern of module/fault")
    parser.add_argument("--list", action="store_true", help="show the faults and end")
    parser.add_argument("--times", type=int, help="how often, instead of what each fault says")
    parser.add_argument("--times-factor", type=float, default=1.0, help="times this")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--work", type=Path, help="where runs are made; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of chaos.md and chaos.json")
    return parser.parse_args()


def _isolate() -> None:
    """What a user's shell says about stores and threads is not for these runs."""
    for name in ("MLFLOW_TRACKING_URI", "SSLBENCH_RUNS", "SSLBENCH_REGISTRY"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    cache = tempfile.mkdtemp(prefix="chaos-cache-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = cache


def _show(row: Row, shown: Table, console: Console) -> None:
    found = row.finding
    style = None if row.held else "bold red"
    numbers = (str(found.tried), str(found.held), str(found.lost_steps), f"{row.seconds:.0f}")
    shown.add_row(row.name, *numbers, escape(found.result), style=style)
    if not console.is_terminal:  # a log file gets the table at the end only
        verdict = "held" if row.held else f"FAILED: {found.result}"
        console.print(f"{row.name}: {found.held} of {found.tried}, {verdict}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
