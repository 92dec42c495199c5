"""A vision encoder for images of any size, several to a row: SigLIP 2's NaFlex (arXiv 2502.14786, section 2.4.2).

An image is cut into patches, and a row holds the patches of its images one image after the other, each from left to
right and from top to bottom. `patch_grid` says how many there are: int [B, N, 2], the height and width of each image
in patches, 0 where a row has fewer than N images. An image is a document of patches; what stands behind the last one
is padding.

Shape letters here: P patches of a row, N images of a row, C channels of a patch's feature, W width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.config.renamed import RenamedFields
from sightline.layers.attention import GroupedQueryAttention


@dataclass(frozen=True, kw_only=True)
class VisionConfig(RenamedFields):
    """The sizes of a SigLIP 2 encoder."""

    hidden_size: int = 128
    """Size of a patch's hidden state."""
    num_layers: int = 3
    """Blocks of attention and feed-forward."""
    num_heads: int = 4
    """Heads of its attention."""
    intermediate_size: int = 512
    """Inner width of its feed-forward layer."""
    patch_size: int = 8
    """Pixels a side of a patch."""
    num_channels: int = 3
    """Colours of a pixel."""
    position_grid_size: int = 8
    """Learned positions a side; they are stretched or shrunk to the size of each image."""
    norm_eps: float = 1e-6
    """Added to the variance in its norms."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "patch_size", "num_channels")
        for name in (*sizes, "position_grid_size", "norm_eps"):
            if getattr(self, name) <= 0:
                option = name.replace("_", "-")
                raise ValueError(f"model.vision.{option} must be greater than 0, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.vision.hidden-size {self.hidden_size} is not divisible by model.vision.num-heads {self.num_heads}; change one of "
                "them"
            )

    @property
    def patch_channels(self) -> int:
        """Numbers of a patch."""
        return self.patch_size**2 * self.num_channels


class PatchPositions(NamedTuple):
    """Where each patch of a row lies: int64 [B, P] each, made once per forward.

    image          number of its image in the row, -1 for padding
    first          index in the row of its image's first patch; for padding, of the first padding patch
    row, column    its place in the image, from 0
    height, width  the image's size in patches; padding counts as an image of one line
    """

    image: Tensor
    first: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def locate_patches(patch_grid: Tensor, length: int) -> PatchPositions:
    """patch_grid int [B, N, 2], length P -> PatchPositions. Nothing waits for the device."""
    grid = patch_grid.long()
    # The padding is one more image: a line of all the patches there could be.
    rest = grid.new_ones(len(grid), 1, 2)
    rest[..., 1] = length
    grid = torch.cat([grid, rest], dim=1)
    sizes = grid.prod(dim=2)
    ends = sizes.cumsum(dim=1)
    index = torch.arange(length, device=grid.device).expand(len(grid), length).contiguous()
    image = torch.searchsorted(ends, index, right=True)  # the first image that ends behind the patch
    first = (ends - sizes).gather(1, image)
    height, width = grid[..., 0].gather(1, image), grid[..., 1].gather(1, image)
    image = image.masked_fill(image == patch_grid.shape[1], -1)
    return PatchPositions(image, first, (index - first) // width, (index - first) % width, height, width)


def interpolation_weights(places: PatchPositions, side: int) -> Tensor:
    """How much of each learned position every patch takes: float32 [B, P, side * side], a patch's sum is 1.

    The learned positions are a grid of side x side, laid over each image whatever its size. This is the antialiased
    bilinear interpolation of `torch.nn.functional.interpolate(..., align_corners=False, antialias=True)`, written as
    the linear map that it is, so that images of many sizes take one matrix product.
    """
    down = _axis_weights(places.row, places.height, side)
    across = _axis_weights(places.column, places.width, side)
    return (down[..., :, None] * across[..., None, :]).flatten(2)


def _axis_weights(place: Tensor, size: Tensor, side: int) -> Tensor:
    """Weights of `side` learned points along one axis for the patch at `place` of `size`: float32 [B, P, side]."""
    step = side / size.float()  # learned points a patch
    centre = (place + 0.5) * step
    points = torch.arange(side, device=place.device) + 0.5
    # A triangle around the centre that reaches one point far, or one patch where patches are wider than that.
    weights = (1 - (points - centre[..., None]).abs() / step.clamp(min=1)[..., None]).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


class VisionBlock(nn.Module):
    """One layer: h + attention(norm(h)), then h + down(gelu(up(norm(h))))."""

    def __init__(self, width: int, heads: int, ffn: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, norm_eps)
        self.attention = GroupedQueryAttention(width, heads, heads, width // heads, bias=True)
        self.mlp_norm = nn.LayerNorm(width, norm_eps)
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)

    def forward(self, h: Tensor, mask: Lowered) -> Tensor:
        """h [B, P, C] -> [B, P, C]."""
        h = h + self.attention(self.attention_norm(h), mask, None)  # positions came with the embedding
        return h + self.down(F.gelu(self.up(self.mlp_norm(h)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """Patches to features: a linear embedding, positions fitted to each image's size, layers, a norm."""

    MATRICES: ClassVar = ()  # of its own it has only the learned positions

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, heads, ffn, norm_eps = config.hidden_size, config.num_heads, config.intermediate_size, config.norm_eps
        self.side = config.position_grid_size
        self.embedding = nn.Linear(config.patch_channels, width)
        self.positions = nn.Parameter(torch.empty(config.position_grid_size**2, width))
        self.layers = nn.ModuleDict(
            {str(i): VisionBlock(width, heads, ffn, norm_eps) for i in range(config.num_layers)}
        )
        self.norm = nn.LayerNorm(width, norm_eps)

    def init_weights(self) -> None:
        """Matrices normal with std fan_in^-0.5, what adds to the residual stream over sqrt(2 layers); positions std
        width^-0.5; norms 1; biases 0."""
        init_linears(self)
        nn.init.normal_(self.positions, std=self.positions.shape[1] ** -0.5)
        with torch.no_grad():
            for layer in self.layers.values():
                for linear in (layer.attention.output, layer.down):  # type: ignore[union-attr]
                    linear.weight /= (2 * len(self.layers)) ** 0.5  # type: ignore[union-attr]

    def forward(self, patches: Tensor, places: PatchPositions, mask: Lowered) -> Tensor:
        """patches [B, P, patch_channels] -> features [B, P, C]. In the mask a patch sees all of its own image."""
        h = self.embedding(patches.to(self.embedding.weight.dtype))
        h = h + interpolation_weights(places, self.side).to(h.dtype) @ self.positions
        for layer in self.layers.values():
            h = layer(h, mask)
        return self.norm(h)


