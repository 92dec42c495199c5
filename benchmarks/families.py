"""Time and memory of a training step of each -tiny model: Sightline against the transformers model of the same config.

    python -m benchmarks.families [--models llama3-tiny qwen3-tiny ...] [--length 2048] [--threads 2] [--rounds 5]

Both have the same weights and use the same documents of the corpus, in turn in one run: forward, loss over the valid
tokens, backward, clipping, fused AdamW. The transformers model ("theirs") uses SDPA, or its eager attention if it has
no SDPA. It separates the documents of a row by their position_ids if that gives our loss; otherwise (state that crosses
documents) each document has its own row, padded to the longest. For bidirectional images, which theirs has no mask for,
it gets our mask as a dense tensor. Peak memory is measured in one process each: its growth from before the model is
built until three steps are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import in_turn, machine, save
from benchmarks.training_step import cycle
from sightline.batch import IGNORE, PADDING, Batch
from sightline.config import OptimizerConfig
from sightline.data import Tokenizer, load_documents, open_loader, train_tokenizer
from sightline.models import VLM, VLMConfig, build_model, build_skeleton, config_of, load_pretrained, save_pretrained
from sightline.models.hf.source import read_config
from sightline.parallel.parallel_model import single_process_model
from sightline.recipes import get_recipe
from sightline.training.optimizer import build_optimizer
from sightline.training.step import prepare_batch, train_step

MODELS = [
    "llama3-tiny",
    "llama4-tiny",
    "qwen3-tiny",
    "qwen3-tiny-moe",
    "deepseek_v3-tiny",
    "gpt_oss-tiny",
    "qwen3_next-tiny",
    "vlm-tiny",
]
RATE = 1e-5
SAME_LOSS = 2e-5


class Inputs(NamedTuple):
    """Inputs of their model; `labels` are already shifted."""

    labels: Tensor
    arguments: dict[str, Tensor]


def packed(batch: Batch) -> Inputs:
    """Packed rows without attention_mask: only without one does transformers find the documents in position_ids."""
    return Inputs(batch.labels, {"input_ids": batch.tokens, "position_ids": batch.positions.long()})


def padded(batch: Batch) -> Inputs:
    """One document per row."""
    index = [
        (row, (batch.document_ids[row] == number).nonzero()[:, 0])
        for row in range(batch.shape[0])
        for number in batch.document_ids[row].unique().tolist()
        if number != PADDING
    ]

    def rows(values: Tensor, padding: int) -> Tensor:
        pieces = [values[row, tokens].long() for row, tokens in index]
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=padding)

    arguments = {
        "input_ids": rows(batch.tokens, 0),
        "position_ids": rows(batch.positions, 0),
        "attention_mask": rows(torch.ones_like(batch.tokens), 0),
    }
    return Inputs(rows(batch.labels, IGNORE), arguments)


def with_images(config: VLMConfig, batch: Batch) -> Inputs:
    """Packed rows with a dense mask; each image is a row of patches, padded to the largest image."""
    with torch.device("meta"):
        model = VLM(config)
    mask = model.get_attention_masks(batch)["decoder"].to_dense()[:, None]
    shapes = [[size for size in row.tolist() if size[0]] for row in batch.extra["patch_grid"]]
    images = [
        image
        for row, sizes in zip(batch.extra["patches"], shapes, strict=True)
        for image in row[: sum(h * w for h, w in sizes)].split([h * w for h, w in sizes])
    ]
    arguments = {
        "input_ids": batch.tokens,
        "position_ids": batch.positions.long(),
        "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        "pixel_values": nn.utils.rnn.pad_sequence(images, batch_first=True),
        "pixel_attention_mask": nn.utils.rnn.pad_sequence(
            [torch.ones(len(image), dtype=torch.int64) for image in images], batch_first=True
        ),
        "spatial_shapes": torch.tensor([size for row in shapes for size in row]),
    }
    return Inputs(batch.labels, arguments)


def their_loss(model: Any, inputs: Inputs) -> Tensor:
    logits = model(**inputs.arguments, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), inputs.labels.flatten(), ignore_index=IGNORE)


def their_step(model: Any, batch: Callable[[], Batch], arrange: Callable[[Batch], Inputs]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = their_loss(model, arrange(batch()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def our_step(model: Any, batch: Callable[[], Batch], tokenizer: Tokenizer) -> Callable[[], float]:
    alone, optimizer = single_process_model(model), build_optimizer(model, OptimizerConfig(learning_rate=RATE))

    def step() -> float:
        result = train_step(alone, optimizer, batch(), tokenizer, micro_batch_size=1, max_grad_norm=1.0)
        return result.loss.item()

    return step


def load_theirs(directory: Path) -> Any:
    """Load their model with SDPA, or with eager attention if it has no SDPA."""
    model = getattr(transformers, read_config(directory)["architectures"][0])
    try:
        return model.from_pretrained(directory, attn_implementation="sdpa")
    except ValueError:
        return model.from_pretrained(directory, attn_implementation="eager")


def write_model(name: str, directory: Path) -> None:
    """Write initial weights that both models load, without the multi-token prediction that theirs do not have."""
    config = config_of(name)
    if getattr(config, "mtp_loss_weight", None) is not None:
        config = dataclasses.replace(config, mtp_loss_weight=None)
    torch.manual_seed(0)
    save_pretrained(build_model(config), directory)


def choose_arrangement(ours: Any, theirs: Any, batch: Batch, tokenizer: Tokenizer) -> Callable[[Batch], Inputs]:
    """Return the first arrangement with which their loss equals ours.

    Raises:
        AssertionError: if there is none, so that the two are not the same model.
    """
    arrangements = [partial(with_images, ours.config)] if batch.extra else [packed, padded]
    with torch.no_grad():
        expected = ours(**prepare_batch(ours, batch, tokenizer, torch.device("cpu"))).item() / batch.valid_tokens()
        losses = []
        for arrange in arrangements:
            losses.append(their_loss(theirs, arrange(batch)).item())
            if abs(losses[-1] - expected) < SAME_LOSS:
                return arrange
    raise AssertionError(f"their losses are {losses}, ours {expected}: not the same model")


def peak_memory(directory: Path, which: str, rows: list[Batch], tokenizer: Tokenizer, arrange: Any) -> float:
    """Peak memory of three steps in MiB, measured in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_memory_growth, (directory, which, rows, tokenizer, arrange, torch.get_num_threads()))


