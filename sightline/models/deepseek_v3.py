"""DeepSeek V3 (arXiv 2412.19437): latent attention, many small experts, a look one token further."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.batch import IGNORE
from sightline.config.recipes import debug, on_gpus, tiny
from sightline.layers import (
    Experts,
    LayerCache,
    MoE,
    MultiHeadLatentAttention,
    RMSNorm,
    Rotation,
    Router,
    SwiGLU,
    YarnScaling,
    with_gradient_of,
)
from sightline.masks import named_masks
from sightline.models.block import Block
from sightline.models.checks import check_divisible, check_experts, check_positive, check_rotary
from sightline.models.decoder import Decoder, DecoderConfig, Masks
from sightline.models.family import Family
from sightline.models.hf.deepseek_v3 import DEEPSEEK_V3_HF


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DecoderConfig):
    """The sizes of a DeepSeek V3."""

    num_dense_layers: int = 1
    """The first so many have one feed-forward layer for all tokens, the others have experts."""
    num_heads: int = 8
    """Heads (H)."""
    q_lora_rank: int | None = 128
    """Size of the latent that queries come through; None: they come straight from the hidden state."""
    kv_lora_rank: int = 64
    """Size of the latent that keys and values come through, which is what generation remembers of a token."""
    qk_nope_head_dim: int = 16
    """Channels of a head's query and key that know no position."""
    qk_rope_head_dim: int = 16
    """Channels that RoPE turns, an even number."""
    v_head_dim: int = 32
    """Channels of a head's value."""
    intermediate_size: int = 688
    """Inner width of the feed-forward layer of the dense layers."""
    moe_intermediate_size: int = 128
    """Inner width of an expert."""
    num_experts: int = 16
    """Experts that tokens are sent to (E)."""
    experts_per_token: int = 4
    """Experts that a token is sent to (K)."""
    num_shared_experts: int = 1
    """Experts that all tokens share: one feed-forward layer of so many times expert-ffn."""
    num_expert_groups: int = 1
    """The experts stand in so many groups (the nodes they lie on) ..."""
    num_limited_groups: int = 1
    """... of which a token is sent to no more than this many."""
    routed_scaling_factor: float = 2.5
    """What the experts of a token give together, against 1 of the shared."""
    expert_bias_update_rate: float = 0.001
    """How far a step moves the bias of an expert with more or less than the mean load, so that the loads even out."""
    aux_loss_coef: float = 0.0
    """Weight of a loss that evens out the loads as well."""
    mtp_loss_weight: float | None = None
    """With it, an extra layer learns to predict the token after the next, its loss weighted by this (0.3 at first, then
    0.1 in the paper); the loss that is told stays that of the next token."""
    rope_scaling: YarnScaling | None = None
    """YaRN's stretch of RoPE to longer contexts."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self,
            "num_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "intermediate_size",
            "moe_intermediate_size",
        )
        check_positive(
            self, "num_experts", "experts_per_token", "num_shared_experts", "num_expert_groups", "num_limited_groups"
        )
        check_experts(self)
        if self.q_lora_rank is not None:
            check_positive(self, "q_lora_rank")
        check_rotary("qk_rope_head_dim", self.qk_rope_head_dim)
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"model.num-dense-layers must be 0 to {self.num_layers}, all layers, got {self.num_dense_layers}"
            )
        check_divisible(self, "num_experts", "num_expert_groups", "groups")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_limited_groups > self.num_expert_groups:
            raise ValueError(
                f"model.num-limited-groups must be at most {self.num_expert_groups}, all groups, got {self.num_limited_groups}"
            )
        size = self.num_experts // self.num_expert_groups
        if self.num_limited_groups < self.num_expert_groups and size < 2:
            raise ValueError(
                f"a group is judged by its two best experts, but model.num-experts {self.num_experts} in "
                f"{self.num_expert_groups} groups leave one to each; lower model.num-expert-groups"
            )
        if self.num_limited_groups * size < self.experts_per_token:
            raise ValueError(
                f"model.num-limited-groups {self.num_limited_groups} opens {self.num_limited_groups * size} experts to a "
                f"token, but it is sent to {self.experts_per_token}; raise it or lower model.experts-per-token"
            )


def build_moe(config: DeepseekV3Config) -> MoE:
    """Section 2.1.2 of the paper: sigmoid scores, the limit on groups, and the balance without a loss."""
    router = Router(
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        score="sigmoid",
        renormalize=True,
        scale=config.routed_scaling_factor,
        num_groups=config.num_expert_groups,
        num_limited_groups=config.num_limited_groups,
        expert_bias_update_rate=config.expert_bias_update_rate,
        aux_loss_coef=config.aux_loss_coef,
    )
    experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
    return MoE(router, experts, SwiGLU(config.hidden_size, config.num_shared_experts * config.moe_intermediate_size))


class MTPModule(nn.Module):
    """The layer that looks one token further (section 2.2): from what the model knows at a token, and the next token,
    it predicts the one after that. Embedding and output projection are the model's own."""

    def __init__(self, config: DeepseekV3Config, block: Block) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.join = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def init_weights(self, std: float, output_std: float) -> None:
        for norm in (self.embedding_norm, self.hidden_norm, self.norm):
            norm.init_weights()
        nn.init.normal_(self.join.weight, std=self.join.in_features**-0.5)
        self.block.init_weights(std, output_std)

    def forward(self, h: Tensor, next_embedding: Tensor, mask: Lowered, rotation: Rotation) -> Tensor:
        """The model's normed hidden states [B, S, W] and the next tokens' embeddings -> normed hidden states."""
        x = self.join(torch.cat([self.embedding_norm(next_embedding), self.hidden_norm(h)], dim=-1))
        return self.norm(self.block(x, mask, rotation))