class Projector(nn.Module):
    """Features of the encoder to tokens of the decoder: merge x merge neighbours become one token."""

    def __init__(self, *, channels: int, hidden: int, width: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.norm = nn.LayerNorm(channels * merge**2)
        self.up = nn.Linear(channels * merge**2, hidden)
        self.down = nn.Linear(hidden, width)

    def init_weights(self) -> None:
        init_linears(self)

    def forward(self, features: Tensor, places: PatchPositions) -> Tensor:
        """features [B, P, C] -> [B, P / merge^2, W], image by image, from left to right and from top to bottom.

        P and the height and width of every image must be multiples of `merge`.
        """
        order = merge_order(places, self.merge)
        neighbours = features.gather(1, order[..., None].expand_as(features)).unflatten(1, (-1, self.merge**2))
        return self.down(F.gelu(self.up(self.norm(neighbours.flatten(2)))))


def merge_order(places: PatchPositions, merge: int) -> Tensor:
    """The patches so ordered that the merge x merge of one token stand together: indices int64 [B, P].

    an image of 2 x 4 patches, merge 2:  0 1 2 3
                                         4 5 6 7   ->  0 1 4 5   2 3 6 7
    """
    index = torch.arange(places.image.shape[1], device=places.image.device).expand(places.image.shape)
    token = places.row // merge * (places.width // merge) + places.column // merge
    inside = places.row % merge * merge + places.column % merge
    goal = torch.where(places.image < 0, index, places.first + token * merge**2 + inside)
    return torch.empty_like(goal).scatter_(1, goal, index)


def init_linears(module: nn.Module) -> None:
    """Every linear layer normal with std fan_in^-0.5 and without bias, every norm as it leaves its input."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
