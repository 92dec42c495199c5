"""Llama 4's text model (Meta, 2025): layers that rotate and see a chunk, every fourth without either, and experts.

Read top to bottom, small to large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sightline.attention import Lowered
from sightline.batch import Batch
from sightline.layers import (
    Experts,
    GroupedQueryAttention,
    KeyValueCache,
    Llama3RopeScaling,
    MoE,
    RMSNorm,
    Rotation,
    Router,
    SwiGLU,
    build_rotation,
    rope_frequencies,
)
from sightline.masks import AttentionMask, causal, chunked, document
from sightline.models.checks import check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, Layer
from sightline.models.weights import HuggingFace, View, Weight, expect, read_rope, read_scaling, write_rope


@dataclass(frozen=True, kw_only=True)
class Llama4Config:
    """The sizes of a Llama 4."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    width: int = 256
    """Size of a token's hidden state."""
    layers: int = 8
    """Blocks of attention and feed-forward."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int = 32
    """Channels of a head (D), an even number."""
    full_every: int = 4
    """Every so manieth layer sees the whole document and rotates nothing; the others rotate and see their chunk."""
    chunk: int = 128
    """Tokens of a chunk, counted inside the document."""
    qk_norm: bool = True
    """Norm the rotated queries and keys of the chunked layers, without a weight."""
    temperature_scale: float = 0.1
    """In full layers, the query at position p is multiplied by 1 + temperature-scale * ln(1 + floor((p + 1) /
    temperature-floor)), so that attention stays sharp over many keys; 0 leaves queries as they are."""
    temperature_floor: int = 8192
    """Tokens after which a query grows."""
    experts_every: int = 2
    """Every so manieth layer has experts, the others one feed-forward layer for all tokens."""
    dense_ffn: int = 688
    """Inner width of the feed-forward layer for all tokens."""
    ffn: int = 344
    """Inner width of an expert, and of the expert that all tokens share."""
    experts: int = 8
    """Experts of a layer, the shared one aside (E)."""
    experts_per_token: int = 1
    """Experts that a token is sent to, the shared one aside (K)."""
    auxiliary_loss: float = 0.001
    """Weight of the loss that keeps the load of the experts even."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    rope_scaling: Llama3RopeScaling | None = None
    """Llama 3.1's stretch of RoPE to longer contexts."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "full_every", "chunk")
        check_positive(self, "temperature_floor", "experts_every", "dense_ffn", "ffn", "experts", "experts_per_token")
        check_positive(self, "rope_theta", "norm_eps")
        check_heads(self.heads, self.kv_heads, self.head_size)
        check_experts(self.experts, self.experts_per_token)

    def is_full(self, layer: int) -> bool:
        return (layer + 1) % self.full_every == 0

    def has_experts(self, layer: int) -> bool:
        return (layer + 1) % self.experts_every == 0


def _published(*, experts: int, experts_every: int, scaling: Llama3RopeScaling | None, qk_norm: bool) -> Llama4Config:
    return Llama4Config(
        vocab_size=202_048,
        width=5120,
        layers=48,
        heads=40,
        kv_heads=8,
        head_size=128,
        chunk=8192,
        qk_norm=qk_norm,
        experts_every=experts_every,
        dense_ffn=16_384,
        ffn=8192,
        experts=experts,
        rope_theta=500_000.0,
        rope_scaling=scaling,
    )


LLAMA4_SIZES = {
    "debug": Llama4Config(
        vocab_size=512,
        width=64,
        layers=4,
        heads=4,
        kv_heads=2,
        head_size=16,
        chunk=16,
        dense_ffn=128,
        ffn=64,
        experts=4,
    ),
    "tiny": Llama4Config(),
    "scout": _published(  # 17B active of 109B, 16 experts
        experts=16,
        experts_every=1,
        scaling=Llama3RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
        qk_norm=True,
    ),
    "maverick": _published(experts=128, experts_every=2, scaling=None, qk_norm=False),  # 17B active of 401B
}


class Positions(NamedTuple):
    """What the layers need to know of the positions.

    rotation     turns queries and keys of the chunked layers
    temperature  float32 [B, S, 1, 1], multiplies the queries of the full layers
    """

    rotation: Rotation
    temperature: Tensor


class ChunkedAttention(GroupedQueryAttention):
    """Rotates queries and keys, then norms them where `qk_norm_eps` is given: without a weight, unlike its base."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(config.width, config.heads, config.kv_heads, config.head_size)
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None

    def encode_keys(self, k_BSGD: Tensor, positions: Positions) -> Tensor:
        k = super().encode_keys(k_BSGD, positions.rotation)
        return k if self.qk_norm_eps is None else F.rms_norm(k, (self.head_size,), eps=self.qk_norm_eps)


