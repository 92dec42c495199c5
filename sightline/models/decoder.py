"""What every decoder shares, so that a family's file says only what is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered, lower
from sightline.batch import Batch
from sightline.layers import (
    KeyValueCache,
    LayerCache,
    MoE,
    RMSNorm,
    build_rotation,
    linear_cross_entropy,
    rope_frequencies,
    routers_of,
    with_gradient_of,
)
from sightline.masks import AttentionMask, causal, document
from sightline.models.checks import check_positive

Masks = AttentionMask | dict[str, AttentionMask]
"""One mask for all layers, or several by the name that each layer knows its own by."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes that every decoder has. A family's config adds its own, and states anew what differs."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    width: int = 256
    """Size of a token's hidden state."""
    layers: int = 6
    """Blocks of attention and feed-forward."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "layers", "rope_theta", "norm_eps")


class Decoder(nn.Module):
    """Embedding, layers, norm, output, and the loop over the layers.

    A family gives `build_block`, whose layers are called as `layer(h, mask, encoding, cache)` and say in `mask_name`
    which mask they use, and the two counts of FLOPs. It overrides `get_attention_masks`, `encode_positions` and
    `build_norm` where it differs.

    The weights are undefined until `init_weights` or a checkpoint fills them: see `build_model`.

    A pipeline stage is the same model with parts removed: layers deleted from `layers`, `embedding` set to None where
    hidden states come in, `norm` and `output` where hidden states go out. With tied embeddings there is no `output`:
    the embedding serves.
    """

    unspoken: tuple[int, ...] = ()
    """Tokens that stand for something else than text, and are never generated."""
    row_heads: int | None = None
    """Heads of the layers that walk along whole rows, as a recurrence does: processes that share rows deal them out.
    None where there are no such layers."""

    def __init__(self, config: Any, *, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.width)
        self.layers = Layers({str(index): self.build_block(index) for index in range(config.layers)})
        self.norm: RMSNorm | None = self.build_norm()
        self.output: nn.Linear | None = None
        if not config.tied_embeddings:
            self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        # Called with the projection's weight. Where processes share the vocabulary, others take the place of these.
        self.logits: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.token_losses: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_cross_entropy

    def build_block(self, index: int) -> nn.Module:
        """Layer number `index`, counted from 0."""
        raise NotImplementedError

    def build_norm(self) -> RMSNorm:
        """A norm of hidden states [..., W]."""
        return RMSNorm(self.config.width, self.config.norm_eps)

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
        std = config.width**-0.5
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=std if config.tied_embeddings else 1.0)
        for layer in self.layers.values():
            layer.init_weights(std, std / (2 * config.layers) ** 0.5)  # type: ignore[operator]
        if self.norm is not None:
            self.norm.init_weights()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=std)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> Masks:
        """What each token of the batch may see, from the facts the packer states: here itself and what comes before it
        in its own document."""
        rows, length = batch.shape
        return causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)

    def token_facts(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What `forward` has to know of each token and can tell from whole rows only: [B, S] each, by name.

        inputs: what `forward` takes, of whole rows. It takes these facts too, and finds them itself without them: only
        who cuts the rows before has to ask.
        """
        return {}

    def encode_positions(self, positions: Tensor) -> Any:
        """What the layers need to know of positions int [B, S], made once per forward: here a Rotation of `rotary_size`
        channels."""
        config = self.config
        scaling = getattr(config, "rope_scaling", None)  # not every family can be stretched
        frequencies = rope_frequencies(self.rotary_size, config.rope_theta, scaling, device=positions.device)
        return build_rotation(positions, frequencies, 1.0 if scaling is None else scaling.rotation_factor)

    @property
    def rotary_size(self) -> int:
        """Channels of a head that RoPE rotates."""
        return self.config.head_size

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_masks: Masks,
        positions: Tensor,
        labels: Tensor | None = None,
        cache: dict[str, LayerCache] | None = None,
    ) -> Tensor:
        """Logits [B, S, V], or with labels the float32 sum of the token losses, for which no logits are kept.

        tokens           int64 [B, S]; hidden states [B, S, W] where `embedding` is removed
        attention_masks  what each of the S tokens sees of the T keys: of these tokens, or with a cache of all so far
        positions        int [B, S], position inside the document
        labels           int64 [B, S], -100 where no loss is wanted
        cache            by layer name, from `new_cache`, for generation; this call's tokens are appended
        Where `norm` is removed, the hidden states [B, S, W] after the last layer.
        """
        h = tokens if self.embedding is None else self.embedding(tokens)
        return self.decode(h, attention_masks=attention_masks, positions=positions, labels=labels, cache=cache)

    def decode(
        self,
        h: Tensor,
        *,
        attention_masks: Masks,
        positions: Tensor,
        labels: Tensor | None,
        cache: dict[str, LayerCache] | None,
    ) -> Tensor:
        """`forward` from the embedded tokens h [B, S, W] on, for families that embed in a way of their own."""
        h = self.layers(h, self.lower_masks(attention_masks, h), self.encode_positions(positions), cache)
        if self.norm is None:
            return h
        return self.head(self.norm(h), labels)

    def stacks(self) -> list[nn.Module]:
        """The modules that hold all there is between the embedding and the last norm: here the layers, as one.

        Each takes hidden states [B, S, W] as its only Tensor arguments and returns them; what it does to a token
        depends on other tokens only inside `Divisible` layers.
        """
        return [self.layers]

    def head(self, h: Tensor, labels: Tensor | None) -> Tensor:
        """From the normed hidden states [B, S, W] to logits, or with labels to the sum of the token losses."""
        output = self.output if self.output is not None else self.embedding
        assert output is not None, "a stage that keeps the norm also keeps the output projection"
        if labels is None:
            return self.logits(h, output.weight)
        loss = self.token_losses(h.flatten(0, 1), output.weight, labels.flatten())
        for router in routers_of(self).values():
            if router.auxiliary_loss is not None:
                loss = with_gradient_of(loss, router.auxiliary_loss)
        return loss

    def lower_masks(self, masks: Masks, h: Tensor) -> dict[str, Lowered]:
        """Each mask in its kernel's form, made once for all the layers that use it."""
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        named = masks if isinstance(masks, dict) else {"attention": masks}
        return {
            name: lower(mask, backend=self.attention_backend, device=h.device, dtype=dtype, training=training)
            for name, mask in named.items()
        }

    def flops_per_pair(self, mask_name: str) -> float:
        """Forward and backward FLOPs of one visible pair of a mask, over all layers that use it."""
        flops = self.attention_flops_per_pair()
        return flops[mask_name] if isinstance(flops, dict) else flops

    def attention_flops_per_pair(self) -> float | dict[str, float]:
        """The same for the only mask, or by mask name."""
        raise NotImplementedError

    def attention_shape(self, mask_name: str) -> tuple[int, int]:
        """How many layers attend under a mask, and how many head groups each of them has."""
        return sum(layer.mask_name == mask_name for layer in self.layers.values()), self.config.kv_heads

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


