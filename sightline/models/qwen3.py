"""Qwen 3 (arXiv 2505.09388): Llama's layer with normed queries and keys and heads of a size of their own; dense or MoE.

Read top to bottom, small to large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from sightline.attention import Lowered
from sightline.batch import Batch
from sightline.layers import (
    Experts,
    GroupedQueryAttention,
    KeyValueCache,
    MoE,
    RMSNorm,
    Rotation,
    Router,
    SwiGLU,
    YarnScaling,
    build_rotation,
    rope_frequencies,
)
from sightline.masks import AttentionMask, causal, document
from sightline.models.checks import check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, Layer
from sightline.models.weights import HuggingFace, Weight, expect, read_rope, read_scaling, write_rope


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """The sizes of a Qwen 3."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    width: int = 256
    """Size of a token's hidden state."""
    layers: int = 6
    """Blocks of attention and feed-forward."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int = 64
    """Channels of a head (D), an even number; heads * head-size need not be the width."""
    ffn: int = 688
    """Inner width of the feed-forward layer, or of each expert."""
    experts: int = 0
    """Experts of a layer (E); 0 is one feed-forward layer for every token."""
    experts_per_token: int = 8
    """Experts that a token is sent to (K), where there are experts."""
    auxiliary_loss: float = 0.001
    """Weight of the loss that keeps the load of the experts even."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    rope_scaling: YarnScaling | None = None
    """YaRN's stretch of RoPE to longer contexts."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "ffn")
        check_positive(self, "experts_per_token", "rope_theta", "norm_eps")
        check_heads(self.heads, self.kv_heads, self.head_size)
        if self.experts:
            check_positive(self, "experts")
            check_experts(self.experts, self.experts_per_token)


def _published(**sizes: Any) -> Qwen3Config:
    return Qwen3Config(**{"vocab_size": 151_936, "kv_heads": 8, "head_size": 128, **sizes})


QWEN3_SIZES = {
    "debug": Qwen3Config(vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=32, ffn=128),
    "debug-moe": Qwen3Config(
        vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=32, ffn=64, experts=8, experts_per_token=2
    ),
    "tiny": Qwen3Config(tied_embeddings=True),
    "tiny-moe": Qwen3Config(ffn=172, experts=16, experts_per_token=4, tied_embeddings=True),
    "0.6b": _published(width=1024, layers=28, heads=16, ffn=3072, tied_embeddings=True),
    "1.7b": _published(width=2048, layers=28, heads=16, ffn=6144, tied_embeddings=True),
    "4b": _published(width=2560, layers=36, heads=32, ffn=9728, tied_embeddings=True),
    "8b": _published(width=4096, layers=36, heads=32, ffn=12_288),
    "14b": _published(width=5120, layers=40, heads=40, ffn=17_408),
    "32b": _published(width=5120, layers=64, heads=64, ffn=25_600),
    "30b-a3b": _published(width=2048, layers=48, heads=32, kv_heads=4, ffn=768, experts=128),
    "235b-a22b": _published(width=4096, layers=94, heads=64, kv_heads=4, ffn=1536, experts=128),
}


class Block(Layer):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h)); the mlp is dense or a mixture of experts."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = GroupedQueryAttention(
            config.width, config.heads, config.kv_heads, config.head_size, qk_norm_eps=config.norm_eps
        )
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = _mixture(config) if config.experts else SwiGLU(config.width, config.ffn)

    def init_weights(self, std: float, output_std: float) -> None:
        self.attention_norm.init_weights()
        self.attention.init_weights(std, output_std)
        self.mlp_norm.init_weights()
        self.mlp.init_weights(std, output_std)

    def forward(self, h: Tensor, mask: Lowered, rotation: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        h = h + self.attention(self.attention_norm(h), mask, rotation, cache)
        x = self.mlp_norm(h)
        return h + (self.mlp(x, mask.visible) if isinstance(self.mlp, MoE) else self.mlp(x))


def _mixture(config: Qwen3Config) -> MoE:
    router = Router(
        config.width, config.experts, config.experts_per_token, renormalize=True, auxiliary=config.auxiliary_loss
    )
    return MoE(router, Experts(config.experts, config.width, config.ffn))


class Qwen3(Decoder):
    """The whole model."""

    def __init__(self, config: Qwen3Config, *, attention_backend: str = "auto") -> None:
        super().__init__(config, (Block(config) for _ in range(config.layers)), attention_backend=attention_backend)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> AttentionMask:
        """Every token sees itself and what comes before it in its own document."""
        rows, length = batch.shape
        return causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)

    def encode_positions(self, positions: Tensor) -> Rotation:
        config = self.config
        frequencies = rope_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling, device=positions.device
        )
        return build_rotation(
            positions, frequencies, config.rope_scaling.rotation_factor if config.rope_scaling else 1.0
        )

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token in matrix products, attention scores left out.

        6 a matmul parameter that the token meets: of the experts only those it is sent to. The output projection
        counts, also where it is the embedding; the embedding's lookup and the norms do not.
        """
        config = self.config
        heads = 2 * (config.heads + config.kv_heads)  # query and output, key and value
        mlp = 3 * config.ffn
        if config.experts:
            mlp = config.experts + config.experts_per_token * mlp  # the router's choice, and the chosen
        layer = config.width * (heads * config.head_size + mlp)
        return 6.0 * (config.layers * layer + config.width * config.vocab_size)

    def attention_flops_per_pair(self) -> float:
        """Forward and backward FLOPs of one visible (query, key) pair over all layers: 12 a channel of every query
        head, as in Llama 3."""
        return 12.0 * self.config.heads * self.config.head_size * self.config.layers


