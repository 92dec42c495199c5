"""Base class of all decoder models, and of their configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sightline.attention import Exchanges, KernelRequirements, LocalExchanges, Lowered, check_backend, lower_queries
from sightline.batch import Batch, ImageSizes
from sightline.config.checks import check_values
from sightline.config.renamed import RenamedFields
from sightline.layers import (
    LOSSES,
    AttentionLayer,
    Experts,
    LayerCache,
    Loss,
    OutputProjection,
    RecurrentLayer,
    RMSNorm,
    add_gradient_of,
    attention_layers,
    build_rotation,
    compute_loss,
    flops_per_token,
    kernel_requirements,
    linear_cross_entropy,
    rope_frequencies,
    routers_of,
)
from sightline.layers.linear import linear
from sightline.masks import AttentionMask, causal, document, named_masks
from sightline.models.block import Layer, Layers
from sightline.models.checks import check_positive
from sightline.precision import autocast_dtype

Masks = AttentionMask | Mapping[str, AttentionMask]
"""Attention masks as users may pass them: one for all layers, or {name: mask}. The package itself passes a dict."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(RenamedFields):
    """Config fields shared by all decoders. A family adds fields, and redeclares one to change its default or help."""

    vocab_size: int = 8192
    """Number of tokens in the vocabulary (V)."""
    hidden_size: int = 256
    """Hidden size: channels of the residual stream."""
    num_layers: int = 6
    """Number of decoder layers."""
    rope_theta: float = 10_000.0
    """Base of the RoPE frequencies; the longest wavelength is about 2 pi rope-theta tokens."""
    norm_eps: float = 1e-5
    """Epsilon added to the mean square in RMSNorm."""
    tied_embeddings: bool = False
    """Share one weight between the embedding and the output projection."""

    def __post_init__(self) -> None:
        check_values(self, "model")
        check_positive(self, "vocab_size", "hidden_size", "num_layers", "rope_theta", "norm_eps")


