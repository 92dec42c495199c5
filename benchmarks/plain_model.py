"""A Llama in plain PyTorch: nn.RMSNorm, SDPA and full logits, with the weights of Sightline's model."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.batch import Batch
from sightline.models.llama3 import Llama3, Llama3Config

Attention = Literal["dense mask", "leaky causal", "document loop"]
"""How the plain model attends: with a dense document mask; causally over the full row, where every document leaks into
the next; or causally with one call of SDPA per document."""


class PlainBlock(nn.Module):
    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.resolved_head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head_dim
        self.attention_norm = nn.RMSNorm(hidden_size, config.norm_eps)
        self.query = nn.Linear(hidden_size, config.num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, config.num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(hidden_size, config.num_kv_heads * head_dim, bias=False)
        self.attention_output = nn.Linear(config.num_heads * head_dim, hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden_size, config.norm_eps)
        self.gate = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(self, h: Tensor, mask: Tensor | None, offsets: list[int], cos: Tensor, sin: Tensor) -> Tensor:
        """h [1, S, W] -> [1, S, W].

        mask     bool [1, 1, S, S]; None: causal attention from each offset to the next
        offsets  where the calls of SDPA start, then S
        """
        x = self.attention_norm(h)
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, first:last], k[:, :, first:last], v[:, :, first:last],
                attn_mask=mask, is_causal=mask is None, enable_gqa=True,
            )
            for first, last in pairwise(offsets)
        ]  # fmt: skip
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        h = h + self.attention_output(out.transpose(1, 2).flatten(2))
        x = self.mlp_norm(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class PlainModel(nn.Module):
    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, batch: Batch, attention: Attention) -> Tensor:
        """Return the logits [1, S, V] of a batch of one row."""
        mask, length = None, batch.shape[1]
        offsets = batch.document_offsets().tolist() if attention == "document loop" else [0, length]
        if attention == "dense mask":
            ids = batch.document_ids
            mask = (ids[:, :, None] == ids[:, None, :]).unsqueeze(1)
            mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
        head_dim = self.config.resolved_head_dim
        frequencies = self.config.rope_theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = (batch.positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        h = self.embedding(batch.tokens)
        for layer in self.layers:
            h = layer(h, mask, offsets, cos, sin)
        return self.output(self.norm(h))

    def copy_weights(self, model: Llama3) -> None:
        """Copy the weights of Sightline's model, whose parameters have the same order."""
        with torch.no_grad():
            for parameter, source in zip(self.parameters(), model.parameters(), strict=True):
                parameter.copy_(source)
