"""Training runs that take a second, and helpers to kill them at a given call."""

import dataclasses
import importlib
import io
import json
import os
import random
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sightline.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)
from sightline.data import Batches
from sightline.models import Llama3Config
from sightline.training.loading import load
from sightline.training.manifest import FileSum, Manifest, checksum_of, read_manifest
from sightline.training.metrics import TIMES, read_metrics
from sightline.training.terminal import Terminal
from sightline.training.trainer import Trainer, train

MODEL = Llama3Config(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64)
STEPS = 8
WORDS = "A run that takes a second, and ways to end it at a chosen moment."
"""Vocabulary of the corpus; recorded losses depend on it."""


def write_corpus(directory: Path) -> Path:
    """Write twenty documents of 3 to 120 random words."""
    words = list(dict.fromkeys(WORDS.split()))
    draw = random.Random(0)
    directory.mkdir()
    for number in range(20):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(3, 120)))
        (directory / f"{number}.txt").write_text(text)
    return directory


def small_run(output_dir: Path, source: Path, **changes: Any) -> Run:
    """Build a run of the small model; `changes` are config fields, with `__` for the dot: training__steps=4."""
    run = Run(
        model=MODEL,
        output_dir=output_dir,
        data=DataConfig(source=str(source), validation_fraction=0.1),
        training=TrainingConfig(steps=STEPS, sequence_length=48, global_batch_size=2, micro_batch_size=1, device="cpu"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        validation=ValidationConfig(every=4, rows=2),
        checkpoint=CheckpointConfig(every=3),
        logging=LoggingConfig(tensorboard=False, sample_tokens=0),
    )
    for name, value in changes.items():
        group, _, field = name.partition("__")
        part = dataclasses.replace(getattr(run, group), **{field: value}) if field else value
        run = dataclasses.replace(run, **{group: part})
    return run


def train_quietly(run: Run, batches: Batches | None = None) -> str:
    """Train in this process and return the terminal output."""
    output = io.StringIO()
    train(run, Terminal(Console(file=output, width=200)), batches=batches)
    return output.getvalue()


def rows_of(run_directory: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, without those that are times."""
    rows = read_metrics(run_directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load(path, device="cpu").model.state_dict()


def rewrite_manifest(checkpoint: Path) -> None:
    """Write sizes and checksums of the files as they are, as somebody would who changes them on purpose."""
    manifest = read_manifest(checkpoint)
    files = {path.name: FileSum(path.stat().st_size, checksum_of(path)) for path in checkpoint.iterdir()}
    Manifest({name: files[name] for name in manifest.files}, manifest.mesh).write(checkpoint)


def kill_at(name: str, call: int, *, halfway: bool = False) -> None:
    """Make `name` ("module:function") kill this process at its n-th call, if `halfway` after writing a partial row."""
    module, _, attribute = name.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, function = attribute.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, function)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if halfway:
                metrics, row = args
                with metrics.path.open("ab") as file:
                    file.write(json.dumps(row).encode()[:25])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, function, wrapped)


def train_and_kill(run: Run, name: str, call: int, halfway: bool) -> None:
    """Train in a subprocess that is killed by `kill_at`."""
    torch.set_num_threads(1)
    kill_at(name, call, halfway=halfway)
    train_quietly(run)


def open_trainer(run: Run, opened: ExitStack) -> Trainer:
    return Trainer(run, torch.device("cpu"), Terminal(Console(file=io.StringIO())), opened)
