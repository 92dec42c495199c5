import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig as TheirConfig
from transformers import GptOssForCausalLM

from sightline import Batch
from sightline.models import GptOssConfig, build_model, config_of
from sightline.models.gpt_oss import GPT_OSS, clamped_swiglu
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
)
from tests.support.small_runs import rows_of, small_run, train_quietly, write_corpus

V, WINDOW = 96, 8
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "beta_fast": 3.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
CASES = {
    "one document": ([40], 40),
    "packed": ([1, 30, 2, 7, 17, 23, 8], 40),
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    config = TheirConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        max_position_embeddings=64,
        rope_parameters=YARN,
        router_aux_loss_coef=0.0,
    )
    return random_theirs(GptOssForCausalLM, config)


@pytest.fixture(scope="module")
def directory(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpt_oss")


@pytest.fixture
def ours(theirs: Any, directory: Path) -> Any:
    return as_ours(theirs, directory)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(theirs: Any, ours: Any, case: str) -> None:
    lengths, length = CASES[case]
    assert_same_model(ours, theirs, random_documents(lengths, V), length)


def test_transformers_loads_saved_model(theirs: Any, ours: Any, tmp_path: Path) -> None:
    assert_round_trip(ours, theirs, GptOssForCausalLM, torch.tensor(random_documents([40], V)), tmp_path)


def test_cached_logits_respect_the_window(ours: Any) -> None:
    assert_cached_logits(ours, random_documents([30], V)[0], cuts=[5, 6, 15, 16, 29])


def test_generated_text_equals_uncached_text(ours: Any) -> None:
    assert_greedy_text(ours, random_documents([6], V)[0], count=14)


@pytest.mark.parametrize(("row", "changed"), [(0, 0), (0, 1), (0, 20), (1, 3)])
def test_no_leakage_between_documents(ours: Any, row: int, changed: int) -> None:
    assert_no_leakage(ours, Batch.from_documents(random_documents([1, 30, 2, 7, 17, 22], V), length=40), row, changed)


def test_masks_window_and_full(ours: Any) -> None:
    batch = Batch.from_documents([[1] * 12, [2] * 3], length=16)
    masks = ours.get_attention_masks(batch)
    assert list(masks) == ["window", "full"]
    assert (masks["window"].start[0, 11, 0], masks["window"].stop[0, 11, 0]) == (4, 12)
    assert (masks["full"].start[0, 11, 0], masks["full"].stop[0, 11, 0]) == (0, 12)
    assert (masks["window"].start[0, 13, 0], masks["full"].start[0, 13, 0]) == (12, 12)
    assert masks["full"].visible_queries()[0].tolist() == [True] * 15 + [False]
    assert [layer.mask_name for layer in ours.layers.values()] == ["window", "full", "window", "full"]


def test_clamped_swiglu_by_hand() -> None:
    gate, up = torch.tensor([1.0, 9.0, -9.0, 1.0]), torch.tensor([0.5, 8.0, -8.0, -8.0])
    sigmoid = [1 / (1 + 2.718281828 ** (-1.702 * g)) for g in (1.0, 7.0, -9.0, 1.0)]
    expected = [1.0 * sigmoid[0] * 1.5, 7.0 * sigmoid[1] * 8.0, -9.0 * sigmoid[2] * -6.0, sigmoid[3] * -6.0]
    torch.testing.assert_close(clamped_swiglu(gate, up), torch.tensor(expected))


PUBLISHED = {"20b": {"num_hidden_layers": 24, "num_local_experts": 32}, "120b": {}}


@pytest.mark.parametrize(("size", "count"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)])
def test_published_config_and_parameter_count_equal_transformers(size: str, count: int) -> None:
    their_config = TheirConfig(**PUBLISHED[size])
    hf = {**their_config.to_dict(), "architectures": ["GptOssForCausalLM"]}
    assert GPT_OSS.config_from_hf(hf) == config_of(f"gpt_oss-{size}")
    with torch.device("meta"):
        ours, theirs = build_model(f"gpt_oss-{size}"), GptOssForCausalLM(their_config)
    assert count_parameters(ours) == count_parameters(theirs) == count


@pytest.mark.parametrize("size", ["debug", "tiny", "20b"])
def test_config_round_trip_through_transformers(size: str) -> None:
    """Also without RoPE scaling, although their default is the scaling of the published models."""
    config = config_of(f"gpt_oss-{size}")
    fields = GPT_OSS.hf.config_to_hf(config)
    again = TheirConfig(**{n: value for n, value in fields.items() if n not in ("architectures", "model_type")})
    assert GPT_OSS.config_from_hf({**again.to_dict(), "architectures": fields["architectures"]}) == config


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"swiglu_limit": 10.0}, "swiglu_limit = 10.0, which is not supported for GptOssForCausalLM; expected 7.0"),
        ({"attention_bias": False}, "attention_bias = False.*expected True"),
        ({"layer_types": ["full_attention"] * 36}, "layer_types = .*expected"),
    ],
)
def test_unsupported_hf_config_raises(fields: dict[str, Any], text: str) -> None:
    hf = {**TheirConfig().to_dict(), "architectures": ["GptOssForCausalLM"], **fields}
    with pytest.raises(ValueError, match=text):
        GPT_OSS.config_from_hf(hf)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sliding_window": 0}, "model.sliding-window must be greater than 0, got 0"),
        ({"experts_per_token": 9}, "experts-per-token is 9, but there are only 8 experts"),
        ({"head_dim": 15}, "head-dim must be even, .*got 15"),
        ({"num_heads": 6}, r"heads 6 is not divisible by model.num-kv-heads 4; .*\[1, 2, 3, 6\]"),
    ],
)
def test_invalid_config_raises(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GptOssConfig(**fields)


def test_flops_of_tiny_by_hand() -> None:
    model = build_model("gpt_oss-tiny")
    active = 256 * (2 * (8 + 4) * 32 + 8 + 2 * 3 * 344)
    assert model.flops_per_token() == 6 * (6 * active + 256 * 8192)
    assert model.flops_per_pair("window") == model.flops_per_pair("full") == 12 * 256 * 3


def test_loss_falls_in_a_small_run(tmp_path: Path) -> None:
    model = dataclasses.replace(config_of("gpt_oss-debug"), vocab_size=320)
    run = small_run(tmp_path / "run", write_corpus(tmp_path / "source"), model=model, training__steps=30)
    train_quietly(run)
    losses = [row["loss"] for row in rows_of(run.output_dir)]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
