"""Vision-language model: SigLIP 2 encoder (arXiv 2502.14786), a projector, and the Llama 3 decoder of llama3.py.

A row is text with images. In `tokens`, an image is a run of image tokens, one for each square of patches with side
`spatial_merge_size`; the patches of a row are a separate tensor:

    tokens               the  cat  [i]  [i]  [i]  [i]  and   the  dog  [i]  [i]
    extra["patches"]     16 patches of the first image, 8 of the second, padding
    extra["patch_grid"]  [[4, 4], [2, 4], [0, 0]]

There are two masks: in `encoder`, a patch attends to all patches of its image; in `decoder`, a token attends causally
within its document, and an image token also to its full image. `patch_grid` gives the height and width of each image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sightline.batch import Batch, ImageSizes
from sightline.config import CheckpointConfig, OptimizerConfig, TrainingConfig, ValidationConfig
from sightline.config.recipes import IMAGE_SECTIONS, on_gpus, template
from sightline.layers import AttentionLayer, LayerCache, attention_layers
from sightline.layers.vision import Projector, VisionConfig, VisionEncoder, locate_patches
from sightline.masks import AttentionMask, bidirectional, causal, document, named_masks
from sightline.models.block import Block
from sightline.models.checks import check_positive
from sightline.models.decoder import Masks
from sightline.models.family import Family
from sightline.models.hf.vlm import VLM_HF
from sightline.models.llama3 import LLAMA3, Llama3, Llama3Config


@dataclass(frozen=True, kw_only=True)
class VLMConfig(Llama3Config):
    """Config of a vision-language model with a Llama 3 decoder."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Config of the vision encoder."""
    spatial_merge_size: int = 2
    """Side of the square of patches that is merged into one image token."""
    projector_hidden_size: int = 512
    """Hidden size of the projector between encoder and decoder."""
    image_token_id: int = 8191
    """Id of the image token, a placeholder that text is never encoded to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "spatial_merge_size", "projector_hidden_size")
        if not 0 <= self.image_token_id < self.vocab_size:
            raise ValueError(
                f"model.image-token-id {self.image_token_id} is not in the vocabulary of {self.vocab_size} tokens; "
                f"use --model.image-token-id {self.vocab_size - 1}"
            )


def add_vision(text: Llama3Config, **fields: Any) -> VLMConfig:
    """Return the VLMConfig of a Llama 3 config; `image_token_id` defaults to the last id of the vocabulary."""
    return VLMConfig(**{**vars(text), "image_token_id": text.vocab_size - 1, **fields})


class VLM(Llama3):
    """Vision encoder, projector and decoder. A pipeline stage without `embedding` needs no `vision` or `projector`.

    `flops_per_token` counts only the decoder, because the number of patches does not follow from the number of tokens.
    A run's MFU therefore lacks the matrix products of encoder and projector; it includes the encoder's attention.
    """

    config: VLMConfig

    def __init__(self, config: VLMConfig, *, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend=attention_backend)
        self.suppress_tokens = (config.image_token_id,)
        self.image_sizes = ImageSizes(config.vision.patch_size, config.spatial_merge_size, config.image_token_id)
        self.vision: VisionEncoder | None = VisionEncoder(config.vision)
        self.projector: Projector | None = Projector(
            vision_hidden_size=config.vision.hidden_size,
            projector_hidden_size=config.projector_hidden_size,
            hidden_size=config.hidden_size,
            merge_size=config.spatial_merge_size,
        )

    def build_block(self, index: int) -> Block:
        block = super().build_block(index)
        block.mask_name = "decoder"
        return block

    def init_weights(self) -> None:
        super().init_weights()
        if self.vision is not None:
            self.vision.init_weights()
        if self.projector is not None:
            self.projector.init_weights()

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:  # type: ignore[override]
        """Return `decoder`, and for a batch with images also `encoder`.

        decoder  causal attention within each document; the tokens of an image attend to each other in both directions
        encoder  the patches of an image attend to each other

        Raises:
            ValueError: if the image tokens of a row do not match its `patch_grid`, or the tokenizer has another id.
        """
        image_token = getattr(tokenizer, "image_id", self.config.image_token_id)
        if image_token != self.config.image_token_id:
            raise ValueError(
                f"the tokenizer's image token is {image_token}, but the model's is {self.config.image_token_id}; "
                f"expected equal ids: use --model.image-token-id {image_token}"
            )
        rows, length = batch.shape
        text = causal(rows, length, device=batch.tokens.device)
        if "patch_grid" not in batch.extra:
            return {"decoder": text & document(batch.document_ids)}
        patch_grid, patches = batch.extra["patch_grid"], batch.extra["patches"]
        self.check_patches(patches, patch_grid)
        span_ids = self.image_spans(batch, patch_grid)
        return {
            "encoder": document(locate_patches(patch_grid, patches.shape[1]).image),
            "decoder": (text | bidirectional(span_ids)) & document(batch.document_ids),
        }

    def check_patches(self, patches: Tensor, patch_grid: Tensor) -> None:
        """Check shapes and values of patches and grid.

        Raises:
            ValueError: if they do not match each other or the model.
        """
        merge, channels = self.config.spatial_merge_size, self.config.vision.patch_channels
        if patches.dim() != 3 or patches.shape[2] != channels or patches.shape[1] % merge**2:
            raise ValueError(
                f"patches must be [B, P, {channels}] with P a multiple of {merge**2} ({merge} x {merge} patches are "
                f"one token), got {tuple(patches.shape)}; pad the patches of a row after its last image"
            )
        if patch_grid.dim() != 3 or patch_grid.shape[::2] != (len(patches), 2) or patch_grid.is_floating_point():
            raise ValueError(
                f"patch_grid must be integers [B, N, 2], the height and width of each image in patches, with "
                f"B = {len(patches)}, got {patch_grid.dtype} {tuple(patch_grid.shape)}"
            )
        if bool((patch_grid % merge).any()) or bool((patch_grid < 0).any()):
            raise ValueError(
                f"the height and width of an image in patches must be multiples of {merge} (spatial-merge-size), got "
                f"{patch_grid[((patch_grid % merge != 0) | (patch_grid < 0)).any(dim=2)][0].tolist()}; resize the image"
            )
        needed = int(patch_grid.prod(dim=2).sum(dim=1).max()) if patch_grid.numel() else 0
        if needed > patches.shape[1]:
            raise ValueError(f"patch_grid has {needed} patches in a row, but patches has only {patches.shape[1]}")

    def image_spans(self, batch: Batch, patch_grid: Tensor) -> Tensor:
        """Return the index, within its row, of the image that each token belongs to, -1 for text: int64 [B, S].

        Raises:
            ValueError: if the image tokens of a row do not match its `patch_grid`, or an image is not contiguous.
        """
        merge = self.config.spatial_merge_size
        is_image = batch.tokens == self.config.image_token_id
        ends = (patch_grid.prod(dim=2) // merge**2).cumsum(dim=1).long()  # of each image, in image tokens of the row
        index = is_image.cumsum(dim=1) - 1
        totals = ends[:, -1] if ends.shape[1] else ends.new_zeros(len(ends))
        for row, (actual, expected) in enumerate(zip(is_image.sum(dim=1).tolist(), totals.tolist(), strict=True)):
            if actual != expected:
                raise ValueError(
                    f"row {row} has {actual} image tokens ({self.config.image_token_id}); expected {expected} from its "
                    f"patch_grid, one for every {merge} x {merge} patches"
                )
        span_ids = torch.searchsorted(ends, index.contiguous(), right=True).masked_fill(~is_image, -1)
        # A new run of tokens starts where the image or the document changes; every image must be exactly one run.
        starts = is_image.clone()
        same = (span_ids[:, 1:] == span_ids[:, :-1]) & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
        starts[:, 1:] &= ~same
        split = (starts.sum(dim=1) != (patch_grid.prod(dim=2) > 0).sum(dim=1)).nonzero().flatten().tolist()
        if split:
            raise ValueError(
                f"row {split[0]} has an image whose tokens are not contiguous in one document; put text only before or "
                "after an image, and do not split a document inside one"
            )
        return span_ids

    def per_token_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {"image_index": index_image_tokens(inputs["tokens"] == self.config.image_token_id)}

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
        patches: Tensor | None = None,
        patch_grid: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Run `Decoder.forward`, with these additional arguments for images:

        patches      float [B, P, patch_size^2 * num_channels], the patches of a row's images, image by image
        patch_grid   int [B, N, 2], height and width of each image in patches, 0 if a row has fewer than N images
        image_index  int64 [B, S], from `index_image_tokens`; needed only if `tokens` are not full rows

        With a cache, pass them only in the call that contains their image tokens.
        """
        masks = named_masks(attention_masks)
        h = tokens if self.embedding is None else self.embedding(tokens)
        if self.embedding is not None and patches is not None and patch_grid is not None:
            features = self.encode_images(patches, patch_grid, masks["encoder"])
            if image_index is None:
                image_index = index_image_tokens(tokens == self.config.image_token_id)
            h = insert_image_features(h, features, image_index)
        masks = {"decoder": masks["decoder"]}
        return self.forward_embedded(
            h, attention_masks=masks, positions=positions, labels=labels, cache=cache,
            loss_inputs=loss_inputs, last_token_only=last_token_only,
        )  # fmt: skip

    def encode_images(self, patches: Tensor, patch_grid: Tensor, mask: AttentionMask) -> Tensor:
        """Map patches [B, P, C] to the embeddings of each row's image tokens: [B, P / spatial_merge_size^2, W]."""
        assert self.vision is not None and self.projector is not None, "the stage with the embedding has the encoder"
        patch_positions = locate_patches(patch_grid, patches.shape[1])
        lowered = self.lower_masks({"encoder": mask}, self.vision.positions)["encoder"]
        return self.projector(self.vision(patches, patch_positions, lowered), patch_positions)

    def attention_layers_with_mask(self, mask_name: str) -> list[AttentionLayer]:
        encoder = [] if self.vision is None else attention_layers(self.vision)
        return encoder if mask_name == "encoder" else super().attention_layers_with_mask(mask_name)


