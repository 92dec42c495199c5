"""A SigLIP 2 and a Llama 3 from separate directories are combined to one model and saved as one directory."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from sightline import Batch
from sightline.layers.vision import locate_patches
from sightline.masks import document
from sightline.models import load_pretrained, save_pretrained
from sightline.models.hf.vision_pair import load_vision_pair
from tests.support.against_transformers import random_theirs, run
from tests.support.lowering import lowered

VISION = Siglip2VisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, patch_size=2, num_patches=9
)
TEXT = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = [5, 90, 17, 3]


@pytest.mark.parametrize("with_text_encoder", [False, True])
def test_encoder_and_decoder_equal_the_separate_models(tmp_path: Path, with_text_encoder: bool) -> None:
    vision = random_theirs(Siglip2VisionModel, VISION)
    text = random_theirs(LlamaForCausalLM, TEXT)
    text.save_pretrained(tmp_path / "text")
    if with_text_encoder:
        small = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
        both = Siglip2Model(Siglip2Config(vision_config=VISION.to_dict(), text_config={**small, "vocab_size": 50}))
        both.vision_model.load_state_dict(vision.state_dict())
        both.save_pretrained(tmp_path / "vision")
    else:
        vision.save_pretrained(tmp_path / "vision")

    ours = load_vision_pair(tmp_path / "vision", tmp_path / "text", projector_hidden_size=40)
    config = ours.config
    assert (config.image_token_id, config.spatial_merge_size, config.projector_hidden_size) == (95, 2, 40)
    patches = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0))
    positions = locate_patches(torch.tensor([[[3, 4]]]), 12)
    mask = lowered(document(positions.image), training=False)
    with torch.no_grad():
        expected = vision(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(1, 12, dtype=torch.int64),
            spatial_shapes=torch.tensor([[3, 4]]),
        ).last_hidden_state
        torch.testing.assert_close(ours.vision(patches, positions, mask), expected, atol=1e-4, rtol=0)
        batch = Batch.from_documents([TOKENS], len(TOKENS))
        expected = text(input_ids=batch.tokens).logits
        torch.testing.assert_close(run(ours, batch), expected, atol=1e-4, rtol=0)

    save_pretrained(ours, tmp_path / "one")
    again = load_pretrained(tmp_path / "one")
    assert again.config == ours.config
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_other_models_raise(tmp_path: Path) -> None:
    Siglip2VisionModel(VISION).save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(TEXT).save_pretrained(tmp_path / "text")
    with pytest.raises(
        ValueError, match="contains a LlamaForCausalLM; expected one of Siglip2VisionModel, Siglip2Model"
    ):
        load_vision_pair(tmp_path / "text", tmp_path / "text")
    with pytest.raises(ValueError, match="contains a Siglip2VisionModel, which is not supported"):
        load_vision_pair(tmp_path / "vision", tmp_path / "vision")
