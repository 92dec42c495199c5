"""Small random models of transformers, documents to train them on, and the loss of each document alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}

SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}
"""Arguments of Trainer for the plain SGD of `train_alone`."""


def build_llama(seed: int = 0) -> PreTrainedModel:
    """Return a random Llama of two layers."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="eager")


def build_gpt_oss(seed: int = 0) -> PreTrainedModel:
    """Return a random gpt-oss: a layer with a window of 5 and one without, attention sinks, experts.

    The router's auxiliary loss is off: it depends on which documents share a batch, with any attention.
    """
    torch.manual_seed(seed)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    config = GptOssConfig(**SIZES, **experts, sliding_window=5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    return model


def build_llama4(seed: int = 0) -> PreTrainedModel:
    """Return a random Llama 4: chunks of 8 tokens, experts, and layers that are not given position_ids."""
    torch.manual_seed(seed)
    sizes = {"intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [], "attention_chunk_size": 8}
    kinds = ["chunked_attention", "full_attention"]
    config = Llama4TextConfig(**SIZES, **sizes, layer_types=kinds, no_rope_layers=[1, 0])
    return Llama4ForCausalLM._from_config(config, attn_implementation="eager")


def random_documents(count: int, seed: int = 0, shortest: int = 2, longest: int = 17) -> list[list[int]]:
    """Return lists of token ids from 3, the first that is not special."""
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the numbers 0 .. 96 as words."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {str(i): i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class Recorder:
    """A collator that keeps the examples of each batch, to train on them again."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator
        self.batches: list[list[dict[str, Any]]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        self.batches.append([document for example in examples for document in split_documents(example)])
        return self.collator(examples)


def split_documents(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the documents of an example: several if TRL packed it."""
    tokens = torch.as_tensor(example["input_ids"])
    labels = torch.as_tensor(example.get("labels", tokens))
    lengths = example.get("seq_lengths", [len(tokens)])
    return [{"input_ids": a, "labels": b} for a, b in zip(tokens.split(lengths), labels.split(lengths), strict=True)]


def sum_of_losses(model: nn.Module, examples: list[dict[str, Any]]) -> tuple[Tensor, int]:
    """Return the summed loss of documents, each in a forward of its own, and the number of labels."""
    total, count = torch.zeros(()), 0
    for example in examples:
        tokens = torch.as_tensor(example["input_ids"])[None]
        labels = torch.as_tensor(example.get("labels", example["input_ids"]))[None, 1:]
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += int((labels != -100).sum())
    return total, count


def train_alone(model: nn.Module, steps: list[list[dict[str, Any]]], lr: float) -> list[float]:
    """Train with SGD, each document in a forward of its own, and return the loss of each step: the reference."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for examples in steps:
        total, count = sum_of_losses(model, examples)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach()) / count)
    return losses


def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that is not enabled, with eager attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def largest_difference(model: nn.Module, reference: nn.Module) -> float:
    """Return the largest difference of a parameter."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def check_isolated(model: nn.Module, batch: dict[str, Any], tolerance: float = 0.0) -> None:
    """Change the first token of each document of row 0 in turn: all logits of that document change, no others.

    tolerance  changes that are rounding, for experts: when a token is routed elsewhere, their matrices have other sizes
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    tokens, lengths = batch["input_ids"], batch["document_lengths"][0]
    was = model.training
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        for start, length in zip(accumulate([0, *lengths]), lengths, strict=False):
            changed = tokens.clone()
            changed[0, start] = tokens[0, start] % (VOCABULARY - 1) + 1
            after = model(**{**inputs, "input_ids": changed}).logits
            different = (before - after).abs().amax(dim=-1) > tolerance
            assert bool(different[0, start : start + length].all()), f"the document at {start} did not change"
            different[0, start : start + length] = False
            assert not bool(different.any()), f"the document at {start} leaks to {different.nonzero().tolist()}"
    model.train(was)
