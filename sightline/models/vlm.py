"""A Llama 3 that sees images: SigLIP 2's encoder (arXiv 2502.14786), a projector, and the decoder of llama3.py.

A row is text with images in it. An image stands in the text as a run of image tokens, one for every `merge` x `merge`
of its patches; the patches themselves lie in a row of their own:

    tokens               the  cat  [i]  [i]  [i]  [i]  and   the  dog  [i]  [i]
    extra["patches"]     16 patches of the first image, 8 of the second, padding
    extra["patch_grid"]  [[4, 4], [2, 4], [0, 0]]

Two masks: in `encoder` a patch sees its own image, in `decoder` a token sees its own document up to itself, and an
image token all of its image. Where an image begins and ends is what `patch_grid` says.
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
    """The sizes of a Llama 3 that sees images."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """The encoder of the images."""
    spatial_merge_size: int = 2
    """An image token holds merge x merge patches."""
    projector_hidden_size: int = 512
    """Inner width of the projector between encoder and decoder."""
    image_token_id: int = 8191
    """The token an image stands as in the text; no text is ever encoded as it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "spatial_merge_size", "projector_hidden_size")
        if not 0 <= self.image_token_id < self.vocab_size:
            raise ValueError(
                f"model.image-token-id {self.image_token_id} is not in the vocabulary of {self.vocab_size} tokens; "
                f"use --model.image-token-id {self.vocab_size - 1}"
            )


def add_vision(text: Llama3Config, **fields: Any) -> VLMConfig:
    """A Llama 3 of these sizes that sees; the last token of its vocabulary is the image token, unless `fields` say."""
    return VLMConfig(**{**vars(text), "image_token_id": text.vocab_size - 1, **fields})


