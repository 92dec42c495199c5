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
    assert_needle,
    assert_same_model,
    assert_way_back,
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
    "groups, yarn, queries through a latent": TheirConfig(
        **SIZES,
        q_lora_rank=20,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        rope_parameters=YARN,
    ),
    "no groups, two shared experts, a large value": TheirConfig(
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
WITH_PREDICTION = DeepseekV3Config(
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
            buffer.copy_(torch.randn_like(buffer))  # as large as the scores: it must choose and must not weigh
    return theirs


@pytest.fixture
def ours(theirs: Any, tmp_path: Path) -> Any:
    return as_ours(theirs, tmp_path / "theirs")


def predicting(config: DeepseekV3Config = WITH_PREDICTION) -> Any:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(theirs: Any, ours: Any, case: str) -> None:
    lengths, length = CASES[case]
    assert_same_model(ours, theirs, random_documents(lengths, V), length)


def test_transformers_reads_what_we_write(theirs: Any, ours: Any, tmp_path: Path) -> None:
    assert_way_back(ours, theirs, DeepseekV3ForCausalLM, torch.tensor(random_documents([40], V)), tmp_path / "back")


def test_a_cache_of_latents_gives_the_logits_of_the_whole(ours: Any) -> None:
    assert_cached_logits(ours, random_documents([30], V)[0], cuts=[5, 6, 15, 29])


@pytest.mark.parametrize(("row", "changed"), [(0, 0), (0, 1), (0, 20), (1, 3)])
def test_needle_no_other_document_changes(ours: Any, row: int, changed: int) -> None:
    assert_needle(ours, Batch.from_documents(random_documents([1, 30, 2, 7, 17, 22], V), length=40), row, changed)


def test_padding_is_not_counted() -> None:
    """Two rows of 12: 17 tokens, 3 layers with experts, of which the last is told the next token."""
    model = predicting(dataclasses.replace(WITH_PREDICTION, num_layers=3))
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
    assert model.finish_step() == {}, "a step is told once"


def test_look_further_by_hand() -> None:
    """A document of 3 without a loss at its second token, one of 2, one that goes on in row 1; then padding."""
    tokens = torch.tensor([[10, 11, 12, 20, 21, 30, 31], [32, 33, 0, 0, 0, 0, 0]])
    labels = torch.tensor([[11, -100, -100, 21, -100, 31, 32], [33, -100, -100, -100, -100, -100, -100]])
    next_tokens, next_labels = shift_for_mtp(tokens, labels)
    assert next_tokens.tolist() == [[11, 12, 20, 21, 30, 31, 32], [33, 0, 0, 0, 0, 0, 32]]
    assert next_labels.tolist() == [[-100, -100, -100, -100, -100, 32, -100], [-100] * 7]
    assert shift_for_mtp(tokens[:, :3], torch.tensor([[11, 12, -100]] * 2))[1].tolist() == [[12, -100, -100]] * 2


def test_prediction_is_that_of_transformers(tmp_path: Path) -> None:
    """Their layer over their model: its loss, and the gradients of what both losses reach."""
    ours = predicting()
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
    further = layer(
        theirs.model.embed_tokens(ids[:, 1:]),
        h[:, :n],
        position_embeddings=theirs.model.rotary_emb(h, positions),
        attention_mask=torch.full((n, n), -torch.inf).triu(1)[None, None],
        position_ids=positions,
        past_key_values=None,
    )
    next_loss = F.cross_entropy(theirs.lm_head(h)[0, :-1], ids[0, 1:], reduction="sum")
    further_loss = F.cross_entropy(theirs.lm_head(further)[0, :-1], ids[0, 2:], reduction="sum")
    (next_loss + 0.3 * further_loss).backward()

    loss = run(ours, Batch.from_documents([tokens], length=20), labels=True)
    loss.backward()
    torch.testing.assert_close(loss, next_loss)
    torch.testing.assert_close(ours.finish_step()["mtp_loss"], further_loss / (n - 1))
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


def test_prediction_respects_documents() -> None:
    """Packed rows, one of them with a document that goes on in the next, and their documents one by one."""
    model = predicting().double()
    batch = Batch.from_documents(random_documents([9, 1, 2, 20, 3], V), length=16)
    loss, grads, predicted, count = loss_and_prediction(model, batch)
    alone = [torch.zeros_like(loss), [torch.zeros_like(grad) for grad in grads], 0.0, 0]
    for row, index in pieces(batch):
        names = ("tokens", "labels", "positions")
        single = {name: getattr(batch, name)[row, index][None] for name in names}
        one = Batch(**single, document_ids=torch.zeros(1, len(index), dtype=torch.int32))
        result = loss_and_prediction(model, one)
        alone = [alone[0] + result[0], [a + b for a, b in zip(alone[1], result[1], strict=True)], *alone[2:]]
        alone[2:] = [alone[2] + result[2], alone[3] + result[3]]
    assert count == alone[3] == 7 + 0 + 0 + 3 + 14 + 1, "two less than a document has, one less where it goes on"
    torch.testing.assert_close([loss, predicted], [alone[0], alone[2]])
    for grad, expected in zip(grads, alone[1], strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-9, rtol=1e-9)


def loss_and_prediction(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor, int]:
    loss = run(model, batch, labels=True)
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    predicted, count = model.predicted[-1]
    model.finish_step()
    model.prediction.block.mlp.router.expert_bias.zero_()
    model.layers["1"].mlp.router.expert_bias.zero_()
    return loss.detach(), list(grads), predicted, int(count)


def test_the_loss_that_is_told_is_that_of_the_next_token() -> None:
    model = predicting()
    plain = predicting(dataclasses.replace(WITH_PREDICTION, mtp_loss_weight=None))
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if "prediction" not in name})
    batch = Batch.from_documents(random_documents([9, 20], V), length=32)
    assert torch.equal(run(model, batch, labels=True), run(plain, batch, labels=True))
    assert len(model.predicted) == 1
    model.eval()
    run(model, batch, labels=True)
    assert len(model.predicted) == 1, "validation predicts the next token alone"


