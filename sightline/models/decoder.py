"""What every decoder shares, so that a family's file says only what is its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sightline.attention import Exchanges, KernelRequirements, LocalExchanges, Lowered, check_backend, lower
from sightline.batch import Batch, ImageSizes
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
    attention_layers,
    build_rotation,
    compute_loss,
    flops_per_token,
    linear_cross_entropy,
    rope_frequencies,
    routers_of,
    with_gradient_of,
)
from sightline.layers.precision import autocast_dtype
from sightline.masks import AttentionMask, causal, document, named_masks
from sightline.models.block import Layer, Layers
from sightline.models.checks import check_positive

Masks = AttentionMask | Mapping[str, AttentionMask]
"""One mask for all layers, or several by the name that each layer knows its own by. What users may pass; the package
passes masks by name."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(RenamedFields):
    """The sizes that every decoder has. A family's config adds its own, and states anew what differs."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    hidden_size: int = 256
    """Size of a token's hidden state."""
    num_layers: int = 6
    """Blocks of attention and feed-forward."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "hidden_size", "num_layers", "rope_theta", "norm_eps")


class Decoder(nn.Module):
    """Embedding, layers, norm, output, and the loop over the layers.

    A family gives `build_block`, whose layers are called as `layer(h, mask, encoding, cache)` and say in `mask_name`
    which mask they use. It overrides `get_attention_masks`, `encode_positions` and `build_norm` where it differs.

    The weights are undefined until `init_weights` or a checkpoint fills them: see `build_model`.

    A pipeline stage is the same model with parts removed: layers deleted from `layers`, `embedding` set to None where
    hidden states come in, `norm` and `output` where hidden states go out. With tied embeddings there is no `output`:
    the embedding serves.
    """

    suppress_tokens: tuple[int, ...] = ()
    """Tokens that stand for something else than text, and are never generated."""
    image_sizes: ImageSizes | None = None
    """How images stand in the model's rows; None where it reads text alone."""

    def __init__(self, config: Any, *, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.exchanges: Exchanges = LocalExchanges()  # context parallelism sets its own
        self.attention_kernels: dict[
            str, str
        ] = {}  # by mask, the kernel that the last forward used and why, for the log
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers({str(index): self.build_block(index) for index in range(config.num_layers)})
        self.norm: RMSNorm | None = self.build_norm()
        self.output: nn.Linear | None = None
        if not config.tied_embeddings:
            self.output = OutputProjection(config.hidden_size, config.vocab_size, bias=False)
        # Of a layer of the whole model, also for a stage that has none of them; 0 where all layers are dense.
        self.num_experts = max(
            (len(part.gate) for part in self.layers.modules() if isinstance(part, Experts)), default=0
        )
        # Called with the projection's weight. Where processes share the vocabulary, others take the place of these.
        self.logits: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.token_losses: Callable[..., Tensor] = linear_cross_entropy
        self.loss: Loss = LOSSES[0]
        self.context_group: ProcessGroup | None = None  # the processes that share the rows, where there are several
        # Factor of the auxiliary losses, which are sums over tokens as the default loss is: where a step divides by
        # another weight than its valid tokens, the weight of one token. A training step sets it.
        self.aux_loss_scale = 1.0

    def build_block(self, index: int) -> nn.Module:
        """Layer number `index`, counted from 0."""
        raise NotImplementedError

    def build_norm(self) -> RMSNorm:
        """A norm of hidden states [..., W]."""
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def init_weights(self) -> None:
        """Draw fresh weights, all of them normal around 0, in the order of the layers.

        embedding                      std 1, the size at which the norms leave it as it is; tied: as output
        query, key, value, gate, up    std width^-0.5, so that every product keeps the size of its input
        attention's output, down       std width^-0.5 / sqrt(2 layers): the sum over all layers stays of size 1
        norms                          1, not drawn
        output                         std width^-0.5: logits begin with a variance of 1

        The usual 0.02 is width^-0.5 at a width of 2500, and too little for a narrow model: after 100 steps of 1024
        tokens llama3-tiny stands at a loss of 5.62 as drawn here, 5.98 with 0.02 in the layers, 6.39 with 0.02
        everywhere.
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
        """What each token of the batch may see, from the facts the packer states: here itself and what comes before it
        in its own document."""
        rows, length = batch.shape
        return causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)

    def per_token_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What `forward` has to know of each token and can tell from whole rows only: [B, S] each, by name.

        inputs: what `forward` takes, of whole rows. It takes these facts too, and finds them itself without them: only
        who cuts the rows before has to ask.
        """
        return {}

    def encode_positions(self, positions: Tensor) -> Any:
        """What the layers need to know of positions int [B, S], made once per forward: here a Rotation of `rotary_dim`
        channels."""
        config = self.config
        scaling = getattr(config, "rope_scaling", None)  # not every family can be stretched
        frequencies = rope_frequencies(self.rotary_dim, config.rope_theta, scaling, device=positions.device)
        return build_rotation(positions, frequencies, 1.0 if scaling is None else scaling.rotation_factor)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
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
    ) -> Tensor:
        """Logits [B, S, V], or with labels the float32 sum of the loss, for which no logits are kept.

        tokens           int64 [B, S]; hidden states [B, S, W] where `embedding` is removed
        attention_masks  what each of the S tokens sees of the T keys: of these tokens, or with a cache of all so far
        positions        int [B, S], position inside the document
        labels           int64 [B, S], -100 where no loss is wanted
        cache            by layer name, from `new_cache`, for generation; this call's tokens are appended
        loss_inputs       [B, S] by name, from `loss.per_token_inputs`, where the loss needs any
        Where `norm` is removed, the hidden states [B, S, W] after the last layer.
        """
        h = tokens if self.embedding is None else self.embedding(tokens)
        return self.forward_embedded(
            h,
            attention_masks=attention_masks,
            positions=positions,
            labels=labels,
            cache=cache,
            loss_inputs=loss_inputs,
        )

    def forward_embedded(
        self,
        h: Tensor,
        *,
        attention_masks: Masks,
        positions: Tensor,
        labels: Tensor | None,
        cache: dict[str, LayerCache] | None,
        loss_inputs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`forward` from the embedded tokens h [B, S, W] on, for families that embed in a way of their own."""
        lowered = self.lower_masks(named_masks(attention_masks), h)
        h = self.layers(h, lowered, self.encode_positions(positions), cache)
        if self.norm is None:
            return h
        return self.head(self.norm(h), labels, loss_inputs)

    def hidden_state_modules(self) -> list[nn.Module]:
        """The modules that hold all there is between the embedding and the last norm: here the layers, as one.

        Each takes hidden states [B, S, W] as its only Tensor arguments and returns them; what it does to a token
        depends on other tokens only inside `TensorParallelLayer` layers.
        """
        return [self.layers]

    @property
    def pipeline_unsupported_reason(self) -> str | None:
        """Why the embedding has to be where the head is, and the option that would part them; None if it has not."""
        if self.config.tied_embeddings:
            return (
                "model.tied-embeddings is on, so the output projection is the embedding; expected a weight for each: "
                "use --model.no-tied-embeddings"
            )
        return None

    def head(self, h: Tensor, labels: Tensor | None, loss_inputs: dict[str, Tensor] | None = None) -> Tensor:
        """From the normed hidden states [B, S, W] to logits, or with labels to the loss's sum."""
        output = self.output if self.output is not None else self.embedding
        assert output is not None, "a stage that keeps the norm also keeps the output projection"
        if labels is None:
            return self.logits(h, output.weight)
        loss = compute_loss(
            self.loss, self.token_losses, h, output.weight, labels, loss_inputs or {}, self.context_group
        )
        for router in routers_of(self).values():
            if router.aux_loss is not None:
                loss = with_gradient_of(loss, self.aux_loss_scale * router.aux_loss)
        return loss

    @cached_property
    def kernel_requirements(self) -> dict[str, Any]:
        """What a kernel must offer to serve all attention layers: fields of `KernelRequirements`."""
        needs = [layer.kernel_requirements() for layer in attention_layers(self)]
        return {
            "sinks": any(own["sinks"] for own in needs),
            "head_dim": max((own["head_dim"] for own in needs), default=None),
        }

    def check_backend(self, device: torch.device, dtype: torch.dtype, *, training: bool) -> None:
        """Refuse an attention backend that cannot serve the layers, whatever the masks will be.

        Raises:
            ValueError: with the reason and the backends that can.
        """
        needs = KernelRequirements(device=device, dtype=dtype, training=training, **self.kernel_requirements)
        check_backend(self.attention_backend, needs)

    def lower_masks(self, masks: Mapping[str, Any], h: Tensor) -> dict[str, Lowered]:
        """Each mask as the layers take it, made once for all the layers that use it."""
        dtype = autocast_dtype(h) or h.dtype
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        lowered = {}
        for name, given in masks.items():
            mask, exchange = self.exchanges.bind(given, h.device)
            lowered[name] = lower(
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
        """Forward and backward FLOPs of one token in matrix products, attention scores left out.

        Those of the layers and of the output projection, also where it is the embedding.
        """
        return sum(flops_per_token(stack) for stack in self.hidden_state_modules()) + self.output_flops_per_token()

    def output_flops_per_token(self) -> float:
        """Of one use of the output projection."""
        return 6.0 * self.config.hidden_size * self.config.vocab_size

    def flops_per_pair(self, mask_name: str) -> float:
        """Forward and backward FLOPs of one visible pair of a mask, over all layers that use it."""
        return sum(layer.flops_per_pair() for layer in self.attention_layers_with_mask(mask_name))

    def attention_shape(self, mask_name: str) -> tuple[int, int]:
        """How many layers attend under a mask, and how many head groups each of them has."""
        layers = self.attention_layers_with_mask(mask_name)
        return len(layers), layers[0].num_kv_heads() if layers else 0

    def attention_layers_with_mask(self, mask_name: str) -> list[AttentionLayer]:
        """The attention layers that use a mask, in order."""
        layers = (part for stack in self.hidden_state_modules() for part in stack.modules() if isinstance(part, Layer))
        return [found for layer in layers if layer.mask_name == mask_name for found in attention_layers(layer)]

    @cached_property
    def context_parallel_heads(self) -> int | None:
        """Heads that processes which share rows can deal out in each recurrent layer; None where there is no such
        layer."""
        heads = [part.context_parallel_heads() for part in self.modules() if isinstance(part, RecurrentLayer)]
        return math.gcd(*heads) if heads else None

    def finish_step(self, add: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, Tensor]:
        """What is left to do when the optimizer has stepped; returns scalars worth a place among the step's metrics.

        Here it is the routers' balance: `expert_load/LAYER` is the load of the layer's busiest expert as a multiple of
        the mean load.

        add  sums a tensor over the processes that have trained on other tokens
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
        """An empty cache for `forward`, by layer name."""
        return {name: layer.new_cache() for name, layer in self.layers.items()}  # type: ignore[operator]