class DeepseekV3(Decoder):
    def __init__(self, config: DeepseekV3Config, *, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend=attention_backend)
        self.prediction: MTPModule | None = None
        if config.mtp_loss_weight is not None:
            self.prediction = MTPModule(config, self.build_block(config.num_layers - 1))
        self.mtp_losses: list[Tensor] = []  # (sum of losses, tokens) of each forward of a step

    def build_block(self, index: int) -> Block:
        config = self.config
        attention = MultiHeadLatentAttention(
            config.hidden_size,
            config.num_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            score_factor=1.0 if config.rope_scaling is None else config.rope_scaling.score_factor,
        )
        mlp = (
            SwiGLU(config.hidden_size, config.intermediate_size)
            if index < config.num_dense_layers
            else build_moe(config)
        )
        return Block(attention, mlp, self.build_norm)

    @property
    def rotary_dim(self) -> int:
        return self.config.qk_rope_head_dim

    def init_weights(self) -> None:
        super().init_weights()
        if self.prediction is not None:
            std = self.config.hidden_size**-0.5
            self.prediction.init_weights(std, std / 2**0.5)

    def per_token_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if self.prediction is None or inputs.get("labels") is None:
            return {}
        return dict(zip(("next_tokens", "next_labels"), shift_for_mtp(inputs["tokens"], inputs["labels"]), strict=True))

    def hidden_state_modules(self) -> list[nn.Module]:
        return super().hidden_state_modules() + ([] if self.prediction is None else [self.prediction])

    @property
    def pipeline_unsupported_reason(self) -> str | None:
        if self.prediction is None:
            return super().pipeline_unsupported_reason
        return (
            f"model.mtp-loss-weight is {self.config.mtp_loss_weight}, and predicting a token further takes the "
            "embedding and the head together; expected None: use --model.mtp-loss-weight None"
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_masks: Masks,
        positions: Tensor,
        labels: Tensor | None = None,
        cache: dict[str, LayerCache] | None = None,
        loss_inputs: dict[str, Tensor] | None = None,
        next_tokens: Tensor | None = None,
        next_labels: Tensor | None = None,
    ) -> Tensor:
        """As in every decoder. In training with labels, the token after the next is learnt too where that is wanted:
        its gradients are there, its loss is not in the sum.

        next_tokens, next_labels  int64 [B, S], from `shift_for_mtp`; without them, `tokens` are whole rows
        """
        if self.prediction is None or labels is None or not self.training:
            return super().forward(
                tokens,
                attention_masks=attention_masks,
                positions=positions,
                labels=labels,
                cache=cache,
                loss_inputs=loss_inputs,
            )
        assert self.embedding is not None and self.norm is not None, "prediction needs both ends of the model"
        h = self.embedding(tokens)
        lowered, rotation = self.lower_masks(named_masks(attention_masks), h), self.encode_positions(positions)
        h = self.norm(self.layers(h, lowered, rotation, None))
        if next_tokens is None or next_labels is None:
            next_tokens, next_labels = shift_for_mtp(tokens, labels)
        further = self.prediction(h, self.embedding(next_tokens), lowered["attention"], rotation)
        output = self.embedding if self.output is None else self.output
        loss = self.token_losses(further.flatten(0, 1), output.weight, next_labels.flatten())
        predicted = (next_labels != IGNORE).sum().to(loss.device, non_blocking=True)
        self.mtp_losses.append(torch.stack([loss.detach(), predicted]))
        weight = self.config.mtp_loss_weight * self.aux_loss_scale
        return with_gradient_of(self.head(h, labels, loss_inputs), weight * loss)

    def finish_step(self, add: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, Tensor]:
        """As in every decoder, and `mtp_loss`: the mean loss of the token after the next."""
        metrics = super().finish_step(add)
        if self.mtp_losses:
            loss, tokens = add(torch.stack(self.mtp_losses).sum(dim=0))
            metrics["mtp_loss"] = loss / tokens.clamp(min=1)
            self.mtp_losses.clear()
        return metrics

    def flops_per_token(self) -> float:
        """As in every decoder; predicting the token after the next takes the output projection a second time."""
        return super().flops_per_token() + (0.0 if self.prediction is None else self.output_flops_per_token())


