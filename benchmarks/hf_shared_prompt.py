"""GRPO's per-token log-probabilities with the prompt of a group computed once, against TRL's padded batch.

    python -m benchmarks.hf_shared_prompt [--prompt 2048] [--responses 8] [--response 256] [--rounds 2]

One prompt and its responses. Both contestants call `GRPOTrainer._get_per_token_logps_and_entropies` and then the
backward of a weighted sum of the log-probabilities. "trl" runs sdpa on the padded batch; "shared" is the same trainer
after `sightline.hf.share_prompts`. They take turns in one process with one thread, and times are of its processor.

The model is the Llama of `benchmarks.huggingface`: 6 layers, hidden size 256, vocabulary 8192.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import sightline.hf
from benchmarks.huggingface import VOCABULARY, any_tokenizer, build_model
from benchmarks.timing import in_turn, machine, save

Batch = dict[str, Tensor | int]


def make_batch(prompt: int, responses: int, response: int) -> Batch:
    """Return the arguments of TRL's method for a group of random tokens: tensors [N, P + C], logits_to_keep C."""
    tokens = torch.randint(VOCABULARY, (1, prompt)).expand(responses, -1)
    input_ids = torch.cat([tokens, torch.randint(VOCABULARY, (responses, response))], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "logits_to_keep": response}


def build_trainer(length: int, shared: bool) -> GRPOTrainer:
    model = build_model("trl", length)
    model.set_attn_implementation("sdpa")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0 for _ in completions],
        args=GRPOConfig(tempfile.mkdtemp(), per_device_train_batch_size=8, num_generations=8, **options),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=any_tokenizer(),
    )
    if shared:
        sightline.hf.share_prompts(trainer)
    return trainer


def step(trainer: GRPOTrainer, batch: Batch) -> float:
    """Run forward and backward once, with a different factor for each response, and return the loss."""
    trainer.model.zero_grad()
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, **batch, compute_entropy=True)
    loss = -(log_probs * torch.linspace(-1, 2, len(log_probs))[:, None]).mean()
    loss.backward()
    return float(loss)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = make_batch(options.prompt, options.responses, options.response)
    trainers = {name: build_trainer(options.prompt + options.response, name == "shared") for name in ("trl", "shared")}
    losses: dict[str, float] = {}
    runs = {name: lambda name=name: losses.update({name: step(trainers[name], batch)}) for name in trainers}
    seconds = in_turn(runs, options.rounds, time.process_time)
    trl, shared = (torch.cat([p.grad.flatten() for p in trainer.model.parameters()]) for trainer in trainers.values())
    table = Table(title=f"prompt {options.prompt}, {options.responses} responses of {options.response} ({machine()})")
    for column in ("contestant", "seconds", "ratio", "loss"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    saved: list[dict[str, object]] = []
    for name, time_of in seconds.items():
        ratio = seconds["trl"] / time_of
        table.add_row(name, f"{time_of:.2f}", f"{ratio:.2f}x", f"{losses[name]:.6f}")
        saved.append({"contestant": name, "seconds": time_of, "ratio": ratio, "loss": losses[name], **vars(options)})
    save("hf_shared_prompt", saved)
    Console().print(table)
    print(f"largest relative difference of gradients: {float((trl - shared).abs().max() / trl.abs().max()):.1e}")


if __name__ == "__main__":
    main()
