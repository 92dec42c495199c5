from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3NextConfig as TheirConfig
from transformers import Qwen3NextForCausalLM

from sightline import Batch
from sightline.generation import SamplingConfig, generate
from sightline.layers import GatedDeltaNet, MoE, RecurrentCache
from sightline.models import Qwen3NextConfig, build_model, config_of
from sightline.models.qwen3_next import QWEN3_NEXT
from tests.support.against_transformers import (
    as_ours,
    assert_cached_logits,
    assert_no_leakage,
    assert_round_trip,
    assert_same_model,
    pieces,
    random_documents,
    random_theirs,
    run,
)

V = 96
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "router_aux_loss_coef": 0.0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
MODELS = {
    "moe": TheirConfig(num_experts=4, **EXPERTS, **SIZES),
    "dense": TheirConfig(num_experts=0, intermediate_size=96, tie_word_embeddings=True, **SIZES),
}
# Chunks of the scan have 64 tokens: one document longer than three chunks, and documents that start inside chunks.
CASES = {"one document": ([200], 200), "packed": ([1, 70, 2, 3, 62, 100, 38, 20], 138)}


@pytest.fixture(scope="module", params=MODELS)
def theirs(request: pytest.FixtureRequest) -> Any:
    # With the default spread of 0.15, float32 logits differ from float64 by 2e-4, in their model and in ours.
    return random_theirs(Qwen3NextForCausalLM, MODELS[request.param], spread=0.08)


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
    assert_cached_logits(ours, random_documents([90], V)[0], cuts=[2, 3, 5, 70, 71, 72, 89])


@pytest.mark.parametrize(("row", "changed"), [(0, 0), (0, 29), (0, 36), (1, 3)])
def test_no_leakage_between_documents_with_experts(ours: Any, row: int, changed: int) -> None:
    assert_no_leakage(ours, Batch.from_documents(random_documents([30, 7, 43, 23], V), length=80), row, changed)


def make_batch() -> Batch:
    """Two rows of 140: [70, 1, 3, 66 of 90], and [the other 24, 80, padding]. Chunks of the scan end at 64 and 128."""
    batch = Batch.from_documents(random_documents([70, 1, 3, 90, 80], 512), length=140)
    assert batch.shape == (2, 140) and (batch.document_ids == -1).sum() == 36
    return batch


