"""The decoder layer interface, and the pre-norm block that most families use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.layers import KeyValueCache, LayerCache, MoE


class Layers(nn.ModuleDict):
    """Decoder layers, applied in order; keys are the layer indices in the full model, also in a pipeline stage."""

    def forward(
        self, h: Tensor, lowered: dict[str, Lowered], encoding: Any, cache: dict[str, LayerCache] | None
    ) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        for name, layer in self.items():
            h = layer(h, lowered[str(layer.mask_name)], encoding, None if cache is None else cache[name])
        return h


class Layer(nn.Module):
    """Base class of decoder layers."""

    mask_name = "attention"
    """Name of the attention mask that the layer uses, a key of the model's masks."""

    def new_cache(self) -> LayerCache:
        """Return an empty cache for incremental generation."""
        return KeyValueCache()


class Block(Layer):
    """Pre-norm layer: h + mixer(norm(h)), then h + mlp(norm(h)).

    mixer       attention or a recurrent layer, called as mixer(x, mask, encoding, cache)
    mlp         a feed-forward layer or a mixture of experts, applied to each token independently
    build_norm  returns a new norm; called once for the mixer and once for the mlp
    mask_name   name of the mask that the mixer uses
    names       attribute names of the mixer and the mlp, as in the state dict; their norms are NAME_norm
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
        for name, module in zip(names, (mixer, mlp), strict=True):
            self.add_module(f"{name}_norm", build_norm())
            self.add_module(name, module)

    def sublayers(self) -> Any:
        """Return (mixer norm, mixer) and (mlp norm, mlp)."""
        return [(getattr(self, f"{name}_norm"), getattr(self, name)) for name in self.names]

    def init_weights(self, std: float, output_std: float) -> None:
        for norm, module in self.sublayers():
            norm.init_weights()
            module.init_weights(std, output_std)

    def forward(self, h: Tensor, mask: Lowered, encoding: Any, cache: LayerCache | None = None) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        (mixer_norm, mixer), (mlp_norm, mlp) = self.sublayers()
        h = h + mixer(mixer_norm(h), mask, encoding, cache)
        x = mlp_norm(h)
        return h + (mlp(x, mask.visible) if isinstance(mlp, MoE) else mlp(x))

    def new_cache(self) -> LayerCache:
        return getattr(self, self.names[0]).new_cache()