def index_image_tokens(is_image: Tensor) -> Tensor:
    """Return the index of each image token among those of its row, -1 for text: bool [B, S] -> int64 [B, S]."""
    return (is_image.cumsum(dim=1) - 1).masked_fill(~is_image, -1)


def insert_image_features(h: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
    """Replace the embeddings of image tokens by image features.

    h            [B, S, W] embedded tokens
    features     [B, M, W] image features of each row
    image_index  int64 [B, S], index of a token's feature, -1 for text
    """
    index = image_index.clamp(min=0, max=features.shape[1] - 1)
    inserted = features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
    return torch.where(image_index[..., None] >= 0, inserted.to(h.dtype), h)


VLM_FAMILY = Family(
    name="vlm",
    model=VLM,
    config=VLMConfig,
    presets={
        "debug": add_vision(
            LLAMA3.presets["debug"],
            vision=VisionConfig(
                hidden_size=48, num_layers=2, num_heads=4, intermediate_size=96, patch_size=4, position_grid_size=4
            ),
            projector_hidden_size=96,
        ),
        "tiny": add_vision(LLAMA3.presets["tiny"]),
        "1.7b": add_vision(  # siglip2-so400m-patch16-naflex and Llama 3.2 1B
            LLAMA3.presets["1b"],
            vision=VisionConfig(
                hidden_size=1152,
                num_layers=27,
                num_heads=16,
                intermediate_size=4304,
                patch_size=16,
                position_grid_size=16,
            ),
            projector_hidden_size=2560,
        ),
    },
    hf=VLM_HF,
    recipes={
        "debug": template(
            training=TrainingConfig(steps=50, sequence_length=128, global_batch_size=4, micro_batch_size=4),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
            validation=ValidationConfig(every=25, rows=4),
            checkpoint=CheckpointConfig(every=25),
            **IMAGE_SECTIONS,
        ),
        "tiny": template(
            training=TrainingConfig(steps=80, sequence_length=512, global_batch_size=2, micro_batch_size=2),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=10),
            validation=ValidationConfig(every=20, rows=8),
            checkpoint=CheckpointConfig(every=40),
            **IMAGE_SECTIONS,
        ),
        "1.7b": on_gpus(1e-4, **IMAGE_SECTIONS),
    },
)
