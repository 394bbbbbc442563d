"""One sslbench training, measured as ``sslbench pretrain`` would run it.

    python benchmarks/ours.py [--seconds 4] [--ceiling 0] [--phases 0] KEY=VALUE ...

Options are those of ``sslbench pretrain``. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json

from sslbench.engine.machine import prepare_process
from sslbench.terminal import prepare_environment


def main() -> None:
    options = parse()
    prepare_environment()
    prepare_process()
    from training import measure  # imports torch, which must find the process prepared

    print(json.dumps(measure(options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=4, help="length of the timed window")
    parser.add_argument("--warmup", type=float, default=1.5, help="seconds before it")
    parser.add_argument("--ceiling", type=float, default=0, help="seconds of training on one batch in memory")
    parser.add_argument("--phases", type=float, default=0, help="seconds with a stopwatch around each phase")
    return parser.parse_args()


if __name__ == "__main__":
    main()