class FullAttention(GroupedQueryAttention):
    """Knows positions only by the temperature of its queries (arXiv 2501.19399)."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(config.width, config.heads, config.kv_heads, config.head_size)

    def encode_keys(self, k_BSGD: Tensor, positions: Positions) -> Tensor:
        return k_BSGD

    def encode_queries(self, q_BSHD: Tensor, positions: Positions) -> Tensor:
        return (q_BSHD * positions.temperature).to(q_BSHD.dtype)


def build_moe(config: Llama4Config) -> MoE:
    """A token's weight for an expert is a sigmoid by itself, and multiplies what the expert gets."""
    router = Router(
        config.width, config.experts, config.experts_per_token, score="sigmoid", auxiliary=config.auxiliary_loss
    )
    experts = Experts(config.experts, config.width, config.ffn)
    return MoE(router, experts, SwiGLU(config.width, config.ffn), weigh_inputs=True)


class Block(Layer):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h)) or h + moe(norm(h))."""

    def __init__(self, config: Llama4Config, index: int) -> None:
        super().__init__()
        self.mask_name = "full" if config.is_full(index) else "chunked"
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = FullAttention(config) if config.is_full(index) else ChunkedAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = build_moe(config) if config.has_experts(index) else SwiGLU(config.width, config.dense_ffn)

    def init_weights(self, std: float, output_std: float) -> None:
        self.attention_norm.init_weights()
        self.attention.init_weights(std, output_std)
        self.mlp_norm.init_weights()
        self.mlp.init_weights(std, output_std)

    def forward(self, h: Tensor, mask: Lowered, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        h = h + self.attention(self.attention_norm(h), mask, positions, cache)
        x = self.mlp_norm(h)
        return h + (self.mlp(x, mask.visible) if isinstance(self.mlp, MoE) else self.mlp(x))


class Llama4(Decoder):
    """The whole model."""

    def __init__(self, config: Llama4Config, *, attention_backend: str = "auto") -> None:
        super().__init__(config, (Block(config, i) for i in range(config.layers)), attention_backend=attention_backend)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """In its own document a token sees what comes before it, and itself: in its chunk, or all of it."""
        rows, length = batch.shape
        full = causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)
        return {"chunked": full & chunked(batch.positions, self.config.chunk), "full": full}

    def encode_positions(self, positions: Tensor) -> Positions:
        config = self.config
        frequencies = rope_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling, device=positions.device
        )
        grown = ((positions.float() + 1) / config.temperature_floor).floor().log1p()
        temperature = 1 + config.temperature_scale * grown[:, :, None, None]
        return Positions(build_rotation(positions, frequencies), temperature)

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token in matrix products, attention scores left out.

        6 a matmul parameter that the token meets: of the experts only the shared one and those it is sent to. The
        output projection counts, also where it is the embedding; the embedding's lookup and the norms do not.
        """
        config = self.config
        attention = 2 * (config.heads + config.kv_heads) * config.head_size  # query and output, key and value
        experts = config.experts + (config.experts_per_token + 1) * 3 * config.ffn  # the router's choice, the chosen
        mlp = sum(experts if config.has_experts(i) else 3 * config.dense_ffn for i in range(config.layers))
        return 6.0 * config.width * (config.layers * attention + mlp + config.vocab_size)

    def attention_flops_per_pair(self) -> dict[str, float]:
        """Forward and backward FLOPs of one visible (query, key) pair over the layers that use the mask: 12 a channel
        of every query head, as in Llama 3."""
        config = self.config
        layer = 12.0 * config.heads * config.head_size
        full = sum(config.is_full(i) for i in range(config.layers))
        return {"chunked": layer * (config.layers - full), "full": layer * full}