def test_prediction_goes_to_hugging_face_and_back(tmp_path: Path) -> None:
    model = predicting()
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
"""The config.json of DeepSeek V3, but for its quantization."""


def test_the_published_config_is_our_size() -> None:
    assert DEEPSEEK_V3.config_from_hf(PUBLISHED) == config_of("deepseek_v3-671b")


@pytest.mark.parametrize(
    ("size", "count"),
    [("671b", 671_026_404_352), ("16b", 15_706_484_224), ("tiny", 14_160_256), ("debug", 168_864)],
)
def test_parameters_are_counted_as_by_transformers(size: str, count: int) -> None:
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
def test_configs_of_other_models_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DEEPSEEK_V3.config_from_hf({**PUBLISHED, **fields})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kv_lora_rank": 0}, "model.kv-lora-rank must be greater than 0, got 0"),
        ({"q_lora_rank": 0}, "model.q-lora-rank must be greater than 0, got 0"),
        ({"qk_rope_head_dim": 15}, "model.qk-rope-head-dim must be even.*got 15"),
        ({"num_dense_layers": 7}, "model.num-dense-layers must be 0 to 6, all layers, got 7"),
        ({"experts_per_token": 17}, "experts-per-token is 17, but there are only 16 experts"),
        ({"num_expert_groups": 3}, r"experts 16 is not divisible by model.num-expert-groups 3; .*\[1, 2, 4, 8, 16\]"),
        ({"num_expert_groups": 4, "num_limited_groups": 5}, "groups-per-token must be at most 4, all groups, got 5"),
        ({"num_expert_groups": 8, "num_limited_groups": 1}, "groups-per-token 1 opens 2 experts.*sent to 4"),
        ({"num_expert_groups": 16, "num_limited_groups": 8}, "16 in 16 groups leave one to each; lower"),
    ],
)
def test_config_refuses(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DeepseekV3Config(**fields)


@pytest.mark.parametrize("prediction_weight", [None, 0.3])
@pytest.mark.parametrize("dense_layers", [1, 2])
def test_flops_are_those_of_the_matrices_a_token_meets(prediction_weight: float | None, dense_layers: int) -> None:
    config = dataclasses.replace(WITH_PREDICTION, mtp_loss_weight=prediction_weight, num_dense_layers=dense_layers)
    model = build_model(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and name != "embedding.weight":
            share = config.experts_per_token / config.num_experts if ".experts." in name else 1.0
            outputs = 2 if name == "output.weight" and prediction_weight else 1
            total += parameter.numel() * share * outputs
    assert model.flops_per_token() == 6 * total
    layers = 2 if prediction_weight is None else 3
    assert model.flops_per_pair("attention") == 6 * layers * 2 * (16 + 8)


def small(tmp_path: Path, **changes: Any) -> Any:
    model = dataclasses.replace(config_of("deepseek_v3-debug"), vocab_size=320, mtp_loss_weight=0.3)
    return small_run(tmp_path / "run", write_corpus(tmp_path / "source"), model=model, **changes)


def test_a_small_run_learns_and_tells_its_loads(tmp_path: Path) -> None:
    described = small(tmp_path, training__steps=30)
    train_quietly(described)
    rows = rows_of(described.output_dir)
    for name in ("loss", "mtp_loss"):
        losses = [row[name] for row in rows]
        assert len(losses) == 30 and sum(losses[-5:]) < 0.9 * sum(losses[:5]), name
    assert all(1.0 <= row["expert_load/layers.1.mlp"] <= 8.0 for row in rows)


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path) -> None:
    """The balance too, to the bit: without it other experts would be chosen."""
    described = small(tmp_path, checkpoint__keep=9)
    train_quietly(described)
    expected_rows, expected = rows_of(described.output_dir), weights_of(described.output_dir)
    checkpoints = described.output_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-3", "step-6", "step-8"]
    for later in ("step-6", "step-8"):
        shutil.rmtree(checkpoints / later)
    train_quietly(described)
    assert rows_of(described.output_dir) == expected_rows
    found = weights_of(described.output_dir)
    assert found["layers.1.mlp.router.expert_bias"].abs().max() > 0
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
