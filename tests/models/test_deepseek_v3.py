import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config as TheirConfig
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer

from sightline import Batch
from sightline.models import DeepseekV3Config, build_model, config_of, load_pretrained, save_pretrained
from sightline.models.deepseek_v3 import DEEPSEEK_V3, shift_for_mtp
from tests.support.against_transformers import (
    as_ours,
    assert_cached_logits,
    assert_no_leakage,
    assert_round_trip,
    assert_same_model,
    count_parameters,
    pieces,
    random_documents,
    random_theirs,
    run,
)
from tests.support.small_runs import rows_of, small_run, train_quietly, weights_of, write_corpus

V = 96
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "beta_fast": 3.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "groups, yarn, low-rank queries": TheirConfig(
        **SIZES,
        q_lora_rank=20,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        rope_parameters=YARN,
    ),
    "no groups, two shared experts, large v_head_dim": TheirConfig(
        **SIZES,
        q_lora_rank=None,
        v_head_dim=28,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        routed_scaling_factor=1.0,
    ),
}
CASES = {"one document": ([40], 40), "packed": ([1, 30, 2, 7, 17, 23, 8], 40)}
WITH_MTP = DeepseekV3Config(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=4,
    experts_per_token=2,
    mtp_loss_weight=0.3,
)


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request: pytest.FixtureRequest) -> Any:
    theirs = random_theirs(DeepseekV3ForCausalLM, CONFIGS[request.param])
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer))  # as large as the scores: it must affect selection, not weights
    return theirs


@pytest.fixture
def ours(theirs: Any, tmp_path: Path) -> Any:
    return as_ours(theirs, tmp_path / "theirs")


def model_with_mtp(config: DeepseekV3Config = WITH_MTP) -> Any:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(theirs: Any, ours: Any, case: str) -> None:
    lengths, length = CASES[case]
    assert_same_model(ours, theirs, random_documents(lengths, V), length)


def test_transformers_loads_saved_model(theirs: Any, ours: Any, tmp_path: Path) -> None:
    assert_round_trip(ours, theirs, DeepseekV3ForCausalLM, torch.tensor(random_documents([40], V)), tmp_path / "back")


def test_cached_logits_equal_full_forward(ours: Any) -> None:
    assert_cached_logits(ours, random_documents([30], V)[0], cuts=[5, 6, 15, 29])


@pytest.mark.parametrize(("row", "changed"), [(0, 0), (0, 1), (0, 20), (1, 3)])
def test_no_leakage_between_documents(ours: Any, row: int, changed: int) -> None:
    assert_no_leakage(ours, Batch.from_documents(random_documents([1, 30, 2, 7, 17, 22], V), length=40), row, changed)


def test_expert_counts_exclude_padding() -> None:
    """Two rows of 12 with 17 tokens; 3 layers with experts, the last of them in the MTP module."""
    model = model_with_mtp(dataclasses.replace(WITH_MTP, num_layers=3))
    batch = Batch.from_documents(random_documents([9, 8], V), length=12)
    run(model, batch, labels=True)
    counts = {name: layer.mlp.router.counts for name, layer in model.layers.items() if name != "0"}
    counts["prediction"] = model.prediction.block.mlp.router.counts
    assert {name: int(count.sum()) for name, count in counts.items()} == {"1": 34, "2": 34, "prediction": 34}
    assert list(model.finish_step()) == [
        "expert_load/layers.1.mlp",
        "expert_load/layers.2.mlp",
        "expert_load/prediction.block.mlp",
        "mtp_loss",
    ]
    assert model.finish_step() == {}, "a step is reported once"


def test_shift_for_mtp_by_hand() -> None:
    """A document of 3 without a loss at its second token, one of 2, one that continues in row 1; then padding."""
    tokens = torch.tensor([[10, 11, 12, 20, 21, 30, 31], [32, 33, 0, 0, 0, 0, 0]])
    labels = torch.tensor([[11, -100, -100, 21, -100, 31, 32], [33, -100, -100, -100, -100, -100, -100]])
    next_tokens, next_labels = shift_for_mtp(tokens, labels)
    assert next_tokens.tolist() == [[11, 12, 20, 21, 30, 31, 32], [33, 0, 0, 0, 0, 0, 32]]
    assert next_labels.tolist() == [[-100, -100, -100, -100, -100, 32, -100], [-100] * 7]
    assert shift_for_mtp(tokens[:, :3], torch.tensor([[11, 12, -100]] * 2))[1].tolist() == [[12, -100, -100]] * 2


