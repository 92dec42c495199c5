from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config as TheirConfig
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers import Qwen3MoeConfig as TheirMoeConfig

from sightline import Batch
from sightline.layers import MoE
from sightline.models import Qwen3Config, build_model, config_of
from sightline.models.qwen3 import QWEN3
from tests.support.against_transformers import (
    as_ours,
    assert_cached_logits,
    assert_no_leakage,
    assert_round_trip,
    assert_same_model,
    random_documents,
    random_theirs,
    run,
)

V = 96
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[type, Any]] = {
    "dense": (Qwen3ForCausalLM, TheirConfig(intermediate_size=96, **SIZES)),
    "tied": (Qwen3ForCausalLM, TheirConfig(intermediate_size=96, tie_word_embeddings=True, **SIZES)),
    "yarn": (Qwen3ForCausalLM, TheirConfig(intermediate_size=96, rope_parameters=YARN, **SIZES)),
    "moe": (
        Qwen3MoeForCausalLM,
        TheirMoeConfig(
            moe_intermediate_size=48,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,
            **SIZES,
        ),
    ),
}
CASES = {"one document": ([40], 40), "packed": ([1, 30, 2, 7, 17, 23, 8], 40)}


@pytest.fixture(scope="module", params=MODELS)
def theirs(request: pytest.FixtureRequest) -> Any:
    return random_theirs(*MODELS[request.param])


@pytest.fixture
def ours(theirs: Any, tmp_path: Path) -> Any:
    return as_ours(theirs, tmp_path / "theirs")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(theirs: Any, ours: Any, case: str) -> None:
    lengths, length = CASES[case]
    assert_same_model(ours, theirs, random_documents(lengths, V), length)


def test_transformers_loads_saved_model(theirs: Any, ours: Any, tmp_path: Path) -> None:
    assert_round_trip(ours, theirs, type(theirs), torch.tensor(random_documents([40], V)), tmp_path / "back")


def test_cached_logits_equal_full_forward(ours: Any) -> None:
    assert_cached_logits(ours, random_documents([30], V)[0], cuts=[5, 6, 15, 29])


@pytest.mark.parametrize(("row", "changed"), [(0, 0), (0, 20), (0, 32), (1, 3)])
def test_no_leakage_between_documents(ours: Any, row: int, changed: int) -> None:
    assert_no_leakage(ours, Batch.from_documents(random_documents([30, 7, 17, 23], V), length=40), row, changed)


def test_expert_counts_exclude_padding() -> None:
    torch.manual_seed(0)
    model = build_model("qwen3-debug-moe")
    batch = Batch.from_documents(random_documents([30, 20], 512), length=64)
    run(model, batch, labels=True).backward()
    routers = [layer.mlp.router for layer in model.layers.values()]
    assert [int(router.counts.sum()) for router in routers] == [50 * 2, 50 * 2]


@pytest.mark.parametrize("size", ["debug", "debug-moe"])
def test_loss_falls_in_30_steps(size: str) -> None:
    torch.manual_seed(0)
    model = build_model(f"qwen3-{size}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # Two documents in one row, to be memorized.
    batch = Batch.from_documents(random_documents([60, 60], 512), length=120)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = run(model, batch, labels=True) / 118
        loss.backward()
        optimizer.step()
        model.finish_step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_parameter_counts_equal_the_published_ones() -> None:
    counts = {}
    for size in QWEN3.presets:
        with torch.device("meta"):
            counts[size] = sum(p.numel() for p in build_model(f"qwen3-{size}").parameters())
    assert counts == {
        "debug": 164_288,
        "debug-moe": 312_768,
        "tiny": 7_630_848,
        "tiny-moe": 17_166_336,
        "0.6b": 596_049_920,
        "1.7b": 1_720_574_976,
        "4b": 4_022_468_096,
        "8b": 8_190_735_360,
        "14b": 14_768_307_200,
        "32b": 32_762_123_264,
        "30b-a3b": 30_532_122_624,
        "235b-a22b": 235_093_634_560,
    }


def test_flops_count_active_experts() -> None:
    """30B parameters, 3.3B active; of these, the embedding lookup of 0.31B has no FLOPs."""
    with torch.device("meta"):
        model = build_model("qwen3-30b-a3b")
        dense = build_model("qwen3-debug")
    mlp = next(iter(model.layers.values())).mlp
    assert isinstance(mlp, MoE)
    expert = sum(p[0].numel() for p in mlp.experts.parameters())
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    total = sum(p.numel() for p in model.parameters())
    active = total - model.embedding.weight.numel() - norms - 48 * (128 - 8) * expert
    assert model.flops_per_token() == 6 * active
    assert round(active / 1e9, 1) == 3.0
    matrices = sum(p.numel() for n, p in dense.named_parameters() if p.dim() == 2 and n != "embedding.weight")
    assert dense.flops_per_token() == 6 * matrices
    assert dense.flops_per_pair("attention") == 12 * 2 * 4 * 32


def test_config_round_trip() -> None:
    for size in QWEN3.presets:
        config = config_of(f"qwen3-{size}")
        assert QWEN3.config_from_hf(QWEN3.hf.config_to_hf(config)) == config


def test_unsupported_hf_config_raises() -> None:
    hf = QWEN3.hf.config_to_hf(QWEN3.presets["debug-moe"])
    for field, value, message in (
        ("use_sliding_window", True, "use_sliding_window = True, which is not supported for Qwen3MoeForCausalLM"),
        ("norm_topk_prob", False, "norm_topk_prob = False"),
        ("mlp_only_layers", [0], r"mlp_only_layers = \[0\]"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "RoPE type 'dynamic'.*expected default or yarn"),
    ):
        with pytest.raises(ValueError, match=message):
            QWEN3.config_from_hf({**hf, field: value})


def test_invalid_config_raises() -> None:
    config = Qwen3Config()
    invalid = (("head_dim", 33), ("num_kv_heads", 3), ("hidden_size", 0), ("num_experts", -1), ("num_experts", 4))
    for field, value in invalid:
        with pytest.raises(ValueError, match=field.replace("_", "-")):
            replace(config, **{field: value})