@pytest.mark.parametrize("changed", [0, 68, 69, 70, 72, 74, 135])  # in row 0, around document boundaries
def test_no_leakage_between_documents(changed: int) -> None:
    """In float32 through convolution, recurrent state and attention, with dense layers instead of experts."""
    torch.manual_seed(0)
    model, batch = build_model(replace(QWEN3_NEXT.presets["debug"], num_experts=0, intermediate_size=96)), make_batch()
    tokens = batch.tokens.clone()
    tokens[0, changed] = 511 if tokens[0, changed] != 511 else 510
    perturbed = replace(batch, tokens=tokens)
    same_document = batch.document_ids == batch.document_ids[0, changed]
    same_document[1] = False
    other = ~same_document

    def logits_and_grads(batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits, and the gradients of the embedded tokens by the summed loss."""
        h = model.embedding(batch.tokens)
        masks = model.get_attention_masks(batch)
        inputs = {"attention_masks": masks, "positions": batch.positions, "cache": None}
        (grads,) = torch.autograd.grad(model.forward_embedded(h, labels=batch.labels, **inputs), h)
        return run(model, batch), grads

    (before, grads_before), (after, grads_after) = logits_and_grads(batch), logits_and_grads(perturbed)
    assert torch.equal(before[other], after[other]) and torch.equal(grads_before[other], grads_after[other])
    assert grads_before[other].abs().sum() > 0
    assert torch.equal(before[0, :changed], after[0, :changed]) and (before[0, changed] != after[0, changed]).any()
    padding = batch.document_ids == -1
    assert before.isfinite().all() and not grads_before[padding].any()


def test_packed_equals_separate() -> None:
    torch.manual_seed(0)
    # Without the auxiliary load-balancing loss, which is computed over full rows, not per document.
    model, batch = build_model(replace(QWEN3_NEXT.presets["debug"], aux_loss_coef=0.0)).double(), make_batch()
    logits, loss = run(model, batch), run(model, batch, labels=True)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    single_loss = torch.zeros((), dtype=torch.float64)
    for row, index in pieces(batch):
        single = Batch(
            tokens=batch.tokens[row, index][None],
            labels=batch.labels[row, index][None],
            document_ids=torch.zeros(1, len(index), dtype=torch.int32),
            positions=batch.positions[row, index][None],
        )
        torch.testing.assert_close(run(model, single)[0], logits[row, index], atol=1e-10, rtol=0)
        single_loss = single_loss + run(model, single, labels=True)
    for grad, expected in zip(grads, torch.autograd.grad(single_loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-8, rtol=1e-8)


def test_layer_types_and_their_caches() -> None:
    """Three recurrent layers, whose cache has a fixed size, and one attention layer."""
    model = build_model("qwen3_next-debug")
    assert [isinstance(layer.mixer, GatedDeltaNet) for layer in model.layers.values()] == [True, True, True, False]
    assert [isinstance(cache, RecurrentCache) for cache in model.new_cache().values()] == [True, True, True, False]


class Letters:
    """A tokenizer with one token per letter."""

    eos_id = -1

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


def test_generated_text_equals_uncached_text() -> None:
    torch.manual_seed(0)
    model = build_model("qwen3_next-debug")
    text = [ord(letter) for letter in "documents"]
    with torch.no_grad():
        for _ in range(8):
            text.append(int(run(model, Batch.from_documents([text], length=len(text)))[0, -1].argmax()))
    generated = generate(model, Letters(), "documents", SamplingConfig(max_new_tokens=8, temperature=0))
    assert [ord(letter) for letter in generated] == text[9:]


def test_loss_falls_in_30_steps() -> None:
    torch.manual_seed(0)
    model = build_model("qwen3_next-debug")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = Batch.from_documents(random_documents([60, 60], 512), length=120)  # in one row, to be memorized
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = run(model, batch, labels=True) / 118
        loss.backward()
        optimizer.step()
        model.finish_step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_parameter_counts() -> None:
    """The published model as in transformers, without its MTP module."""
    counts = {}
    for size in QWEN3_NEXT.presets:
        with torch.device("meta"):
            counts[size] = sum(p.numel() for p in build_model(f"qwen3_next-{size}").parameters())
    assert counts == {"debug": 258_984, "tiny": 12_350_992, "80b-a3b": 79_674_391_296}


def test_flops_count_active_matrices() -> None:
    """80B parameters, 3.9B active; of these, the embedding lookup of 0.3B has no FLOPs."""
    with torch.device("meta"):
        model = build_model("qwen3_next-80b-a3b")
    parameters = dict(model.named_parameters())
    skipped = ("embedding", "norm", "A_log", "dt_bias", "convolution")
    matrices = sum(p.numel() for name, p in parameters.items() if not any(part in name for part in skipped))
    mlp = model.layers["0"].mlp
    assert isinstance(mlp, MoE)
    unused = 48 * (512 - 10) * sum(p[0].numel() for p in mlp.experts.parameters())
    state = 36 * 32 * 128 * 128
    assert model.flops_per_token() == 6 * (matrices - unused) + 18 * state
    assert round((matrices - unused) / 1e9, 1) == 3.6
    assert model.flops_per_pair("attention") == 12 * 12 * 16 * 256


@pytest.mark.parametrize("name", QWEN3_NEXT.presets)
def test_config_round_trip(name: str) -> None:
    config = config_of(f"qwen3_next-{name}")
    assert QWEN3_NEXT.config_from_hf(QWEN3_NEXT.hf.config_to_hf(config)) == config


def test_published_config_equals_preset() -> None:
    """The config.json of Qwen/Qwen3-Next-80B-A3B-Instruct, which gives an interval instead of layer types."""
    published = {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
    assert replace(QWEN3_NEXT.config_from_hf(published), intermediate_size=688) == config_of("qwen3_next-80b-a3b")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\], .*expected \[\]"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False, .*expected True"),
        ({"layer_types": ["linear_attention", "full_attention"] * 2 + ["full_attention"]}, "layer_types = "),
        ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE type 'yarn'"),
    ],
)
def test_unsupported_hf_config_raises(fields: dict[str, Any], text: str) -> None:
    hf = {
        **QWEN3_NEXT.hf.config_to_hf(config_of("qwen3_next-debug")),
        "num_hidden_layers": 5,
        "layer_types": None,
        **fields,
    }
    with pytest.raises(ValueError, match=text):
        QWEN3_NEXT.config_from_hf(hf)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"linear_num_value_heads": 6},
            r"num-value-heads 6 is not divisible by model.linear-num-key-heads 4; .*\[1, 2, 3, 6\]",
        ),
        ({"num_kv_heads": 3}, r"heads 4 is not divisible by model.num-kv-heads 3"),
        ({"partial_rotary_factor": 0.0}, "partial-rotary-factor 0.0 of model.head-dim 64 is 0 channels"),
        ({"partial_rotary_factor": 1.5}, "partial-rotary-factor 1.5 of model.head-dim 64 is 96 channels"),
        ({"partial_rotary_factor": 0.05}, "must be even.*got 3"),
        ({"experts_per_token": 9}, "experts-per-token is 9, but there are only 8 experts"),
        ({"num_experts": -1}, "model.num-experts must be greater than 0, got -1"),
        ({"num_experts": 0, "intermediate_size": 0}, "model.intermediate-size must be greater than 0, got 0"),
        ({"linear_conv_kernel_dim": 0}, "model.linear-conv-kernel-dim must be greater than 0, got 0"),
    ],
)
def test_invalid_config_raises(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Qwen3NextConfig(**fields)
