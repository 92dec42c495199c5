"""Training steps of transformers' own models, inside the trainers on top of them: sightline against stock attention.

    python -m benchmarks.huggingface [--only trl trainer gpt_oss gemma2] [--lengths 2048 8192] [--rounds 3]

trl      SFTTrainer of TRL with packed rows
trainer  Trainer of transformers with the rows of DataCollatorWithFlattening
gpt_oss  the model alone, forward and backward, against eager attention, its only choice on a CPU (sinks)
gemma2   the same (soft-capped scores)

Each contestant runs in a separate process with one thread, and they take turns, step by step: forward, backward and
optimizer step. "stock" is sdpa, or eager where a model has nothing else; "fused" is sightline with `fused_loss=True`.
Rows are those of the embedded corpus with at least three documents, in rows of S tokens. The losses are those of the
first step of each contestant, with the same weights and rows.

The Llama model has 6 layers, hidden size 256, 8 heads, 4 key/value heads, intermediate size 688 and vocabulary 8192;
gpt-oss has 4 experts of 256 and a window of 128, Gemma 2 a window of 512. Mask work is the time that a step of
sightline spends on masks: finding documents, rules and lowering.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import PreTrainedModel
from trl import SFTConfig, SFTTrainer

import sightline.hf
from benchmarks.timing import machine, processes_in_turn, save
from benchmarks.training_step import VOCABULARY, rows_of

SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4}
ARGUMENTS: dict[str, Any] = {
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 1},
    **{"learning_rate": 3e-4, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "weight_decay": 0.1},
    **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1000},
}
STOCK = {"trl": "sdpa", "trainer": "sdpa", "gpt_oss": "eager", "gemma2": "eager"}
Step = Callable[[], float]


def build_model(case: str, length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {**SHAPE, "max_position_embeddings": length}
    if case == "gpt_oss":
        rope = {"rope_type": "default", "rope_theta": 1e4}
        experts = {"intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
        return GptOssForCausalLM(GptOssConfig(**common, **experts, head_dim=32, sliding_window=128))
    if case == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**common, intermediate_size=688, head_dim=32, sliding_window=512))
    return LlamaForCausalLM(LlamaConfig(**common, intermediate_size=688, tie_word_embeddings=False))


def prepare(case: str, contestant: str, length: int) -> PreTrainedModel:
    """Return the model of a case, with the attention of a contestant."""
    model = build_model(case, length)
    if contestant == "stock":
        model.set_attn_implementation(STOCK[case])
        return model
    return sightline.hf.enable(model, check=False, fused_loss=contestant == "fused")


def documents_of(length: int) -> list[list[list[int]]]:
    """Return rows of the corpus as lists of documents, which are lists of token ids."""
    rows = []
    for batch in rows_of(length)[1]:
        lengths = batch.document_ids[0][batch.document_ids[0] >= 0].bincount().tolist()
        rows.append([part.tolist() for part in batch.tokens[0][: sum(lengths)].split(lengths)])
    return rows


def trainer_step(case: str, contestant: str, length: int) -> Step:
    """Return a function that runs one step of a trainer and returns its loss."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model, rows = prepare(case, contestant, length), documents_of(length)
    folder = tempfile.mkdtemp()
    trainer: Trainer
    if case == "trl":
        packed = {
            "input_ids": [[token for part in row for token in part] for row in rows],
            "seq_lengths": [list(map(len, row)) for row in rows],
        }
        options = {"packing": True, "packing_strategy": "bfd", "max_length": length}
        skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments = SFTConfig(folder, **ARGUMENTS, **options, **skip)
        dataset = Dataset.from_dict(packed)
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=any_tokenizer())
    else:
        collate, dataset = DataCollatorWithFlattening(), Dataset.from_dict({"documents": rows})
        arguments = TrainingArguments(folder, **ARGUMENTS, remove_unused_columns=False)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=lambda examples: collate([{"input_ids": d} for d in examples[0]["documents"]]),
        )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(dataset)
    batches = iter(list(trainer.get_train_dataloader()) * 10)
    trainer.create_optimizer()
    model.train()

    def step() -> float:
        inputs = next(batches)
        labels = (inputs["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(model, inputs, num_items_in_batch=labels)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss.detach())

    return step


def model_step(case: str, contestant: str, length: int) -> Step:
    """Return a function that runs forward and backward of a model on one row and returns the loss."""
    torch.set_num_threads(1)
    model, rows = prepare(case, contestant, length).train(), documents_of(length)
    flatten = DataCollatorWithFlattening()
    batches = iter([flatten([{"input_ids": document} for document in row]) for row in rows] * 10)

    def step() -> float:
        model.zero_grad()
        loss = model(**next(batches), use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return step


def any_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for trainers that ask for one, although the rows are token ids already."""
    backend = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def mask_work(length: int) -> float:
    """Return the median seconds that a step of sightline spends on masks."""
    torch.set_num_threads(1)
    model = prepare("trainer", "sightline", length).eval()
    flatten, seconds = DataCollatorWithFlattening(), []
    for row in documents_of(length)[:10]:
        batch = flatten([{"input_ids": document} for document in row])
        begin = time.perf_counter()
        positions = batch["position_ids"]
        documents = sightline.hf.documents.find_documents(tuple(positions.shape), position_ids=positions)
        masks = sightline.hf.layer_masks.build_masks(model, documents)
        for mask in masks.values():
            sightline.hf.layer_masks.lower(mask, device="cpu", dtype=torch.float32, training=True)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STOCK), default=list(STOCK))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table(title=f"transformers with and without sightline ({machine()})")
    for column in ("case", "S", "contestant", "tokens/s", "ratio", "peak MiB", "ratio", "loss"):
        table.add_column(column, justify="left" if column in ("case", "contestant") else "right")
    saved: list[dict[str, object]] = []
    for case in options.only:
        maker = trainer_step if case in ("trl", "trainer") else model_step
        for length in options.lengths:
            contestants = ["stock", "sightline", "fused"]
            losses = {name: maker(case, name, length)() for name in contestants}
            makers = {name: (maker, (case, name, length)) for name in contestants}
            results = processes_in_turn(makers, options.rounds)
            for name, (seconds, peak) in results.items():
                stock_seconds, stock_peak = results["stock"]
                row = {
                    **{"case": case, "length": length, "contestant": name, "tokens_per_second": length / seconds},
                    **{"speedup": stock_seconds / seconds, "peak_mib": peak, "peak_ratio": peak / stock_peak},
                    "loss": losses[name],
                }
                saved.append(row)
                table.add_row(
                    *(case, f"{length}", name, f"{length / seconds:.0f}", f"{stock_seconds / seconds:.2f}x"),
                    *(f"{peak:.0f}", f"{peak / stock_peak:.2f}", f"{losses[name]:.6f}"),
                )
                save("huggingface", saved)
    Console().print(table)
    for length in options.lengths:
        print(f"mask work at {length}: {mask_work(length) * 1e3:.1f} ms per forward")


if __name__ == "__main__":
    main()