def _memory_growth(
    directory: Path, which: str, rows: list[Batch], tokenizer: Tokenizer, arrange: Any, threads: int
) -> float:
    torch.set_num_threads(threads)
    before = _peak_rss()
    if which == "ours":
        step = our_step(load_pretrained(directory), cycle(rows), tokenizer)
    else:
        step = their_step(load_theirs(directory), cycle(rows), arrange)
    for _ in range(3):
        step()
    return _peak_rss() - before


def _peak_rss() -> float:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def compare(name: str, rows: list[Batch], tokenizer: Tokenizer, rounds: int) -> dict[str, object]:
    """Measurements of one model."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_model(name, directory)
        ours, theirs = load_pretrained(directory), load_theirs(directory)
        arrange = choose_arrangement(ours, theirs, rows[0], tokenizer)
        contestants = {
            "ours": our_step(ours, cycle(rows), tokenizer),
            "theirs": their_step(theirs, cycle(rows), arrange),
        }
        seconds = in_turn(contestants, rounds)
        attention, length = theirs.config._attn_implementation, rows[0].tokens.numel()
        del ours, theirs, contestants
        memory = {which: peak_memory(directory, which, rows[:3], tokenizer, arrange) for which in ("ours", "theirs")}
    return {
        "model": name,
        "their_attention": f"{attention}, {getattr(arrange, 'func', arrange).__name__}",
        **{f"{which}_tokens_per_second": length / value for which, value in seconds.items()},
        "times": seconds["theirs"] / seconds["ours"],
        **{f"{which}_mib": value for which, value in memory.items()},
    }


def rows_of(name: str, length: int, tokenizers: dict[tuple[str, int], Tokenizer]) -> tuple[list[Batch], Tokenizer]:
    """Rows with at least three documents of the recipe's data source."""
    recipe = get_recipe(name)
    training = dataclasses.replace(recipe.training, sequence_length=length, global_batch_size=1, micro_batch_size=1)
    run = dataclasses.replace(recipe, training=training, seed=1)
    documents = load_documents(run.data)
    key = (run.data.source, run.model.vocab_size)
    if key not in tokenizers:
        tokenizers[key] = train_tokenizer(documents, run.model.vocab_size)
    images = build_skeleton(run.model).image_sizes
    with closing(open_loader(run.data, training, documents, tokenizers[key], images=images, seed=run.seed)) as loader:
        rows = [batch for batch in islice(loader, 60) if int(batch.document_ids.max()) >= 2]
    return rows, tokenizers[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    tokenizers: dict[tuple[str, int], Tokenizer] = {}
    table = Table(title=f"training step, S = {options.length}, tokens/s, {machine()}")
    for column in ("model", "theirs is", "ours", "theirs", "ours / theirs", "ours MiB", "theirs MiB"):
        table.add_column(column, justify="left" if column in ("model", "theirs is") else "right")
    results = []
    for name in options.models:
        rows, tokenizer = rows_of(name, options.length, tokenizers)
        row = compare(name, rows, tokenizer, options.rounds)
        Console().print(row)
        results.append(row)
        table.add_row(
            name,
            str(row["their_attention"]),
            *(f"{row[key]:.0f}" for key in ("ours_tokens_per_second", "theirs_tokens_per_second")),
            f"{row['times']:.2f}x",
            *(f"{row[key]:.0f}" for key in ("ours_mib", "theirs_mib")),
        )
    Console().print(table)
    save(f"families-{options.threads}t", results)


if __name__ == "__main__":
    main()
