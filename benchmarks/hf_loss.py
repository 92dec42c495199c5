"""Output head and loss of transformers' models, forward and backward: time and peak memory with the fused loss.

    python -m benchmarks.hf_loss [--length 8192] [--rounds 5]

Trainer  the head and the loss of a model's own forward with labels
TRL      the log-probabilities, entropies and accuracies that TRL's trainers compute from the weight of the head

The model is a Llama without layers: embedding, norm and head. Each contestant runs in a separate process with one
thread, and they take turns. Hidden size 256, vocabulary 8192, every token has a label. The memory is the peak of the
process, less that of a process that runs 64 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from benchmarks.timing import machine, processes_in_turn, save
from sightline.hf.fused_loss import enable_fused_loss

SHAPE = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
WITHOUT_TOKENS = "64 tokens"


def build_step(trainer: str, fused: bool, length: int) -> Callable[[], float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=0, tie_word_embeddings=False))
    if fused:
        enable_fused_loss(model)
    options = {}
    if trainer == "TRL":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        options = {"fused_lm_head": True}
    tokens = torch.randint(SHAPE["vocab_size"], (1, length))

    def step() -> float:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, **options).loss
        loss.backward()
        return float(loss.detach())

    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    contestants = {
        (trainer, fused): (trainer, fused, options.length) for trainer in ("Trainer", "TRL") for fused in (False, True)
    }
    makers = {f"{trainer} {fused}": (build_step, contestant) for (trainer, fused), contestant in contestants.items()}
    results = processes_in_turn({**makers, WITHOUT_TOKENS: (build_step, ("TRL", True, 64))}, options.rounds)
    base = results.pop(WITHOUT_TOKENS)[1]
    table = Table(title=f"Head and loss, S = {options.length}, W = 256, V = 8192: {machine()}")
    for column in ("", "stock, ms", "fused, ms", "ratio", "stock, MiB", "fused, MiB", "ratio"):
        table.add_column(column, justify="right")
    rows: list[dict[str, object]] = []
    for trainer in ("Trainer", "TRL"):
        (stock, stock_mib), (fused, fused_mib) = results[f"{trainer} False"], results[f"{trainer} True"]
        stock_mib, fused_mib = stock_mib - base, fused_mib - base
        table.add_row(
            *(trainer, f"{1e3 * stock:.0f}", f"{1e3 * fused:.0f}", f"{stock / fused:.2f}"),
            *(f"{stock_mib:.0f}", f"{fused_mib:.0f}", f"{fused_mib / stock_mib:.2f}"),
        )
        rows.append(
            {"trainer": trainer, "stock": stock, "fused": fused, "stock_mib": stock_mib, "fused_mib": fused_mib}
        )
    Console().print(table)
    save("hf_loss", rows)


if __name__ == "__main__":
    main()
