"""The attention layer: projections, rotation and `attend`."""

from __future__ import annotations

from torch import Tensor, nn

from sightline.attention import Lowered, attend
from sightline.layers.cache import KeyValueCache
from sightline.layers.rope import Rotation, rotate
from sightline.masks import AttentionMask


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (arXiv 2305.13245); query head h reads key/value head h // (H / G)."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.query = nn.Linear(width, heads * head_size, bias=False)
        self.key = nn.Linear(width, kv_heads * head_size, bias=False)
        self.value = nn.Linear(width, kv_heads * head_size, bias=False)
        self.output = nn.Linear(heads * head_size, width, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.output.weight, std=output_std)

    def forward(
        self, x: Tensor, mask: AttentionMask | Lowered, rotation: Rotation, cache: KeyValueCache | None = None
    ) -> Tensor:
        """x [B, S, W] -> [B, S, W]. With a cache the mask's queries are these S tokens, its keys all tokens so far."""
        q_BSHD = rotate(self._heads(self.query(x)), rotation)
        k_BSGD = rotate(self._heads(self.key(x)), rotation)
        v_BSGD = self._heads(self.value(x))
        # The kernels take strided views, and attend's output lies in memory as [B, S, H, D]: nothing here copies.
        q, k, v = (t.transpose(1, 2) for t in (q_BSHD, k_BSGD, v_BSGD))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.output(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, S, heads, D], for as many heads as this process holds."""
        return x.unflatten(-1, (-1, self.head_size))
