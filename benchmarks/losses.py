"""Losses and gradient norms of ten steps of every recipe that runs on a laptop, to compare two commits.

    python -m benchmarks.losses --output before.json                        # on one commit
    python -m benchmarks.losses --output after.json --compare before.json   # on the other commit, on the same machine

One process is deterministic to the bit; a mesh (run with the processes of the tests) sums in another order and is
compared within 1e-6. Results from different machines or PyTorch versions differ in the last digits and cannot be
compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sightline.config import ParallelConfig, Run
from sightline.recipes import RECIPES
from sightline.training.metrics import read_metrics
from tests.parallel.test_meshes import FAST, small_run, train_on
from tests.support.processes import run_on_ranks
from tests.support.small_runs import write_corpus

STEPS = 10
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "visible_pairs", "validation_loss")


def laptop_recipes() -> list[str]:
    return [name for name in RECIPES if name.split("-")[1] in ("debug", "tiny")]


def ten_steps(run: Run, directory: Path) -> Run:
    return dataclasses.replace(
        run,
        output_dir=directory,
        training=dataclasses.replace(run.training, steps=STEPS, device="cpu"),
        validation=dataclasses.replace(run.validation, every=5, rows=2),
        checkpoint=dataclasses.replace(run.checkpoint, every=0),
        logging=dataclasses.replace(run.logging, tensorboard=False, sample_tokens=0),
    )


def record_run(run: Run, world: int) -> list[dict[str, Any]]:
    run_on_ranks(world, train_on, run, join=False)
    return [
        {name: row[name] for name in COMPARED if name in row} for row in read_metrics(run.output_dir / "metrics.jsonl")
    ]


def record(only: str) -> dict[str, list[dict[str, Any]]]:
    """Metrics of each run by its name, runs on one process first. `only` selects names that contain it."""
    recorded = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus = write_corpus(directory / "texts")
        for number, recipe in enumerate(recipe for recipe in laptop_recipes() if only in recipe):
            print(recipe, file=sys.stderr, flush=True)
            recorded[recipe] = record_run(ten_steps(RECIPES[recipe], directory / f"recipe{number}"), 1)
        for number, (family, degrees) in enumerate(FAST):
            key = f"{family} {degrees}"
            if only in key:
                print(key, file=sys.stderr, flush=True)
                run = small_run(directory / f"mesh{number}", corpus, family, ParallelConfig(**degrees))
                world = 1
                for degree in (n for axis, n in degrees.items() if axis != "expert" and isinstance(n, int)):
                    world *= degree
                recorded[key] = record_run(run, world)
    return recorded


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per metric that differs between two recordings."""
    found = []
    for key in [key for key in before if key in after]:
        exact = key in RECIPES
        for old, new in zip(before[key], after[key], strict=True):
            for name in old.keys() | new.keys():
                a, b = old.get(name), new.get(name)
                same = a == b if exact or a is None or b is None else abs(a - b) <= 1e-6 * max(1.0, abs(a))
                if not same:
                    found.append(f"{key}, step {old['step']}: {name} was {a!r}, is {b!r}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    options = parser.parse_args()
    recorded = record(options.only)
    options.output.write_text(json.dumps(recorded, indent=1))
    if options.compare:
        found = differences(json.loads(options.compare.read_text()), recorded)
        print("\n".join(found) or f"{len(recorded)} runs are equal: one process to the bit, meshes within 1e-6")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
