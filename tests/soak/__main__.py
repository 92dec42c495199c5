"""Train small models under faults at random moments; every run must end like its reference, which was not disturbed.

    python -m tests.soak --faults 200

Each run is a training command on 1, 2 or 4 processes. A fault hits it at a random moment, the same command is started
again as a scheduler would do, the next fault follows, until the run is complete. Then the documents of each step, the
metrics and the final weights are compared with those of a run without faults on the same mesh. A run with a non-finite
loss is compared with a run that has one in the same step. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.record import KINDS
from tests.soak.soak import Soak, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kinds and moments of the faults")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="processes of the runs, in turn")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="kinds of faults"
    )
    parser.add_argument("--output", type=Path, help="directory for the runs; default: a temporary directory")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the jobs too
    begin = time.monotonic()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(output.absolute(), arguments.processes, arguments.seed)
    soak.inject(arguments.faults, arguments.kinds)
    print(table(soak.results))
    injected, wrong = sum(len(result.faults) for result in soak.results), [r for r in soak.results if not r.good]
    minutes = (time.monotonic() - begin) / 60
    print(f"{injected} faults in {len(soak.results)} runs, {len(wrong)} of them wrong, {minutes:.1f} minutes")
    sys.exit(bool(wrong) or injected < arguments.faults)


if __name__ == "__main__":
    main()