class Layers(nn.ModuleDict):
    """The layers, by their number in the whole model, one after the other."""

    def forward(
        self, h: Tensor, lowered: dict[str, Lowered], encoding: Any, cache: dict[str, LayerCache] | None
    ) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        for name, layer in self.items():
            h = layer(h, lowered[str(layer.mask_name)], encoding, None if cache is None else cache[name])
        return h


class Layer(nn.Module):
    """A layer of a decoder."""

    mask_name = "attention"
    """Which of the model's masks its attention uses."""

    def new_cache(self) -> LayerCache:
        """What this layer remembers of a text while it is generated."""
        return KeyValueCache()


class Block(Layer):
    """A pre-norm layer: h + mixer(norm(h)), then h + mlp(norm(h)).

    mixer       attention or a recurrent layer, called as mixer(x, mask, encoding, cache)
    mlp         a feed-forward layer or a mixture of experts, applied to each token by itself
    build_norm  builds each of the two norms
    mask_name   the model's mask that the mixer uses
    names       names of the mixer and the mlp in the state dict; their norms are NAME_norm
    """

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module,
        build_norm: Callable[[], nn.Module],
        *,
        mask_name: str = "attention",
        names: tuple[str, str] = ("attention", "mlp"),
    ) -> None:
        super().__init__()
        self.mask_name = mask_name
        self.names = names
        for name, part in zip(names, (mixer, mlp), strict=True):
            self.add_module(f"{name}_norm", build_norm())
            self.add_module(name, part)

    def halves(self) -> Any:
        """(norm, mixer) and (norm, mlp)."""
        return [(getattr(self, f"{name}_norm"), getattr(self, name)) for name in self.names]

    def init_weights(self, std: float, output_std: float) -> None:
        for norm, part in self.halves():
            norm.init_weights()
            part.init_weights(std, output_std)

    def forward(self, h: Tensor, mask: Lowered, encoding: Any, cache: LayerCache | None = None) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        (mixer_norm, mixer), (mlp_norm, mlp) = self.halves()
        h = h + mixer(mixer_norm(h), mask, encoding, cache)
        x = mlp_norm(h)
        return h + (mlp(x, mask.mask.seeing()) if isinstance(mlp, MoE) else mlp(x))

    def new_cache(self) -> LayerCache:
        return getattr(self, self.names[0]).new_cache()