def test_mtp_loss_and_gradients_equal_transformers(tmp_path: Path) -> None:
    """Reference: their MTP layer on top of their model. Gradients of parameters that both losses reach."""
    ours = model_with_mtp()
    save_pretrained(ours, tmp_path)
    config = TheirConfig.from_pretrained(tmp_path, attn_implementation="eager")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, config=config)
    one_more = TheirConfig.from_pretrained(tmp_path, num_hidden_layers=3, attn_implementation="eager")
    last = DeepseekV3ForCausalLM.from_pretrained(tmp_path, config=one_more).model.layers[2]
    layer = MtpLayer(config, lambda *_: last, type(theirs.model.norm), 2)
    state = load_file(tmp_path / "model.safetensors")
    parts = {"enorm": layer.enorm, "hnorm": layer.hnorm, "eh_proj": layer.eh_proj, "shared_head.norm": layer.post_norm}
    for name, part in parts.items():
        part.weight.data = state[f"model.layers.2.{name}.weight"].clone()

    (tokens,) = random_documents([20], V)
    ids, n = torch.tensor([tokens]), len(tokens) - 1
    h = theirs.model(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(n)[None]
    h_mtp = layer(
        theirs.model.embed_tokens(ids[:, 1:]),
        h[:, :n],
        position_embeddings=theirs.model.rotary_emb(h, positions),
        attention_mask=torch.full((n, n), -torch.inf).triu(1)[None, None],
        position_ids=positions,
        past_key_values=None,
    )
    next_loss = F.cross_entropy(theirs.lm_head(h)[0, :-1], ids[0, 1:], reduction="sum")
    mtp_loss = F.cross_entropy(theirs.lm_head(h_mtp)[0, :-1], ids[0, 2:], reduction="sum")
    (next_loss + 0.3 * mtp_loss).backward()

    loss = run(ours, Batch.from_documents([tokens], length=20), labels=True)
    loss.backward()
    torch.testing.assert_close(loss, next_loss)
    torch.testing.assert_close(ours.finish_step()["mtp_loss"], mtp_loss / (n - 1))
    for mine, other in (
        (ours.embedding, theirs.model.embed_tokens),
        (ours.output, theirs.lm_head),
        (ours.norm, theirs.model.norm),
        (ours.prediction.norm, layer.post_norm),
        (ours.prediction.hidden_norm, layer.hnorm),
        (ours.prediction.embedding_norm, layer.enorm),
        (ours.prediction.join, layer.eh_proj),
        (ours.prediction.block.mlp.router, last.mlp.gate),
        (ours.layers["0"].mlp.down, theirs.model.layers[0].mlp.down_proj),
    ):
        largest = other.weight.grad.abs().max().item()
        assert largest > 1e-3
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, atol=1e-3 * largest, rtol=0)


def test_packed_mtp_equals_separate() -> None:
    """Packed rows, one of them with a document that continues in the next, and their documents one by one."""
    model = model_with_mtp().double()
    batch = Batch.from_documents(random_documents([9, 1, 2, 20, 3], V), length=16)
    loss, grads, mtp_loss, count = losses_and_gradients(model, batch)
    alone = [torch.zeros_like(loss), [torch.zeros_like(grad) for grad in grads], 0.0, 0]
    for row, index in pieces(batch):
        names = ("tokens", "labels", "positions")
        single = {name: getattr(batch, name)[row, index][None] for name in names}
        one = Batch(**single, document_ids=torch.zeros(1, len(index), dtype=torch.int32))
        result = losses_and_gradients(model, one)
        alone = [alone[0] + result[0], [a + b for a, b in zip(alone[1], result[1], strict=True)], *alone[2:]]
        alone[2:] = [alone[2] + result[2], alone[3] + result[3]]
    assert count == alone[3] == 7 + 0 + 0 + 3 + 14 + 1, (
        "document length - 2, or - 1 if the document continues in the next row"
    )
    torch.testing.assert_close([loss, mtp_loss], [alone[0], alone[2]])
    for grad, expected in zip(grads, alone[1], strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-9, rtol=1e-9)


def losses_and_gradients(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor, int]:
    """Return the loss, the gradients of all parameters, the MTP loss and the number of MTP labels."""
    loss = run(model, batch, labels=True)
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    mtp_loss, count = model.mtp_losses[-1]
    model.finish_step()
    model.prediction.block.mlp.router.expert_bias.zero_()
    model.layers["1"].mlp.router.expert_bias.zero_()
    return loss.detach(), list(grads), mtp_loss, int(count)


def test_returned_loss_excludes_mtp_loss() -> None:
    model = model_with_mtp()
    plain = model_with_mtp(dataclasses.replace(WITH_MTP, mtp_loss_weight=None))
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if "prediction" not in name})
    batch = Batch.from_documents(random_documents([9, 20], V), length=32)
    assert torch.equal(run(model, batch, labels=True), run(plain, batch, labels=True))
    assert len(model.mtp_losses) == 1
    model.eval()
    run(model, batch, labels=True)
    assert len(model.mtp_losses) == 1, "validation has no MTP loss"


def test_mtp_module_hf_round_trip(tmp_path: Path) -> None:
    model = model_with_mtp()
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == model.config
    expected = model.state_dict()
    assert list(back.state_dict()) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in back.state_dict().items())


PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""The config.json of DeepSeek V3 without its quantization fields."""


def test_published_config_equals_preset() -> None:
    assert DEEPSEEK_V3.config_from_hf(PUBLISHED) == config_of("deepseek_v3-671b")


@pytest.mark.parametrize(
    ("size", "count"),
    [("671b", 671_026_404_352), ("16b", 15_706_484_224), ("tiny", 14_160_256), ("debug", 168_864)],
)
def test_parameter_count_equals_transformers(size: str, count: int) -> None:
    config = config_of(f"deepseek_v3-{size}")
    fields = DEEPSEEK_V3.hf.config_to_hf(config)
    their_config = TheirConfig(**{n: value for n, value in fields.items() if n not in ("architectures", "model_type")})
    with torch.device("meta"):
        ours, theirs = build_model(config), DeepseekV3ForCausalLM(their_config)
    assert count_parameters(ours) == count_parameters(theirs) == count
    assert DEEPSEEK_V3.config_from_hf({**their_config.to_dict(), "architectures": fields["architectures"]}) == config


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'.*expected 'sigmoid'"),
        ({"rope_interleave": False}, "rope_interleave = False.*expected True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE type 'linear'.*expected default or yarn"),
    ],
)
def test_unsupported_hf_config_raises(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DEEPSEEK_V3.config_from_hf({**PUBLISHED, **fields})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kv_lora_rank": 0}, "model.kv-lora-rank must be greater than 0, got 0"),
        ({"q_lora_rank": 0}, "model.q-lora-rank must be greater than 0, got 0"),
        ({"qk_rope_head_dim": 15}, "model.qk-rope-head-dim must be even.*got 15"),
        ({"num_dense_layers": 7}, r"model.num-dense-layers must be 0 to 6 \(model.num-layers\), got 7"),
        ({"experts_per_token": 17}, "experts-per-token is 17, but there are only 16 experts"),
        ({"num_expert_groups": 3}, r"experts 16 is not divisible by model.num-expert-groups 3; .*\[1, 2, 4, 8, 16\]"),
        ({"num_expert_groups": 4, "num_limited_groups": 5}, r"num-limited-groups must be at most 4 \(.*\), got 5"),
        ({"num_expert_groups": 8, "num_limited_groups": 1}, "num-limited-groups 1 makes 2 experts available.*is 4"),
        ({"num_expert_groups": 16, "num_limited_groups": 8}, "16 in 16 groups leave one expert per group; lower"),
    ],
)
def test_invalid_config_raises(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DeepseekV3Config(**fields)


@pytest.mark.parametrize("mtp_loss_weight", [None, 0.3])
@pytest.mark.parametrize("num_dense_layers", [1, 2])
def test_flops_count_active_matrices(mtp_loss_weight: float | None, num_dense_layers: int) -> None:
    config = dataclasses.replace(WITH_MTP, mtp_loss_weight=mtp_loss_weight, num_dense_layers=num_dense_layers)
    model = build_model(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and name != "embedding.weight":
            active = config.experts_per_token / config.num_experts if ".experts." in name else 1.0
            uses = 2 if name == "output.weight" and mtp_loss_weight else 1
            total += parameter.numel() * active * uses
    assert model.flops_per_token() == 6 * total
    layers = 2 if mtp_loss_weight is None else 3
    assert model.flops_per_pair("attention") == 6 * layers * 2 * (16 + 8)


def small(tmp_path: Path, **changes: Any) -> Any:
    model = dataclasses.replace(config_of("deepseek_v3-debug"), vocab_size=320, mtp_loss_weight=0.3)
    return small_run(tmp_path / "run", write_corpus(tmp_path / "source"), model=model, **changes)


def test_small_run_lowers_losses_and_logs_expert_load(tmp_path: Path) -> None:
    config = small(tmp_path, training__steps=30)
    train_quietly(config)
    rows = rows_of(config.output_dir)
    for name in ("loss", "mtp_loss"):
        losses = [row[name] for row in rows]
        assert len(losses) == 30 and sum(losses[-5:]) < 0.9 * sum(losses[:5]), name
    assert all(1.0 <= row["expert_load/layers.1.mlp"] <= 8.0 for row in rows)


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    """Bit for bit, including the expert bias: otherwise other experts would be selected."""
    config = small(tmp_path, checkpoint__keep=9)
    train_quietly(config)
    expected_rows, expected = rows_of(config.output_dir), weights_of(config.output_dir)
    checkpoints = config.output_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-3", "step-6", "step-8"]
    for later in ("step-6", "step-8"):
        shutil.rmtree(checkpoints / later)
    train_quietly(config)
    assert rows_of(config.output_dir) == expected_rows
    found = weights_of(config.output_dir)
    assert found["layers.1.mlp.router.expert_bias"].abs().max() > 0
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