class VLM(Llama3):
    """The whole model. A pipeline stage without `embedding` also does without `vision` and `projector`.

    `flops_per_token` counts the decoder: how many patches there are is not a matter of the tokens. So the matrix
    products of the encoder and the projector are missing in a run's MFU; the encoder's attention is in it.
    """

    config: VLMConfig

    def __init__(self, config: VLMConfig, *, attention_backend: str = "auto") -> None:
        super().__init__(config, attention_backend=attention_backend)
        self.suppress_tokens = (config.image_token_id,)
        self.image_sizes = ImageSizes(config.vision.patch_size, config.spatial_merge_size, config.image_token_id)
        self.vision: VisionEncoder | None = VisionEncoder(config.vision)
        self.projector: Projector | None = Projector(
            channels=config.vision.hidden_size,
            hidden=config.projector_hidden_size,
            width=config.hidden_size,
            merge=config.spatial_merge_size,
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
        """`decoder`: text is causal, the tokens of one image see each other both ways, all inside the document.
        `encoder`, for a batch with images: the patches of one image see each other.

        Errors: ValueError where the image tokens of a row are not those that its `patch_grid` states.
        """
        image_token = getattr(tokenizer, "image_id", self.config.image_token_id)
        if image_token != self.config.image_token_id:
            raise ValueError(
                f"the tokenizer's image token is {image_token}, the model's {self.config.image_token_id}; expected the "
                f"same: use --model.image-token-id {image_token}"
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
        """Refuse patches and grids that do not fit each other or this model."""
        merge, numbers = self.config.spatial_merge_size, self.config.vision.patch_channels
        if patches.dim() != 3 or patches.shape[2] != numbers or patches.shape[1] % merge**2:
            raise ValueError(
                f"patches must be [B, P, {numbers}] with P a multiple of {merge**2} (merge x merge patches make a "
                f"token), got {tuple(patches.shape)}; pad the patches of a row behind its last image"
            )
        if patch_grid.dim() != 3 or patch_grid.shape[::2] != (len(patches), 2) or patch_grid.is_floating_point():
            raise ValueError(
                f"patch_grid must be integers [B, N, 2], the height and width of each image in patches, with "
                f"B={len(patches)}, got {patch_grid.dtype} {tuple(patch_grid.shape)}"
            )
        if bool((patch_grid % merge).any()) or bool((patch_grid < 0).any()):
            raise ValueError(
                f"an image's height and width in patches must be multiples of merge = {merge}, got "
                f"{patch_grid[((patch_grid % merge != 0) | (patch_grid < 0)).any(dim=2)][0].tolist()}; resize the image"
            )
        stated = int(patch_grid.prod(dim=2).sum(dim=1).max()) if patch_grid.numel() else 0
        if stated > patches.shape[1]:
            raise ValueError(f"patch_grid states {stated} patches in a row, but patches has only {patches.shape[1]}")

    def image_spans(self, batch: Batch, patch_grid: Tensor) -> Tensor:
        """Number of the image that each image token of its row belongs to, -1 for text: int64 [B, S]."""
        is_image = batch.tokens == self.config.image_token_id
        ends = (
            (patch_grid.prod(dim=2) // self.config.spatial_merge_size**2).cumsum(dim=1).long()
        )  # in image tokens of the row
        number = is_image.cumsum(dim=1) - 1
        stated = ends[:, -1] if ends.shape[1] else ends.new_zeros(len(ends))
        for row, (came, expected) in enumerate(zip(is_image.sum(dim=1).tolist(), stated.tolist(), strict=True)):
            if came != expected:
                raise ValueError(
                    f"row {row} has {came} image tokens ({self.config.image_token_id}), but its patch_grid states "
                    f"{expected}: one for every {self.config.spatial_merge_size} x {self.config.spatial_merge_size} patches of its images"
                )
        span_ids = torch.searchsorted(ends, number.contiguous(), right=True).masked_fill(~is_image, -1)
        # A new run begins where the image or the document changes; every image must be exactly one.
        begins = is_image.clone()
        same = (span_ids[:, 1:] == span_ids[:, :-1]) & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
        begins[:, 1:] &= ~same
        torn = (begins.sum(dim=1) != (patch_grid.prod(dim=2) > 0).sum(dim=1)).nonzero().flatten().tolist()
        if torn:
            raise ValueError(
                f"row {torn[0]} has an image whose tokens do not stand together in one document; put text before or "
                "after an image, and cut no document inside one"
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
        patches: Tensor | None = None,
        patch_grid: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """As every decoder's, and with images:

        patches      float [B, P, patch_size^2 * channels], the patches of a row's images one image after the other
        patch_grid   int [B, N, 2], height and width of each image in patches, 0 where a row has fewer than N
        image_index  int64 [B, S], from `index_image_tokens`; without it, `tokens` are whole rows
        With a cache they belong to the call that brings their image tokens, and to no later one.
        """
        masks = named_masks(attention_masks)
        h = tokens if self.embedding is None else self.embedding(tokens)
        if self.embedding is not None and patches is not None and patch_grid is not None:
            seen = self.encode_images(patches, patch_grid, masks["encoder"])
            if image_index is None:
                image_index = index_image_tokens(tokens == self.config.image_token_id)
            h = insert_image_features(h, seen, image_index)
        masks = {"decoder": masks["decoder"]}
        return self.forward_embedded(
            h, attention_masks=masks, positions=positions, labels=labels, cache=cache, loss_inputs=loss_inputs
        )

    def encode_images(self, patches: Tensor, patch_grid: Tensor, mask: AttentionMask) -> Tensor:
        """Patches [B, P, ...] -> what stands for the image tokens of each row, in order: [B, P / merge^2, W]."""
        assert self.vision is not None and self.projector is not None, "a stage with the embedding sees images"
        places = locate_patches(patch_grid, patches.shape[1])
        lowered = self.lower_masks({"encoder": mask}, self.vision.positions)["encoder"]
        return self.projector(self.vision(patches, places, lowered), places)

    def attention_layers_with_mask(self, mask_name: str) -> list[AttentionLayer]:
        encoder = [] if self.vision is None else attention_layers(self.vision)
        return encoder if mask_name == "encoder" else super().attention_layers_with_mask(mask_name)


def index_image_tokens(is_image: Tensor) -> Tensor:
    """Number of each image token in its row, from 0, and -1 for text: bool [B, S] -> int64 [B, S]."""
    return (is_image.cumsum(dim=1) - 1).masked_fill(~is_image, -1)


def insert_image_features(h: Tensor, seen: Tensor, image_index: Tensor) -> Tensor:
    """h [B, S, W] with every image token, by image_index int64 [B, S], replaced by the one of that number of seen
    [B, M, W]."""
    number = image_index.clamp(min=0, max=seen.shape[1] - 1)
    there = seen.gather(1, number[..., None].expand(-1, -1, seen.shape[2]))
    return torch.where(image_index[..., None] >= 0, there.to(h.dtype), h)


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