def shift_for_mtp(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each token, and its label: what comes after the next, int64 [B, S] each.

    A label says both that the next token is of the same document and which one it is, also where the row ends. Where
    there is none the next token of the row stands in: in a document, it is the right one; at its end, it is another's,
    but there is nothing to predict, and no other token sees what comes of it.
    """
    known = labels.to(tokens.device, non_blocking=True)  # labels may lie on the CPU
    next_tokens = torch.where(known != IGNORE, known, tokens.roll(-1, dims=1))
    next_labels = labels.roll(-1, dims=1)
    next_labels[:, -1] = IGNORE
    return next_tokens, next_labels.masked_fill(labels == IGNORE, IGNORE)


published = partial(DeepseekV3Config, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model=DeepseekV3,
    config=DeepseekV3Config,
    presets={
        "debug": DeepseekV3Config(
            vocab_size=512,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=16,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_experts=8,
            experts_per_token=2,
            num_expert_groups=4,
            num_limited_groups=2,
        ),
        "tiny": DeepseekV3Config(num_expert_groups=4, num_limited_groups=2),
        "16b": published(  # the sizes of DeepSeek V2 Lite (arXiv 2405.04434)
            vocab_size=102_400,
            hidden_size=2048,
            num_layers=27,
            num_dense_layers=1,
            num_heads=16,
            q_lora_rank=None,
            intermediate_size=10_944,
            moe_intermediate_size=1408,
            num_experts=64,
            experts_per_token=6,
            num_shared_experts=2,
            routed_scaling_factor=1.0,
        ),
        "671b": published(
            vocab_size=129_280,
            hidden_size=7168,
            num_layers=61,
            num_dense_layers=3,
            num_heads=128,
            q_lora_rank=1536,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            num_experts=256,
            experts_per_token=8,
            num_shared_experts=1,
            num_expert_groups=8,
            num_limited_groups=4,
            rope_scaling=YarnScaling(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0),
        ),
    },
    hf=DEEPSEEK_V3_HF,
    # On GPUs with the peak learning rates of V2 Lite (arXiv 2405.04434) and V3.
    recipes={"debug": debug, "tiny": tiny, "16b": on_gpus(4.2e-4), "671b": on_gpus(2.2e-4)},
)