def config_from_hf(hf: dict[str, Any]) -> Llama4Config:
    """From the fields of a config.json of the text model."""
    expect(hf, hidden_act="silu", attention_bias=False)
    rope = read_rope(hf, "llama3")
    tuned = hf.get("attn_temperature_tuning", True)
    config = Llama4Config(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        full_every=hf.get("no_rope_layer_interval", 4),
        chunk=hf["attention_chunk_size"],
        qk_norm=hf["use_qk_norm"],
        temperature_scale=hf.get("attn_scale", 0.1) if tuned else 0.0,
        temperature_floor=hf.get("floor_scale", 8192),
        experts_every=hf["interleave_moe_layer_step"],
        dense_ffn=hf["intermediate_size_mlp"],
        ffn=hf["intermediate_size"],
        experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        auxiliary_loss=hf.get("router_aux_loss_coef", 0.001),
        rope_theta=rope["rope_theta"],
        rope_scaling=read_scaling(rope),
        norm_eps=hf["rms_norm_eps"],
        tied_embeddings=hf.get("tie_word_embeddings", False),
    )
    layers = range(config.layers)
    if hf.get("no_rope_layers"):  # [] in published files, for what the interval says
        expect(hf, no_rope_layers=[int(not config.is_full(i)) for i in layers])
    expect(
        hf,
        moe_layers=[i for i in layers if config.has_experts(i)],
        layer_types=["full_attention" if config.is_full(i) else "chunked_attention" for i in layers],
    )
    return config


def config_to_hf(config: Llama4Config) -> dict[str, Any]:
    """And back."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "no_rope_layer_interval": config.full_every,
        "attention_chunk_size": config.chunk,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.temperature_scale != 0,
        "attn_scale": config.temperature_scale,
        "floor_scale": config.temperature_floor,
        "interleave_moe_layer_step": config.experts_every,
        "intermediate_size_mlp": config.dense_ffn,
        "intermediate_size": config.ffn,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.auxiliary_loss,
        **write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def hf_weights(config: Llama4Config) -> Iterator[Weight]:
    """Which tensor of theirs is which of ours."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield Weight(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield _rotated(config, config.heads, f"{theirs}.self_attn.q_proj.weight", f"{ours}.attention.query.weight")
        yield _rotated(config, config.kv_heads, f"{theirs}.self_attn.k_proj.weight", f"{ours}.attention.key.weight")
        yield Weight(f"{theirs}.self_attn.v_proj.weight", f"{ours}.attention.value.weight")
        yield Weight(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.output.weight")
        yield Weight(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        theirs, ours = f"{theirs}.feed_forward", f"{ours}.mlp"
        if config.has_experts(i):
            yield Weight(f"{theirs}.router.weight", f"{ours}.router.weight")
            yield from _expert_weights(config, f"{theirs}.experts", f"{ours}.experts")
            theirs, ours = f"{theirs}.shared_expert", f"{ours}.shared"
        for name in ("gate", "up", "down"):
            yield Weight(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


def _rotated(config: Llama4Config, heads: int, theirs: str, ours: str) -> Weight:
    """Theirs turns channel 2i of a head with 2i + 1, ours i with i + D/2. Scores, sums over all channels of a query and
    a key, are the same; so in the full layers, where nothing turns, both are arranged like this too."""
    pairs = config.head_size // 2
    return Weight(
        theirs,
        ours,
        of_theirs=lambda t: t.unflatten(0, (heads, pairs, 2)).transpose(1, 2),
        of_ours=lambda t: t.unflatten(0, (heads, 2, pairs)),
        shape=(heads * config.head_size, config.width),
    )


def _expert_weights(config: Llama4Config, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs have gate and up in one, first all channels of gate."""
    halves: dict[str, View] = {"gate": lambda t: t[..., : config.ffn], "up": lambda t: t[..., config.ffn :]}
    for name, half in halves.items():
        yield Weight(
            f"{theirs}.gate_up_proj",
            f"{ours}.{name}",
            of_theirs=half,
            of_ours=lambda t: t.mT,
            shape=(config.experts, config.width, 2 * config.ffn),
        )
    yield Weight(f"{theirs}.down_proj", f"{ours}.down", of_ours=lambda t: t.mT)


LLAMA4_HF = HuggingFace(
    model=Llama4,
    architectures=("Llama4ForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=hf_weights,
)
