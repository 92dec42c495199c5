from typing import Any

import pytest

from sightline.models.hf.rope import read_rope, read_scaling, write_rope

OLDER = {"rope_theta": 50.0, "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}
NEWER = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}


@pytest.mark.parametrize("hf", [OLDER, NEWER])
def test_older_and_newer_rope_fields(hf: dict[str, Any]) -> None:
    rope = read_rope({**hf, "architectures": ["Any"]}, "yarn")
    scaling = read_scaling(rope)
    assert (rope["rope_theta"], scaling.factor, scaling.original_context, scaling.truncate) == (50.0, 4.0, 64, True)
    assert (scaling.mscale, scaling.mscale_all_dim) == (1.0, 0.0)
    written = {**write_rope(50.0, scaling), "architectures": ["Any"]}
    assert read_scaling(read_rope(written, "yarn")) == scaling
    with pytest.raises(
        ValueError, match="RoPE type 'yarn', which is not supported for Any; expected default or llama3"
    ):
        read_rope({**hf, "architectures": ["Any"]}, "llama3")


def test_inconsistent_yarn_attention_factor_raises() -> None:
    rope = read_rope({**NEWER, "architectures": ["Any"]}, "yarn")
    with pytest.raises(ValueError, match=r"attention_factor 2.0; expected 1.13"):
        read_scaling({**rope, "attention_factor": 2.0})


def test_missing_rope_fields_mean_the_default() -> None:
    rope = read_rope({"architectures": ["Any"]})
    assert (rope["rope_theta"], read_scaling(rope)) == (10_000.0, None)
