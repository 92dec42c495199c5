"""Time and memory of a training step on packed rows: Sightline against the same model in plain PyTorch.

    python -m benchmarks.training_step [--lengths 2048 8192] [--threads 2] [--rows corpus | lognormal]
    python -m benchmarks.training_step --profile [--lengths 2048 8192]       # share of the step by group of operators

Each contestant runs in a separate process, and they take turns, step by step.

The model has 6 layers, hidden size 256, 8 heads, 4 key/value heads, intermediate size 688, vocabulary 8192, float32.
The plain model has the same weights and uses PyTorch's modules, SDPA, full logits, cross_entropy, clipping and fused
AdamW. It runs with a dense document mask (built from the batch in each step, as trainers do), with plain causal
attention, where every document leaks into the next, and with one call of SDPA per document. All use the same rows: of
the corpus, with at least three documents, or random tokens in lognormal documents of median 300. Mask work is the time
that a step of Sightline spends on masks: rules and lowering.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.plain_model import Attention, PlainModel
from benchmarks.step_profile import profile_groups
from benchmarks.timing import machine, packed_rows, processes_in_turn, save
from sightline.attention import CHOICES, lower
from sightline.batch import IGNORE, Batch
from sightline.config import DataConfig, OptimizerConfig
from sightline.data import Loader, Tokenizer, load_documents, train_tokenizer
from sightline.models import build_model
from sightline.models.llama3 import Llama3
from sightline.parallel.parallel_model import single_process_model
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step

VOCABULARY = 8192
PROFILED_STEPS = 3


def rows_of(length: int, source: str = "corpus") -> tuple[Tokenizer | None, list[Batch]]:
    """Tokenizer, and rows with at least three documents, the same for every contestant.

    If rows of the corpus are too short for three documents, those with the most documents.

    source  `corpus`, or `lognormal`: random tokens in lognormal documents of median 300, without a tokenizer
    """
    if source == "lognormal":
        return None, [packed_rows(length, VOCABULARY, seed) for seed in range(20)]
    documents = load_documents(DataConfig())
    tokenizer = train_tokenizer(documents, VOCABULARY)
    loader = Loader(documents, tokenizer, rows=1, sequence_length=length, seed=1)
    drawn = [next(loader) for _ in range(60)]
    loader.close()
    last_ids = [int(batch.document_ids.max()) for batch in drawn]
    return tokenizer, [row for row, last in zip(drawn, last_ids, strict=True) if last >= min(2, max(last_ids))]


def ours(length: int, threads: int, source: str = "corpus", backend: str = "auto") -> Callable[[], float]:
    """Return a function that takes a step of `sightline train`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer, rows = rows_of(length, source)
    model = build_model("llama3-tiny", attention_backend=backend)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-5))
    alone, following = single_process_model(model), cycle(rows)

    def step() -> float:
        batch = following()
        result = train_step(alone, optimizer, batch, tokenizer, micro_batch_size=1, max_grad_norm=1.0)
        return result.loss.item()

    return step


def plain(length: int, threads: int, source: str, attention: Attention) -> Callable[[], float]:
    """Return a function that takes a step of the plain model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, rows = rows_of(length, source)
    weights = build_model("llama3-tiny")
    model = PlainModel(weights.config)
    model.copy_weights(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    following = cycle(rows)

    def step() -> float:
        batch = following()
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch, attention)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def compare(options: argparse.Namespace) -> None:
    """Time all contestants in turn."""
    threads, source = options.threads, options.rows
    table = Table(title=f"training step, rows: {source}, {machine()}, {threads} threads")
    for name in ("S", "contestant", "tokens/s", "peak MiB", "ours is faster by"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    results: list[dict[str, object]] = []
    for length in options.lengths:
        plain_of = {name: (plain, (length, threads, source, name)) for name in ("dense mask", "leaky causal",
                                                                               "document loop")}  # fmt: skip
        measured = processes_in_turn(
            {"ours": (ours, (length, threads, source, options.backend)), **plain_of}, options.rounds
        )
        _, rows = rows_of(length, source)
        our_seconds = measured["ours"][0]
        share = mask_work(build_model("llama3-tiny"), rows) / our_seconds
        for name, (seconds, peak) in measured.items():
            row = {"length": length, "contestant": name, "tokens_per_second": length / seconds, "peak_mib": peak}
            results.append(
                {**row, "ours_times": seconds / our_seconds, "mask_share": share if name == "ours" else None}
            )
            table.add_row(str(length), name, f"{length / seconds:.0f}", f"{peak:.0f}", f"{seconds / our_seconds:.2f}x")
        table.add_section()
        Console().print(f"S = {length}: mask work is {share:.2%} of our step")
    Console().print(table)
    save(f"training-step-{source}-{threads}t", results)


def profile(options: argparse.Namespace) -> None:
    """Print the share of our step by group of operators."""
    columns: dict[str, dict[str, float]] = {}
    for length in options.lengths:
        step = ours(length, options.threads, options.rows, options.backend)
        for _ in range(2):  # warm-up
            step()
        columns[f"S = {length}"] = profile_groups(step, PROFILED_STEPS)
    table = Table(title=f"a step of llama3-tiny by operators, rows: {options.rows}, {machine()}")
    for name in ("operators", *(f"{column}, ms" for column in columns), *columns):
        table.add_column(name, justify="left" if name == "operators" else "right")
    totals = [sum(groups.values()) for groups in columns.values()]
    for group in next(iter(columns.values())):
        times = [groups[group] for groups in columns.values()]
        shares = (f"{time / total:.1%}" for time, total in zip(times, totals, strict=True))
        table.add_row(group, *(f"{1e3 * time:.1f}" for time in times), *shares)
    table.add_row("total", *(f"{1e3 * total:.1f}" for total in totals), *("100 %" for _ in totals))
    Console(width=120).print(table)
    rows: list[dict[str, object]] = [{"column": name, **groups} for name, groups in columns.items()]
    save(f"training-step-profile-{options.rows}-{options.threads}t", rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", choices=["corpus", "lognormal"], default="corpus")
    parser.add_argument("--backend", choices=CHOICES, default="auto", help="attention backend of our step")
    parser.add_argument("--profile", action="store_true", help="print the share of our step by group of operators")
    options = parser.parse_args(arguments)
    (profile if options.profile else compare)(options)


def cycle(rows: list[Batch]) -> Callable[[], Batch]:
    """Return a function that returns the next row of a list, endlessly."""
    index = -1

    def following() -> Batch:
        nonlocal index
        index = (index + 1) % len(rows)
        return rows[index]

    return following


def mask_work(model: Llama3, rows: list[Batch]) -> float:
    """Median seconds that one step spends on masks: rules and lowering."""
    times = []
    for batch in rows[:15]:
        begin = time.perf_counter()
        mask = model.get_attention_masks(batch)
        lower(mask, device="cpu", dtype=torch.float32, training=True)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
