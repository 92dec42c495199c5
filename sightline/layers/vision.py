"""Vision encoder for packed images of any size: SigLIP 2 NaFlex (arXiv 2502.14786, section 2.4.2).

Each image is split into patches. A row contains the patches of one or more images, one image after another, each in
row-major order, then padding. `patch_grid` int [B, N, 2] gives the height and width of each image in patches, 0 if a
row has fewer than N images. In the attention mask, each image is a document of patches.

Shape letters here: P patches of a row, N images of a row, C hidden size of the encoder, W hidden size of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.config.checks import check_values
from sightline.config.renamed import RenamedFields
from sightline.layers.attention import GroupedQueryAttention


@dataclass(frozen=True, kw_only=True)
class VisionConfig(RenamedFields):
    """Sizes of a SigLIP 2 encoder."""

    hidden_size: int = 128
    """Size of the hidden states."""
    num_layers: int = 3
    """Number of layers, each with attention and a feed-forward network."""
    num_heads: int = 4
    """Number of attention heads."""
    intermediate_size: int = 512
    """Hidden size of the feed-forward networks."""
    patch_size: int = 8
    """Side length of a patch in pixels."""
    num_channels: int = 3
    """Color channels of a pixel."""
    position_grid_size: int = 8
    """Side length of the grid of learned position embeddings, which is interpolated to the size of each image."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms."""

    def __post_init__(self) -> None:
        check_values(self, "model.vision")
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "patch_size", "num_channels")
        for name in (*sizes, "position_grid_size", "norm_eps"):
            if getattr(self, name) <= 0:
                option = name.replace("_", "-")
                raise ValueError(f"model.vision.{option} must be greater than 0, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.vision.hidden-size {self.hidden_size} is not divisible by model.vision.num-heads "
                f"{self.num_heads}; change one of them"
            )

    @property
    def patch_channels(self) -> int:
        """Values per patch: pixels times color channels."""
        return self.patch_size**2 * self.num_channels