def config_from_hf(hf: dict[str, Any]) -> Qwen3Config:
    """From the fields of a config.json."""
    expect(hf, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    mixture: dict[str, Any] = {"ffn": hf.get("intermediate_size")}
    if hf["architectures"][0] == "Qwen3MoeForCausalLM":
        expect(hf, decoder_sparse_step=1, norm_topk_prob=True)
        expect({**hf, "mlp_only_layers": hf.get("mlp_only_layers") or []}, mlp_only_layers=[])
        mixture = {
            "ffn": hf["moe_intermediate_size"],
            "experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
            "experts_per_token": hf["num_experts_per_tok"],
            "auxiliary_loss": hf.get("router_aux_loss_coef", 0.001),
        }
    rope = read_rope(hf, "yarn")
    return Qwen3Config(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        rope_theta=rope["rope_theta"],
        rope_scaling=read_scaling(rope),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_embeddings=hf.get("tie_word_embeddings", False),
        **mixture,
    )


def config_to_hf(config: Qwen3Config) -> dict[str, Any]:
    """And back."""
    mixture: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": config.ffn,
    }
    if config.experts:
        mixture = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": config.ffn,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": True,
            "router_aux_loss_coef": config.auxiliary_loss,
        }
    return {
        **mixture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        **write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


SHARED_NAMES = (
    ("input_layernorm", "attention_norm"),
    ("self_attn.q_proj", "attention.query"),
    ("self_attn.k_proj", "attention.key"),
    ("self_attn.v_proj", "attention.value"),
    ("self_attn.q_norm", "attention.query_norm"),
    ("self_attn.k_norm", "attention.key_norm"),
    ("self_attn.o_proj", "attention.output"),
    ("post_attention_layernorm", "mlp_norm"),
)
FEED_FORWARD_NAMES = (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))


def hf_weights(config: Qwen3Config) -> Iterator[Weight]:
    """Which tensor of theirs is which of ours."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        for their_name, name in SHARED_NAMES:
            yield Weight(f"{theirs}.{their_name}.weight", f"{ours}.{name}.weight")
        if config.experts:
            yield from _expert_weights(config, f"{theirs}.mlp", f"{ours}.mlp")
        else:
            for their_name, name in FEED_FORWARD_NAMES:
                yield Weight(f"{theirs}.mlp.{their_name}.weight", f"{ours}.mlp.{name}.weight")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


def _expert_weights(config: Qwen3Config, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one tensor an expert, ours all experts in one."""
    yield Weight(f"{theirs}.gate.weight", f"{ours}.router.weight")
    for e in range(config.experts):
        for their_name, name in FEED_FORWARD_NAMES:
            yield Weight(f"{theirs}.experts.{e}.{their_name}.weight", f"{ours}.experts.{name}", of_ours=itemgetter(e))


QWEN3_HF = HuggingFace(
    model=Qwen3,
    architectures=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=hf_weights,
)