class Decoder(nn.Module):
    """Decoder-only language model: embedding, layers, final norm and output projection.

    A family implements `build_block`; its layers are called as `layer(h, mask, encoding, cache)`, and their `mask_name`
    selects the mask. It overrides `get_attention_masks`, `encode_positions` and `build_norm` where it differs.

    The weights are uninitialized until `init_weights` or a checkpoint fills them: see `build_model`.

    A pipeline stage is the same model with modules removed: it deletes the other stages' layers from `layers`, sets
    `embedding` to None if it receives hidden states, and `norm` and `output` to None if it sends hidden states.
    With tied embeddings `output` is None, and the embedding is the output projection.
    """

    suppress_tokens: tuple[int, ...] = ()
    """Token ids that are never generated, such as the image token."""
    image_sizes: ImageSizes | None = None
    """Patch size, merge size and image token of a vision-language model; None for a text model."""

    def __init__(self, config: Any, *, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.exchanges: Exchanges = LocalExchanges()  # replaced under context parallelism
        # {mask name: "kernel: reason"} of the last forward, for the log.
        self.attention_kernels: dict[str, str] = {}
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers({str(index): self.build_block(index) for index in range(config.num_layers)})
        self.norm: RMSNorm | None = self.build_norm()
        self.output: nn.Linear | None = None
        if not config.tied_embeddings:
            self.output = OutputProjection(config.hidden_size, config.vocab_size, bias=False)
        # Experts of an MoE layer; 0 if all layers are dense. A pipeline stage keeps the number of the full model.
        self.num_experts = max(
            (len(module.gate) for module in self.layers.modules() if isinstance(module, Experts)), default=0
        )
        # Both take the weight of the output projection, and are replaced when the vocabulary is sharded.
        self.logits: Callable[[Tensor, Tensor], Tensor] = linear
        self.token_losses: Callable[..., Tensor] = linear_cross_entropy
        self.loss: Loss = LOSSES[0]
        self.context_group: ProcessGroup | None = None  # ranks that share each row; None without context parallelism
        # Factor of the auxiliary losses. They are sums over tokens, like the default loss; a training step that does
        # not divide by its valid tokens sets the factor to the weight of one token.
        self.aux_loss_scale: float | Tensor = 1.0

    def build_block(self, index: int) -> nn.Module:
        """Build the layer of an index, counted from 0."""
        raise NotImplementedError

    def build_norm(self) -> RMSNorm:
        """Build a norm of hidden states [..., W]."""
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def init_weights(self) -> None:
        """Initialize all weights: normal with mean 0 and the std below, where W is the hidden size; norms are 1.

        embedding                      std 1, the scale that the norms preserve; tied: as the output projection
        query, key, value, gate, up    std W^-0.5, so that a product has the scale of its input
        attention output, down         std W^-0.5 / sqrt(2 * num_layers): the sum over all layers keeps scale 1
        output projection              std W^-0.5: initial logits have variance 1

        The usual 0.02 is W^-0.5 for W = 2500 and too small for a narrow model: after 100 steps of 1024 tokens,
        llama3-tiny reaches a loss of 5.62 with this init, 5.98 with 0.02 in the layers, 6.39 with 0.02 everywhere.
        """
        config = self.config
        std = config.hidden_size**-0.5
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=std if config.tied_embeddings else 1.0)
        for layer in self.layers.values():
            layer.init_weights(std, std / (2 * config.num_layers) ** 0.5)  # type: ignore[operator]
        if self.norm is not None:
            self.norm.init_weights()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=std)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> Masks:
        """Return the model's masks for a packed batch. Default: causal attention within each document.

        They must not depend on the values of generated tokens, which generation does not know yet.
        """
        rows, length = batch.shape
        return causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)

    def per_token_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return extra `forward` arguments, {name: [B, S]}, that can be computed from full rows only.

        inputs  arguments of `forward` for full rows

        `forward` computes them itself if they are not passed, so only a caller that shards rows has to call this
        first.
        """
        return {}

    def encode_positions(self, positions: Tensor) -> Any:
        """Return the position encoding for positions int [B, S], computed once per forward and passed to every layer.

        Default: the `Rotation` of RoPE over `rotary_dim` channels.
        """
        config = self.config
        scaling = getattr(config, "rope_scaling", None)  # not every family has RoPE scaling
        frequencies = rope_frequencies(self.rotary_dim, config.rope_theta, scaling, device=positions.device)
        return build_rotation(positions, frequencies, 1.0 if scaling is None else scaling.rotation_factor)

    @property
    def rotary_dim(self) -> int:
        """Number of channels of each head that RoPE rotates."""
        return self.config.head_dim

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
    ) -> Tensor:
        """Return logits [B, S, V]; with labels, the loss summed over tokens in float32, without storing logits.

        A pipeline stage whose `norm` is removed returns hidden states [B, S, W].

        tokens           int64 [B, S]; hidden states [B, S, W] if `embedding` is removed
        attention_masks  masks of S queries and T keys: T = S, or with a cache all tokens so far
        positions        int [B, S], position inside the document
        labels           int64 [B, S], -100 for tokens without a loss
        cache            {layer name: cache} from `new_cache`, for generation; the tokens of this call are appended
        loss_inputs      {name: [B, S]} from `loss.per_token_inputs`, if the loss needs any
        last_token_only  return only the logits of the last token of each row, [B, 1, V]
        """
        h = tokens if self.embedding is None else self.embedding(tokens)
        return self.forward_embedded(
            h, attention_masks=attention_masks, positions=positions, labels=labels, cache=cache,
            loss_inputs=loss_inputs, last_token_only=last_token_only,
        )  # fmt: skip

    def forward_embedded(
        self,
        h: Tensor,
        *,
        attention_masks: Masks,
        positions: Tensor,
        labels: Tensor | None,
        cache: dict[str, LayerCache] | None,
        loss_inputs: dict[str, Tensor] | None = None,
        last_token_only: bool = False,
    ) -> Tensor:
        """Run `forward` from embedded tokens h [B, S, W] on; families with their own embedding step call this."""
        lowered = self.lower_masks(named_masks(attention_masks), h)
        h = self.layers(h, lowered, self.encode_positions(positions), cache)
        if self.norm is None:
            return h
        return self.head(self.norm(h[:, -1:] if last_token_only else h), labels, loss_inputs)

    def hidden_state_modules(self) -> list[nn.Module]:
        """Return the modules between the embedding and the final norm: here `layers`, as one module.

        Each maps hidden states [B, S, W], its only Tensor arguments, to hidden states. Tokens interact only inside its
        `TensorParallelLayer` modules.
        """
        return [self.layers]

    @property
    def pipeline_unsupported_reason(self) -> str | None:
        """Why embedding and output head must be on one rank, and the option to change; None if they need not."""
        if self.config.tied_embeddings:
            return (
                "model.tied-embeddings is on, so embedding and output projection share one weight; expected separate "
                "weights: use --model.no-tied-embeddings"
            )
        return None

    def head(self, h: Tensor, labels: Tensor | None, loss_inputs: dict[str, Tensor] | None = None) -> Tensor:
        """Map normalized hidden states [B, S, W] to logits, or with labels to the summed loss."""
        output = self.output if self.output is not None else self.embedding
        assert output is not None, "a stage that keeps the norm also keeps the output projection"
        if labels is None:
            return self.logits(h, output.weight)
        loss = compute_loss(
            self.loss, self.token_losses, h, output.weight, labels, loss_inputs or {}, self.context_group
        )
        for router in routers_of(self).values():
            if router.aux_loss is not None:
                loss = add_gradient_of(loss, self.aux_loss_scale * router.aux_loss)
        return loss

    @cached_property
    def kernel_requirements(self) -> dict[str, Any]:
        """Features that a kernel needs to run every attention layer, as fields of `KernelRequirements`."""
        return kernel_requirements(self)

    def check_backend(
        self, device: torch.device, dtype: torch.dtype, *, training: bool, same_tokens: bool = True
    ) -> str:
        """Return the first attention backend, by name, that can run the attention layers with at least some masks.

        The arguments are those of `KernelRequirements`.

        Raises:
            ValueError: if none of those that the option selects can; the message gives the reason and those that can.
        """
        needs = KernelRequirements(
            device=device, dtype=dtype, training=training, same_tokens=same_tokens, **self.kernel_requirements
        )
        return check_backend(self.attention_backend, needs)

    def lower_masks(self, masks: Mapping[str, Any], h: Tensor) -> dict[str, Lowered]:
        """Lower each mask to the inputs of its attention kernel, once for all layers that use it."""
        dtype = autocast_dtype(h) or h.dtype
        training = torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in self.parameters()))
        lowered = {}
        for name, original in masks.items():
            mask, exchange = self.exchanges.bind(original, h.device)
            lowered[name] = lower_queries(
                mask,
                backend=self.attention_backend,
                device=h.device,
                dtype=dtype,
                training=training,
                exchange=exchange,
                segments=self.context_parallel_heads is not None,
                **self.kernel_requirements,
            )
        self.attention_kernels |= {name: f"{one.backend.name}: {one.reason}" for name, one in lowered.items()}
        return lowered

    def flops_per_token(self) -> float:
        """Return the forward and backward FLOPs per token of all matrix products, without attention scores.

        Counts the layers and the output projection, tied or not; the embedding lookup is free.
        """
        return sum(flops_per_token(module) for module in self.hidden_state_modules()) + self.output_flops_per_token()

    def output_flops_per_token(self) -> float:
        """Return the forward and backward FLOPs per token of one use of the output projection."""
        return 6.0 * self.config.hidden_size * self.config.vocab_size

    def flops_per_pair(self, mask_name: str) -> float:
        """Return the forward and backward FLOPs per visible pair of a mask, summed over the layers that use it."""
        return sum(layer.flops_per_pair() for layer in self.attention_layers_with_mask(mask_name))

    def attention_shape(self, mask_name: str) -> tuple[int, int]:
        """Return the number of attention layers that use a mask, and the key/value heads of each."""
        layers = self.attention_layers_with_mask(mask_name)
        return len(layers), layers[0].num_kv_heads() if layers else 0

    def attention_layers_with_mask(self, mask_name: str) -> list[AttentionLayer]:
        """Return the attention layers that use a mask, in order."""
        modules = (module for parent in self.hidden_state_modules() for module in parent.modules())
        layers = (module for module in modules if isinstance(module, Layer) and module.mask_name == mask_name)
        return [attention for layer in layers for attention in attention_layers(layer)]

    @cached_property
    def context_parallel_heads(self) -> int | None:
        """Number of heads that context parallelism can shard in every recurrent layer; None without such layers."""
        heads = [module.context_parallel_heads() for module in self.modules() if isinstance(module, RecurrentLayer)]
        return math.gcd(*heads) if heads else None

    def finish_step(self, add: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, Tensor]:
        """Update the routers' expert bias after an optimizer step, and return scalars for the step's metrics.

        `expert_load/LAYER` is the load of the layer's busiest expert divided by the mean load.

        add  sums a tensor over the ranks that trained on other tokens (an all-reduce)
        """
        routers = {name: router for name, router in routers_of(self).items() if router.counts is not None}
        if not routers:
            return {}
        counts = [router.counts for router in routers.values() if router.counts is not None]
        for router, count in zip(routers.values(), add(torch.cat(counts)).split([len(c) for c in counts]), strict=True):
            router.counts = count
        loads = {name: router.finish_step() for name, router in routers.items()}
        return {f"expert_load/{name}": load for name, load in loads.items() if load is not None}

    def new_cache(self) -> dict[str, LayerCache]:
        """Return empty caches for `forward`, {layer name: cache}."""
        return {name: layer.new_cache() for name, layer in self.layers.items()}  # type: ignore[operator]
