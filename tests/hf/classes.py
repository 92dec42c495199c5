"""Check the causal classes of the installed transformers, some with images: equal to each document alone, or refused.

python -m tests.hf.classes [--only NAME ...] [--jobs 2] [--output docs/huggingface_classes.md] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from tests.hf.images import KINDS, check_images
from tests.hf.isolation import Row, check_class
from tests.hf.report import IMAGES, write_report
from tests.support.hf_models import causal_classes

SECONDS = 120
"""Time limit of a class."""


def check_all(classes: dict[str, str], jobs: int) -> Iterator[Row]:
    """Yield the outcomes of each class, in a process of its own: a crash or an endless loop costs one row only."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    waiting, running = list(classes.items()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, cls = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_check_one, args=(name, cls, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (process, Row(name, cls), time.monotonic() + SECONDS)
        ready = wait(list(running), timeout=0.5)
        for receiver, (process, row, limit) in list(running.items()):
            if receiver not in ready and time.monotonic() < limit:
                continue
            try:
                row = receiver.recv() if receiver in ready else row
                row.not_built = row.not_built or ("" if receiver in ready else f"more than {SECONDS} s")
            except EOFError:
                process.join()
                row.not_built = f"the process ended with exit code {process.exitcode}"
            process.terminate()
            del running[receiver]
            yield row


def _check_one(name: str, cls: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sender.send(check_images(name) if name in KINDS else check_class(name, cls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, in place of all")
    parser.add_argument("--jobs", type=int, default=2, help="classes checked at the same time")
    parser.add_argument("--output", type=Path, help="write a Markdown table")
    parser.add_argument("--json", type=Path, help="write all outcomes, one class a line")
    arguments = parser.parse_args()
    classes = causal_classes() | dict.fromkeys(KINDS, IMAGES)
    if arguments.only:
        classes = {name: classes[name] for name in arguments.only}
    rows = []
    for row in check_all(classes, arguments.jobs):
        rows.append(row)
        note = row.refused or row.not_built
        print(f"{len(rows):3}/{len(classes)} {row.model} {row.verdict()} {row.seconds:.1f} s {note}"[:200], flush=True)
    rows.sort(key=lambda row: row.model)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    if arguments.output:
        write_report(rows, arguments.output)
    sys.exit(any(row.verdict() in ("LEAK", "WRONG", "error") for row in rows))


if __name__ == "__main__":
    main()
