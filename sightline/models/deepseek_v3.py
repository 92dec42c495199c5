"""DeepSeek V3 (arXiv 2412.19437): multi-head latent attention, fine-grained experts, multi-token prediction (MTP)."""

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
    add_gradient_of,
)
from sightline.masks import named_masks
from sightline.models.block import Block
from sightline.models.checks import check_divisible, check_experts, check_positive, check_rotary
from sightline.models.decoder import Decoder, DecoderConfig, Masks
from sightline.models.family import Family
from sightline.models.hf.deepseek_v3 import DEEPSEEK_V3_HF


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DecoderConfig):
    """Config of a DeepSeek V3 model."""

    num_dense_layers: int = 1
    """Number of dense layers at the start of the model; all later layers have experts."""
    num_heads: int = 8
    """Number of attention heads (H)."""
    q_lora_rank: int | None = 128
    """Rank of the low-rank query projection; None uses one full projection."""
    kv_lora_rank: int = 64
    """Rank of the low-rank key/value projection: size of the latent vector that the KV cache stores per token."""
    qk_nope_head_dim: int = 16
    """Query and key channels per head without RoPE."""
    qk_rope_head_dim: int = 16
    """Query and key channels per head with RoPE; must be even. All heads share these key channels."""
    v_head_dim: int = 32
    """Value channels per head."""
    intermediate_size: int = 688
    """Intermediate size of the dense feed-forward layers."""
    moe_intermediate_size: int = 128
    """Intermediate size of each expert."""
    num_experts: int = 16
    """Number of routed experts per MoE layer (E)."""
    experts_per_token: int = 4
    """Number of routed experts that the router selects for each token (K)."""
    num_shared_experts: int = 1
    """Number of shared experts, fused into one feed-forward layer of num-shared-experts * moe-intermediate-size."""
    num_expert_groups: int = 1
    """Number of groups that the routed experts are divided into, such as the nodes that store them."""
    num_limited_groups: int = 1
    """Number of expert groups that a token may be routed to (node-limited routing)."""
    routed_scaling_factor: float = 2.5
    """Factor of the routed experts' weighted sum; the shared expert has factor 1."""
    expert_bias_update_rate: float = 0.001
    """Change of the expert bias per optimizer step: up for underloaded experts, down for overloaded ones."""
    aux_loss_coef: float = 0.0
    """Coefficient of an auxiliary load-balancing loss, in addition to the expert bias; 0 disables it."""
    mtp_loss_weight: float | None = None
    """Weight of the multi-token prediction (MTP) loss; the paper uses 0.3, later 0.1. None builds no MTP module. The
    reported loss remains that of the next token."""
    rope_scaling: YarnScaling | None = None
    """YaRN scaling of RoPE for longer contexts."""
    norm_eps: float = 1e-6
    """Epsilon added to the mean square in RMSNorm."""

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
                f"model.num-dense-layers must be 0 to {self.num_layers} (model.num-layers), got {self.num_dense_layers}"
            )
        check_divisible(self, "num_experts", "num_expert_groups", "groups")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_limited_groups > self.num_expert_groups:
            raise ValueError(
                f"model.num-limited-groups must be at most {self.num_expert_groups} (model.num-expert-groups), "
                f"got {self.num_limited_groups}"
            )
        group_size = self.num_experts // self.num_expert_groups
        if self.num_limited_groups < self.num_expert_groups and group_size < 2:
            raise ValueError(
                f"a group is scored by its two best experts, but model.num-experts {self.num_experts} in "
                f"{self.num_expert_groups} groups leave one expert per group; lower model.num-expert-groups"
            )
        available = self.num_limited_groups * group_size
        if available < self.experts_per_token:
            raise ValueError(
                f"model.num-limited-groups {self.num_limited_groups} makes {available} experts available to a token, "
                f"but model.experts-per-token is {self.experts_per_token}; raise the first or lower the second"
            )


