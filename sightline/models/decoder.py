"""What every decoder shares, so that a family's file says only what is its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered, lower
from sightline.batch import Batch
from sightline.layers import KeyValueCache, RMSNorm, linear_cross_entropy
from sightline.masks import AttentionMask

Masks = AttentionMask | dict[str, AttentionMask]
"""One mask for all layers, or several by the name that each layer knows its own by."""


class DecoderConfig(Protocol):
    """What a decoder needs to know of its config; a family's has more."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied_embeddings(self) -> bool: ...


class Decoder(nn.Module):
    """Embedding, layers, norm, output, and the loop over the layers.

    A family builds its layers, each an `nn.Module` called as `layer(h, mask, encoding, cache)`, and gives
    `get_attention_masks`, `encode_positions`, `init_weights` and the two counts of FLOPs. A layer that uses a mask of
    its own says which in `mask_name`.

    The weights are undefined until `init_weights` or a checkpoint fills them: see `build_model`.

    A pipeline stage is the same model with parts removed: layers deleted from `layers`, `embedding` set to None where
    hidden states come in, `norm` and `output` where hidden states go out. With tied embeddings there is no `output`:
    the embedding serves.
    """

    def __init__(self, config: DecoderConfig, layers: Iterable[nn.Module], *, attention_backend: str = "auto") -> None:
        super().__init__()
        self.attention_backend = attention_backend
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})
        self.norm: RMSNorm | None = RMSNorm(config.width, config.norm_eps)
        self.output: nn.Linear | None = None
        if not config.tied_embeddings:
            self.output = nn.Linear(config.width, config.vocab_size, bias=False)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> Masks:
        """What each token of the batch may see, from the facts the packer states."""
        raise NotImplementedError

    def encode_positions(self, positions: Tensor) -> Any:
        """What the layers need to know of positions int [B, S], made once per forward: a Rotation, or several."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_masks: Masks,
        positions: Tensor,
        labels: Tensor | None = None,
        cache: dict[str, KeyValueCache] | None = None,
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
        encoding = self.encode_positions(positions)
        lowered = self.lower_masks(attention_masks, h)

        for name, layer in self.layers.items():
            h = layer(h, lowered[str(layer.mask_name)], encoding, None if cache is None else cache[name])

        if self.norm is None:
            return h
        return self.head(self.norm(h), labels)

    def head(self, h: Tensor, labels: Tensor | None) -> Tensor:
        """From the normed hidden states [B, S, W] to logits, or with labels to the sum of the token losses."""
        output = self.output if self.output is not None else self.embedding
        assert output is not None, "a stage that keeps the norm also keeps the output projection"
        if labels is None:
            return F.linear(h, output.weight)
        return linear_cross_entropy(h.flatten(0, 1), output.weight, labels.flatten())

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

    def new_cache(self) -> dict[str, KeyValueCache]:
        """An empty cache for `forward`, by layer name."""
        return {name: layer.new_cache() for name, layer in self.layers.items()}  # type: ignore[operator]


class Layer(nn.Module):
    """A layer of a decoder."""

    mask_name = "attention"
    """Which of the model's masks its attention uses."""

    def new_cache(self) -> KeyValueCache:
        """What this layer remembers of a text while it is generated."""
        return KeyValueCache()