class PatchPositions(NamedTuple):
    """Position of each patch in its row and image: int64 [B, P] each, computed once per forward.

    image          index of the image in the row, -1 for padding
    first          index in the row of the image's first patch; for padding, of the first padding patch
    row, column    position in the image, from 0
    height, width  size of the image in patches; padding counts as an image with a single row of patches
    """

    image: Tensor
    first: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def locate_patches(patch_grid: Tensor, length: int) -> PatchPositions:
    """patch_grid int [B, N, 2], length P -> PatchPositions. Does not synchronize with the device."""
    grid = patch_grid.long()
    # Padding is one more image, 1 patch high and wide enough for the full row.
    padding = grid.new_ones(len(grid), 1, 2)
    padding[..., 1] = length
    grid = torch.cat([grid, padding], dim=1)
    counts = grid.prod(dim=2)
    ends = counts.cumsum(dim=1)
    index = torch.arange(length, device=grid.device).expand(len(grid), length).contiguous()
    image = torch.searchsorted(ends, index, right=True)  # the first image that ends after the patch
    first = (ends - counts).gather(1, image)
    height, width = grid[..., 0].gather(1, image), grid[..., 1].gather(1, image)
    image = image.masked_fill(image == patch_grid.shape[1], -1)
    return PatchPositions(image, first, (index - first) // width, (index - first) % width, height, width)


def interpolation_weights(positions: PatchPositions, grid_size: int) -> Tensor:
    """Return the weight of each learned position for each patch: float32 [B, P, grid_size^2]; each patch sums to 1.

    The learned positions form a grid of grid_size x grid_size that is resized to each image. The weights are those of
    `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False, antialias=True)` as a linear map, so
    that one matrix product serves images of different sizes.
    """
    vertical = _axis_weights(positions.row, positions.height, grid_size)
    horizontal = _axis_weights(positions.column, positions.width, grid_size)
    return (vertical[..., :, None] * horizontal[..., None, :]).flatten(2)


def _axis_weights(index: Tensor, size: Tensor, grid_size: int) -> Tensor:
    """Return weights of the grid points along one axis for patch `index` of `size`: float32 [B, P, grid_size]."""
    step = grid_size / size.float()  # grid points per patch
    center = (index + 0.5) * step
    points = torch.arange(grid_size, device=index.device) + 0.5
    # Triangle filter around the center, with a radius of one grid point or one patch, whichever is larger.
    weights = (1 - (points - center[..., None]).abs() / step.clamp(min=1)[..., None]).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


class VisionBlock(nn.Module):
    """Transformer layer: h + attention(norm(h)), then h + down(gelu(up(norm(h))))."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, norm_eps: float) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        self.attention_norm = nn.LayerNorm(hidden_size, norm_eps)
        self.attention = GroupedQueryAttention(hidden_size, num_heads, num_heads, head_dim, bias=True)
        self.mlp_norm = nn.LayerNorm(hidden_size, norm_eps)
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, h: Tensor, mask: Lowered) -> Tensor:
        """h [B, P, C] -> [B, P, C]."""
        h = h + self.attention(self.attention_norm(h), mask, None)  # no RoPE: positions were added to the embeddings
        return h + self.down(F.gelu(self.up(self.mlp_norm(h)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """Patches to features: linear embedding, learned positions interpolated to the image size, layers, final norm."""

    MATRICES: ClassVar = ()  # the learned positions are the only parameter outside the submodules

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden_size, norm_eps = config.hidden_size, config.norm_eps
        self.grid_size = config.position_grid_size
        self.embedding = nn.Linear(config.patch_channels, hidden_size)
        self.positions = nn.Parameter(torch.empty(config.position_grid_size**2, hidden_size))
        sizes = hidden_size, config.num_heads, config.intermediate_size
        self.layers = nn.ModuleDict({str(i): VisionBlock(*sizes, norm_eps) for i in range(config.num_layers)})
        self.norm = nn.LayerNorm(hidden_size, norm_eps)

    def init_weights(self) -> None:
        """Initialize matrices to normal with std fan_in^-0.5, divided by sqrt(2 layers) if they write to the residual
        stream, positions to normal with std hidden_size^-0.5, norms to 1 and biases to 0."""
        init_linears(self)
        nn.init.normal_(self.positions, std=self.positions.shape[1] ** -0.5)
        with torch.no_grad():
            for layer in self.layers.values():
                for linear in (layer.attention.output, layer.down):  # type: ignore[union-attr]
                    linear.weight /= (2 * len(self.layers)) ** 0.5  # type: ignore[union-attr]

    def forward(self, patches: Tensor, patch_positions: PatchPositions, mask: Lowered) -> Tensor:
        """patches [B, P, patch_channels] -> features [B, P, C]. The mask lets a patch attend to its full image."""
        h = self.embedding(patches.to(self.embedding.weight.dtype))
        h = h + interpolation_weights(patch_positions, self.grid_size).to(h.dtype) @ self.positions
        for layer in self.layers.values():
            h = layer(h, mask)
        return self.norm(h)


class Projector(nn.Module):
    """Maps encoder features to decoder embeddings: merge_size x merge_size neighboring patches become one token."""

    def __init__(
        self, *, vision_hidden_size: int, projector_hidden_size: int, hidden_size: int, merge_size: int
    ) -> None:
        super().__init__()
        self.merge_size = merge_size
        self.norm = nn.LayerNorm(vision_hidden_size * merge_size**2)
        self.up = nn.Linear(vision_hidden_size * merge_size**2, projector_hidden_size)
        self.down = nn.Linear(projector_hidden_size, hidden_size)

    def init_weights(self) -> None:
        init_linears(self)

    def forward(self, features: Tensor, patch_positions: PatchPositions) -> Tensor:
        """features [B, P, C] -> [B, P / merge_size^2, W], one image after another, each in row-major order.

        P and the height and width of every image must be multiples of `merge_size`.
        """
        order = merge_order(patch_positions, self.merge_size)
        neighbors = features.gather(1, order[..., None].expand_as(features)).unflatten(1, (-1, self.merge_size**2))
        return self.down(F.gelu(self.up(self.norm(neighbors.flatten(2)))))


def merge_order(positions: PatchPositions, merge: int) -> Tensor:
    """Return patch indices int64 [B, P] in an order in which the merge x merge patches of one token are adjacent.

    image of 2 x 4 patches, merge 2:  0 1 2 3
                                      4 5 6 7   ->  0 1 4 5   2 3 6 7
    """
    index = torch.arange(positions.image.shape[1], device=positions.image.device).expand(positions.image.shape)
    token = positions.row // merge * (positions.width // merge) + positions.column // merge
    offset = positions.row % merge * merge + positions.column % merge
    target = torch.where(positions.image < 0, index, positions.first + token * merge**2 + offset)
    return torch.empty_like(target).scatter_(1, target, index)


def init_linears(module: nn.Module) -> None:
    """Initialize linear layers to normal weights with std fan_in^-0.5 and zero biases, and norms to the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
