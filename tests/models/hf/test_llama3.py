from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sightline import Batch
from sightline.models import Llama3RopeScaling, config_of
from sightline.models.llama3 import LLAMA3
from tests.support.against_transformers import (
    as_ours,
    assert_cached_logits,
    assert_no_leakage,
    assert_round_trip,
    assert_same_model,
    random_documents,
    random_theirs,
)

V = 96
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "plain": LlamaConfig(**SIZES),
    "scaled": LlamaConfig(rope_parameters=SCALED, rms_norm_eps=1e-5, **SIZES),
    "tied": LlamaConfig(tie_word_embeddings=True, head_dim=32, **SIZES),
}
CASES = {"one document": ([40], 40), "packed": ([1, 30, 2, 7, 17, 23, 8], 40)}


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request: pytest.FixtureRequest) -> Any:
    return random_theirs(LlamaForCausalLM, CONFIGS[request.param])


@pytest.fixture
def ours(theirs: Any, tmp_path: Path) -> Any:
    return as_ours(theirs, tmp_path / "theirs")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(theirs: Any, ours: Any, case: str) -> None:
    lengths, length = CASES[case]
    assert_same_model(ours, theirs, random_documents(lengths, V), length)


def test_transformers_loads_saved_model(theirs: Any, ours: Any, tmp_path: Path) -> None:
    assert_round_trip(ours, theirs, LlamaForCausalLM, torch.tensor(random_documents([40], V)), tmp_path / "back")


def test_cached_logits_equal_full_forward(ours: Any) -> None:
    assert_cached_logits(ours, random_documents([30], V)[0], cuts=[5, 6, 15, 29])


def test_no_leakage_between_documents(ours: Any) -> None:
    assert_no_leakage(ours, Batch.from_documents(random_documents([30, 7, 17], V), length=40), 0, 32)


PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""The published config.json of Llama 3.2 1B, in the format of an older transformers."""


def test_published_config_equals_preset() -> None:
    config = LLAMA3.config_from_hf(PUBLISHED)
    assert config == LLAMA3.presets["1b"].__class__(**{**vars(LLAMA3.presets["1b"]), "head_dim": 64})
    assert all(PUBLISHED[name] == value for name, value in LLAMA3.hf.config_to_hf(config).items())


def test_config_round_trip() -> None:
    for size in LLAMA3.presets:
        config = config_of(f"llama3-{size}")
        back = LLAMA3.config_from_hf(LLAMA3.hf.config_to_hf(config))
        assert back.head_dim == config.resolved_head_dim
        assert LLAMA3.hf.config_to_hf(back) == LLAMA3.hf.config_to_hf(config)
    assert LLAMA3.config_from_hf(LLAMA3.hf.config_to_hf(LLAMA3.presets["8b"])).rope_scaling == Llama3RopeScaling(
        factor=8
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention_bias", True, "attention_bias = True, which is not supported for LlamaForCausalLM; expected False"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'.*expected 'silu'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "RoPE type 'linear'.*expected default or llama3"),
    ],
)
def test_unsupported_hf_config_raises(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLAMA3.config_from_hf({**PUBLISHED, field: value})
