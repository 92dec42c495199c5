"""Tokens/s of greedy generation with a cache: Sightline against `generate` of transformers, with the same weights.

    python -m benchmarks.decode [--models llama3 gpt_oss ...] [--threads 1 2] [--new-tokens 128] [--rounds 3]

The models have random weights and sizes that are realistic for a CPU. The transformers model uses SDPA, or its eager
attention if it has no SDPA. Both generate in turn in one process:

    batch 1   one prompt of 64 tokens
    batch 8   eight prompts of 16 to 120 tokens; theirs are padded on the left
    prefill   one new token after a prompt of 2048 tokens, counted as 2048 tokens

`equal` is the share of rows whose tokens are all equal. Kernels differ in the last bit, so rows may differ after a
near tie of two logits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.families import load_theirs
from benchmarks.timing import in_turn, machine, save
from sightline.generation import SamplingConfig, generate_batch
from sightline.layers import YarnScaling
from sightline.models import VLMConfig, build_model, load_pretrained, save_pretrained
from sightline.models.deepseek_v3 import DeepseekV3Config
from sightline.models.gpt_oss import GptOssConfig
from sightline.models.llama3 import Llama3Config
from sightline.models.llama4 import Llama4Config
from sightline.models.qwen3 import Qwen3Config
from sightline.models.qwen3_next import Qwen3NextConfig

SIZE: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 512, "num_layers": 8}
HEADS: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
EXPERTS: dict[str, Any] = {"num_experts": 16, "experts_per_token": 4}

CONFIGS = {
    "llama3": Llama3Config(**SIZE, **HEADS, intermediate_size=1376),
    "qwen3": Qwen3Config(**SIZE, **HEADS, intermediate_size=1376),
    "qwen3_moe": Qwen3Config(**SIZE, **HEADS, **EXPERTS, intermediate_size=344),
    "gpt_oss": GptOssConfig(**SIZE, **HEADS, **EXPERTS, intermediate_size=344, rope_scaling=YarnScaling()),
    "deepseek_v3": DeepseekV3Config(
        **SIZE,
        **EXPERTS,
        num_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1376,
        moe_intermediate_size=344,
        num_expert_groups=4,
        num_limited_groups=2,
    ),
    "llama4": Llama4Config(
        **SIZE,
        **HEADS,
        num_experts=16,
        experts_per_token=1,
        intermediate_size_mlp=1376,
        intermediate_size=688,
        attention_chunk_size=256,
    ),
    "qwen3_next": Qwen3NextConfig(
        **SIZE,
        **HEADS,
        **EXPERTS,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=344,
        shared_expert_intermediate_size=344,
    ),
    "vlm": VLMConfig(**SIZE, **HEADS, intermediate_size=1376),  # text only
}


class NoEnd:
    """Tokenizer whose text is the token ids; no token ends the text."""

    eos_id = -1

    def encode_prompt(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, SIZE["vocab_size"] - 2, (n,), generator=generator).tolist() for n in lengths]


def our_run(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    texts = generate_batch(model, NoEnd(), prompts, SamplingConfig(max_new_tokens=count, temperature=0))
    return [NoEnd().encode_prompt(text) for text in texts]


def their_run(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, longest:].tolist()


def cases(count: int) -> dict[str, tuple[list[list[int]], int]]:
    """Prompts and number of new tokens of each case."""
    return {
        "batch 1": (random_prompts([64]), count),
        "batch 8": (random_prompts([16, 30, 45, 60, 75, 90, 105, 120]), count),
        "prefill": (random_prompts([2048]), 1),
    }


def keep(texts: dict[str, Any], who: str, run: Callable[..., Any], *arguments: Any) -> None:
    """Run a contestant and keep its texts."""
    texts[who] = run(*arguments)


def compare(name: str, options: argparse.Namespace, threads: int) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_pretrained(build_model(CONFIGS[name]), Path(folder))
        ours, theirs = load_pretrained(folder).eval(), load_theirs(Path(folder)).eval()
    rows: list[dict[str, object]] = []
    for case, (prompts, count) in cases(options.new_tokens).items():
        texts: dict[str, list[list[int]]] = {}
        contestants = {
            "ours": partial(keep, texts, "ours", our_run, ours, prompts, count),
            "theirs": partial(keep, texts, "theirs", their_run, theirs, prompts, count),
        }
        with torch.no_grad():
            seconds = in_turn(contestants, options.rounds)
        tokens = len(prompts[0]) if count == 1 else len(prompts) * count
        equal = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True)) / len(prompts)
        rows.append(
            {
                "model": name,
                "threads": threads,
                "case": case,
                "their_attention": theirs.config._attn_implementation,
                **{f"{who}_tokens_per_second": tokens / seconds[who] for who in contestants},
                "times": seconds["theirs"] / seconds["ours"],
                "equal": equal,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    table = Table(title=f"generation, tokens/s, {machine()}")
    for column in ("model", "threads", "case", "theirs is", "ours", "theirs", "ours / theirs", "equal"):
        table.add_column(column, justify="left" if column in ("model", "case", "theirs is") else "right")
    results = []
    for name in options.models:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for row in compare(name, options, threads):
                results.append(row)
                speeds = [f"{row[f'{who}_tokens_per_second']:.0f}" for who in ("ours", "theirs")]
                shown = [str(row[key]) for key in ("model", "threads", "case", "their_attention")]
                table.add_row(*shown, *speeds, f"{row['times']:.2f}x", f"{row['equal']:.2f}")
                print(*shown, *speeds, f"{row['times']:.2f}x", f"{row['equal']:.2f}", flush=True)
        table.add_section()
    Console(width=120).print(table)
    save("decode", results)


if __name__ == "__main__":
    main()