def build_moe(config: DeepseekV3Config) -> MoE:
    """Build the MoE of section 2.1.2: sigmoid scores, node-limited routing, load balancing by an expert bias."""
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
    """Multi-token prediction module (section 2.2): predicts the token after the next from a token's hidden state and
    the embedding of the next token. It shares the model's embedding and output projection."""

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
        """Combine the model's normalized hidden states with the next tokens' embeddings.

        h, next_embedding  [B, S, W] -> normalized hidden states [B, S, W]
        """
        x = self.join(torch.cat([self.embedding_norm(next_embedding), self.hidden_norm(h)], dim=-1))
        return self.norm(self.block(x, mask, rotation))


class DeepseekV3(Decoder):
    def __init__(self, config: DeepseekV3Config, *, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend=attention_backend)
        self.prediction: MTPModule | None = None
        if config.mtp_loss_weight is not None:
            self.prediction = MTPModule(config, self.build_block(config.num_layers - 1))
        self.mtp_losses: list[Tensor] = []  # [loss sum, tokens] of each forward of a step

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
        dense = index < config.num_dense_layers
        mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else build_moe(config)
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
            f"model.mtp-loss-weight is {self.config.mtp_loss_weight}, and the multi-token prediction module needs "
            "embedding and output head on one rank; expected None: use --model.mtp-loss-weight None"
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
        last_token_only: bool = False,
        next_tokens: Tensor | None = None,
        next_labels: Tensor | None = None,
    ) -> Tensor:
        """Run `Decoder.forward`. In training with labels, the MTP loss adds gradients, but not to the returned loss.

        next_tokens, next_labels  int64 [B, S], from `shift_for_mtp`; needed only if `tokens` are not full rows
        """
        if self.prediction is None or labels is None or not self.training:
            return super().forward(
                tokens, attention_masks=attention_masks, positions=positions, labels=labels, cache=cache,
                loss_inputs=loss_inputs, last_token_only=last_token_only,
            )  # fmt: skip
        assert self.embedding is not None and self.norm is not None, "MTP needs embedding and output head on one rank"
        h = self.embedding(tokens)
        lowered, rotation = self.lower_masks(named_masks(attention_masks), h), self.encode_positions(positions)
        h = self.norm(self.layers(h, lowered, rotation, None))
        if next_tokens is None or next_labels is None:
            next_tokens, next_labels = shift_for_mtp(tokens, labels)
        h_mtp = self.prediction(h, self.embedding(next_tokens), lowered["attention"], rotation)
        output = self.embedding if self.output is None else self.output
        mtp_loss = self.token_losses(h_mtp.flatten(0, 1), output.weight, next_labels.flatten())
        count = (next_labels != IGNORE).sum().to(mtp_loss.device, non_blocking=True)
        self.mtp_losses.append(torch.stack([mtp_loss.detach(), count]))
        weight = self.config.mtp_loss_weight * self.aux_loss_scale
        return add_gradient_of(self.head(h, labels, loss_inputs), weight * mtp_loss)

    def finish_step(self, add: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, Tensor]:
        """Run `Decoder.finish_step` and add the metric `mtp_loss`, the mean MTP loss per token."""
        metrics = super().finish_step(add)
        if self.mtp_losses:
            loss, tokens = add(torch.stack(self.mtp_losses).sum(dim=0))
            metrics["mtp_loss"] = loss / tokens.clamp(min=1)
            self.mtp_losses.clear()
        return metrics

    def flops_per_token(self) -> float:
        """Return `Decoder.flops_per_token`; the MTP loss uses the output projection a second time."""
        return super().flops_per_token() + (0.0 if self.prediction is None else self.output_flops_per_token())


def shift_for_mtp(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's next token and the label of that next token, int64 [B, S] each.

    A label is the next token of the same document, even if that token is in the next row. A token without a label gets
    the next token of the row instead. Inside a document this is the correct token. At its end the token belongs to
    another document, but there is no label to predict, and no other token attends to the result.
    """
    device_labels = labels.to(tokens.device, non_blocking=True)  # labels may be on the CPU
    next_tokens = torch.where(device_labels != IGNORE, device_labels, tokens.roll(-1, dims=1))
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
        "16b": published(  # the size of DeepSeek V2 Lite (arXiv 2405.04434)
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
    # The peak learning rates of V2 Lite (arXiv 2405.04434) and V3.
    recipes={"debug": debug, "tiny": tiny, "16b": on_gpus(4.2e-4), "671b": on_gpus(2.2e-4)},
)
