import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from sightline import Batch
from sightline.models import Llama4Config, build_model, config_of
from sightline.models.llama4 import LLAMA4
from tests.support.against_transformers import (
    as_ours,
    assert_cached_logits,
    assert_greedy_text,
    assert_no_leakage,
    assert_round_trip,
    assert_same_model,
    count_parameters,
    random_documents,
    random_theirs,
    run,
)
from tests.support.small_runs import rows_of, small_run, train_quietly, write_corpus

V, CHUNK = 96, 8
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,  # equal, as in Scout: no interpolation between them
    "original_max_position_embeddings": 32,
}
PUBLISHED = {
    "scout": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}},
    "maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
}
FAMILIES = {
    "scout": {"interleave_moe_layer_step": 1, "use_qk_norm": True, "rope_parameters": LLAMA3_ROPE},
    "maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_experts_per_tok": 2},
}
CASES = {
    "one document": ([40], 40),
    "packed": ([1, 30, 2, 7, 17, 23, 8], 40),
}


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request: pytest.FixtureRequest) -> Any:
    fields = {
        "vocab_size": V,
        "hidden_size": 64,
        "intermediate_size": 48,
        "intermediate_size_mlp": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "attention_chunk_size": CHUNK,
        "floor_scale": 4,
        "attn_scale": 0.5,
        "max_position_embeddings": 64,
        "router_aux_loss_coef": 0.0,
    }
    return random_theirs(Llama4ForCausalLM, Llama4TextConfig(**{**fields, **FAMILIES[request.param]}))


