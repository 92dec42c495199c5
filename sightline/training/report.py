"""Log lines and plots of a run: at its start, after the first step and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sightline import config
from sightline.data import Documents
from sightline.masks import AttentionMask
from sightline.models.families import reference_of
from sightline.numbers import count, duration
from sightline.parallel.parallel_model import ParallelModel
from sightline.plots.loss_png import plot_loss
from sightline.plots.mask_png import plot_masks
from sightline.training.checkpoint_directory import find_latest
from sightline.training.flops import Peak
from sightline.training.metrics import read_metrics
from sightline.training.run_directory import RunDirectory
from sightline.training.terminal import Terminal


def log_data(
    terminal: Terminal,
    output_dir: Path,
    documents: Documents,
    held_out: Documents,
    tokenizer: Path | None,
    vocab_size: int,
    start: Path | None,
) -> None:
    """Log run directory, data and tokenizer, before a tokenizer is trained. `tokenizer` is an existing file or None."""
    terminal.table(
        {
            "run": f"{output_dir}, continued from {start.name}" if start else str(output_dir),
            "data": f"{documents.describe()}; {len(held_out):,} held out" if documents else documents.source,
            "tokenizer": str(tokenizer or f"training a byte-level BPE with {vocab_size:,} tokens on the documents"),
        }
    )


def log_model(
    terminal: Terminal, training: config.TrainingConfig, model: ParallelModel, pretrained: Path | None, peak: Peak
) -> None:
    """Log model, pretrained weights, device, rank layout and batch size."""
    mesh, device = model.mesh, model.mesh.device
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    rows = training.global_batch_size // mesh.size("data")
    accumulation = rows // training.rows_per_forward(rows)
    micro = f" in {accumulation} forwards" if accumulation > 1 else ""
    parameters = sum(p.numel() for p in model.full_model.parameters())
    weights = f", initialized from {pretrained}" if pretrained else ""
    terminal.table(
        {
            "model": f"{type(model.full_model).__name__}, {count(parameters)} parameters{weights}",
            "device": f"{where}, {training.dtype}, peak {peak}",
            **(mesh.describe_layout() if mesh.world > 1 else {}),
            "step": f"{training.global_batch_size} rows of {training.sequence_length} tokens{micro}",
        }
    )
    if device.type == "cpu" and training.dtype == "bfloat16":
        terminal.warn(
            "bfloat16 on a CPU without AVX512-BF16 or AMX is 5 to 14 times slower than float32; "
            "use --training.dtype float32"
        )


def log_kernels(terminal: Terminal, kernels: dict[str, str]) -> None:
    """Log the attention kernel of each mask and the reason for its choice."""
    for name, kernel in kernels.items():
        terminal.table({"attention": f"{name} by {kernel}" if len(kernels) > 1 else kernel})


def plot_batch_masks(terminal: Terminal, directory: RunDirectory, masks: dict[str, AttentionMask], row: int) -> None:
    """Write masks.png: the masks of a row of a batch."""
    save_plot(terminal, directory.mask_plot, lambda path: plot_masks(masks, path, row))


def plot_losses(terminal: Terminal, directory: RunDirectory, source: str) -> None:
    """Write loss.png from metrics.jsonl, with all steps of a resumed run. The title has the data source."""
    rows = read_metrics(directory.metrics)
    if rows:
        title = f"{directory.path.name} · {source}"
        save_plot(terminal, directory.loss_plot, lambda path: plot_loss(rows, path, title))


def save_plot(terminal: Terminal, path: Path, plot: Callable[[Path], None]) -> None:
    """Write a plot; if the disk is full, log a warning instead of ending the run."""
    try:
        plot(path)
    except OSError as error:
        terminal.warn(f"{path} could not be written: {error}")


def family_option(model: Any) -> str:
    """Return the `--family` option that `sightline generate` and `convert` need for this config, if any."""
    reference = reference_of(model)
    return f" --family {reference}" if ":" in reference else ""


def log_summary(terminal: Terminal, directory: RunDirectory, more_text: str, seconds: float) -> None:
    """Log the losses and the output files. `more_text` is the options of the `sightline generate` command."""
    rows = read_metrics(directory.metrics)
    if rows:
        first, last = rows[0], rows[-1]
        validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
        held_out = f", validation {validation[0]:.3f} to {validation[-1]:.3f}" if validation else ""
        terminal.log(
            f"step {last['step']} reached, loss {first['loss']:.3f} to {last['loss']:.3f}{held_out}; "
            f"took {duration(seconds)}"
        )
    outputs = {
        "checkpoint": find_latest(directory.checkpoints),
        "metrics": directory.metrics,
        "loss": directory.loss_plot,
        "masks": directory.mask_plot,
        "TensorBoard": directory.tensorboard,
    }
    terminal.table({name: str(path) for name, path in outputs.items() if path and path.exists()})
    terminal.table({"more text": f"sightline generate {shlex.quote(str(directory.path))}{more_text}"})