@pytest.fixture
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return as_ours(theirs, tmp_path_factory.mktemp("llama4"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(theirs: Any, ours: Any, case: str) -> None:
    lengths, length = CASES[case]
    assert_same_model(ours, theirs, random_documents(lengths, V), length)


def test_transformers_loads_saved_model(theirs: Any, ours: Any, tmp_path: Path) -> None:
    assert_round_trip(ours, theirs, Llama4ForCausalLM, torch.tensor(random_documents([40], V)), tmp_path)


def test_cached_logits_respect_the_chunks(ours: Any) -> None:
    assert_cached_logits(ours, random_documents([30], V)[0], cuts=[5, 7, 8, 16, 29])


def test_generated_text_equals_uncached_text(ours: Any) -> None:
    assert_greedy_text(ours, random_documents([6], V)[0], count=14)


@pytest.mark.parametrize(("row", "changed"), [(0, 0), (0, 1), (0, 20), (1, 3)])
def test_no_leakage_between_documents(ours: Any, row: int, changed: int) -> None:
    assert_no_leakage(ours, Batch.from_documents(random_documents([1, 30, 2, 7, 17, 22], V), length=40), row, changed)


def test_masks_chunked_and_full(ours: Any) -> None:
    """Chunks are counted inside the document, and continue if it continues in the next row."""
    batch = Batch.from_documents([[1] * 13, [2] * 9], length=18)  # the second: 5 tokens here, 4 in the next row
    masks = ours.get_attention_masks(batch)
    assert list(masks) == ["chunked", "full"]
    chunked = [0] * 8 + [8] * 5 + [13] * 5
    assert masks["chunked"].start[0, :, 0].tolist() == chunked
    assert masks["full"].start[0, :, 0].tolist() == [0] * 13 + [13] * 5
    assert all(mask.stop[0, :, 0].tolist() == list(range(1, 19)) for mask in masks.values())
    assert masks["chunked"].start[1, :4, 0].tolist() == [0, 0, 0, 3]
    assert masks["full"].start[1, :4, 0].tolist() == [0, 0, 0, 0]
    assert masks["full"].visible_queries()[1].tolist() == [True] * 4 + [False] * 14
    assert [layer.mask_name for layer in ours.layers.values()] == ["chunked"] * 3 + ["full"]


def test_document_continued_in_next_row_keeps_its_positions() -> None:
    """Temperature and chunks in the next row follow from positions in the document."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        config_of("llama4-debug"), temperature_floor=4, temperature_scale=0.5, attention_chunk_size=8
    )
    model = build_model(config)
    document = random_documents([30], config.vocab_size)[0]
    batch = Batch.from_documents([document], length=20)
    continued = dataclasses.replace(batch[1:2], positions=torch.arange(20, 40, dtype=torch.int32)[None])
    restarted = dataclasses.replace(batch[1:2], positions=torch.arange(20, dtype=torch.int32)[None])
    with torch.no_grad():
        logits = run(model, batch)[1, :10]
        torch.testing.assert_close(run(model, continued)[0, :10], logits, atol=1e-5, rtol=1e-5)
        assert (run(model, restarted)[0, :10] - logits).abs().max() > 1e-2
    assert model.encode_positions(batch.positions).temperature[1, 2:4].flatten().tolist() == pytest.approx(
        [1 + 0.5 * torch.tensor(1.0 + n).log().item() for n in (5, 6)]
    )  # positions 22 and 23


@pytest.mark.parametrize(("size", "count"), [("scout", 107_769_861_120), ("maverick", 400_711_848_960)])
def test_published_config_and_parameter_count_equal_transformers(size: str, count: int) -> None:
    their_config = Llama4TextConfig(**PUBLISHED[size])
    hf = {**their_config.to_dict(), "architectures": ["Llama4ForCausalLM"]}
    assert LLAMA4.config_from_hf(hf) == config_of(f"llama4-{size}")
    assert LLAMA4.config_from_hf({**hf, "no_rope_layers": []}) == config_of(f"llama4-{size}")
    with torch.device("meta"):
        ours, theirs = build_model(f"llama4-{size}"), Llama4ForCausalLM(their_config)
    assert count_parameters(ours) == count_parameters(theirs) == count


@pytest.mark.parametrize("size", ["debug", "tiny", "scout", "maverick"])
def test_config_round_trip_through_transformers(size: str) -> None:
    config = config_of(f"llama4-{size}")
    fields = LLAMA4.hf.config_to_hf(config)
    again = Llama4TextConfig(**{n: value for n, value in fields.items() if n not in ("architectures", "model_type")})
    assert LLAMA4.config_from_hf({**again.to_dict(), "architectures": fields["architectures"]}) == config


def test_temperature_scale_is_0_without_temperature_tuning() -> None:
    hf = {**Llama4TextConfig(attn_temperature_tuning=False).to_dict(), "architectures": ["Llama4ForCausalLM"]}
    config = LLAMA4.config_from_hf(hf)
    assert config.temperature_scale == 0 and LLAMA4.hf.config_to_hf(config)["attn_temperature_tuning"] is False


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"attention_bias": True},
            "attention_bias = True, which is not supported for Llama4ForCausalLM.*expected False",
        ),
        ({"no_rope_layers": [1] * 48}, "no_rope_layers = .*expected"),
        ({"moe_layers": [3]}, r"moe_layers = \[3\].*expected"),
    ],
)
def test_unsupported_hf_config_raises(fields: dict[str, Any], text: str) -> None:
    hf = {**Llama4TextConfig().to_dict(), "architectures": ["Llama4ForCausalLM"], **fields}
    with pytest.raises(ValueError, match=text):
        LLAMA4.config_from_hf(hf)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"attention_chunk_size": 0}, "model.attention-chunk-size must be greater than 0, got 0"),
        ({"experts_per_token": 9}, "experts-per-token is 9, but there are only 8 experts"),
        ({"no_rope_layer_interval": -1}, "model.no-rope-layer-interval must be greater than 0, got -1"),
    ],
)
def test_invalid_config_raises(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Llama4Config(**fields)


def test_flops_of_tiny_by_hand() -> None:
    model = build_model("llama4-tiny")
    attention = 256 * 2 * (8 + 4) * 32
    dense, experts = 256 * 3 * 688, 256 * (8 + 2 * 3 * 344)
    assert model.flops_per_token() == 6 * (8 * attention + 4 * dense + 4 * experts + 256 * 8192)
    assert (model.flops_per_pair("chunked"), model.flops_per_pair("full")) == (12 * 256 * 6, 12 * 256 * 2)


def test_loss_falls_in_a_small_run(tmp_path: Path) -> None:
    model = dataclasses.replace(config_of("llama4-debug"), vocab_size=320)
    run = small_run(tmp_path / "run", write_corpus(tmp_path / "source"), model=model, training__steps=30)
    train_quietly(run)
    losses = [row["loss"] for row in rows_of(run.output_dir)]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
