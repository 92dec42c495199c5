"""Packed rows in transformers' hybrids equal each document alone, gradients included."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

import sightline.hf
from sightline.hf.recurrence import enable_recurrence, unsupported_recurrence
from sightline.masks import causal, document

LENGTHS = [[11, 1, 20, 5], [2, 18, 17]]  # documents of two rows of 37 tokens
VOCABULARY = 61
LFM2_PASSES_ARGUMENTS = "kwargs" in inspect.signature(Lfm2ShortConv.forward).parameters  # not in transformers 5.16

COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "attention_dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MOE = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"num_dense_layers": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"]}
DELTA = {
    **LINEAR,
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
KIMI = {
    **{**LINEAR, **MOE, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
MAMBA2 = {
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16},
}
ZAMBA = {
    **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": 16},
    **{"num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 2},
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen3_next": ("Qwen3NextGatedDeltaNet", {**DELTA, **MOE}),
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet", DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeGatedDeltaNet", {**DELTA, **MOE}),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet", DELTA),
    "lara_mini": ("LaraMiniGatedDeltaNet", {**DELTA, **MOE}),
    "kimi_linear": ("KimiLinearDeltaAttention", KIMI),
    "bailing_hybrid": ("BailingHybridDeltaAttention", KIMI),
    "bamba": ("BambaMixer", {**MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Mixer", {**MAMBA2, "mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "GraniteMoeHybridMambaLayer",
        {**MAMBA2, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4},
    ),
    "nemotron_h": (
        "NemotronHMamba2Mixer",
        {
            **{"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "num_hidden_layers": 4, "n_groups": 2},
            **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 16},
        },
    ),
    "zamba2": ("Zamba2MambaMixer", {**ZAMBA, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 2}),
    "zamba": ("ZambaMambaMixer", ZAMBA),
    "jamba": ("JambaMambaMixer", {**MOE, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8}),
    "mamba": ("MambaMixer", {"state_size": 8}),
    "mamba2": ("Mamba2Mixer", {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "falcon_mamba": ("FalconMambaMixer", {"state_size": 8}),
    "lfm2": ("Lfm2ShortConv", {**CONVOLUTION, "conv_bias": True}),
    "lfm2_moe": ("Lfm2MoeShortConv", {**CONVOLUTION, **MOE}),
    "lfm3": ("Lfm3ShortConv", {**CONVOLUTION, **MOE}),
    "minimax": ("MiniMaxLightningAttention", {**LINEAR, "num_local_experts": 4, "block_size": 8}),
    "recurrent_gemma": (
        "RecurrentGemmaRecurrentBlock",
        {"block_types": ["recurrent", "attention", "recurrent"], "lru_width": 32, "attention_window_size": 16},
    ),
}
INSTALLED = [family for family in FAMILIES if family in CONFIG_MAPPING]
OF_EACH_KIND = [
    family
    for family in ("qwen3_next", "kimi_linear", "bamba", "mamba", "lfm2", "minimax", "recurrent_gemma")
    if family in INSTALLED
]


def build(family: str, **changes: object) -> PreTrainedModel:
    """Return a small random model, whose parameters are all random, biases of convolutions too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family][1], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def positions(lengths: list[list[int]] = LENGTHS) -> Tensor:
    """Return the positions [2, 37] in documents, with padding as one more."""
    rows = [[*counts, 37 - sum(counts)] for counts in lengths]
    return torch.stack([torch.cat([torch.arange(count) for count in row]) for row in rows])


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 37), generator=torch.Generator().manual_seed(1))


def logits_alone(model: PreTrainedModel, ids: Tensor, lengths: list[list[int]] = LENGTHS) -> Tensor:
    """Return the logits of each document alone, in the places of the packed rows, and 0 for padding."""
    rows = []
    for row, counts in zip(ids, lengths, strict=True):
        documents = row[: sum(counts)].split(counts)
        logits = [model(input_ids=document[None], use_cache=False).logits[0] for document in documents]
        rows.append(torch.cat([*logits, torch.zeros(len(row) - sum(counts), VOCABULARY)]))
    return torch.stack(rows)


def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a sum of the logits with random weights, those of padding being 0."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logits * weights * (logits != 0).any(dim=-1, keepdim=True)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("family", INSTALLED)
def test_packed_equals_alone(family: str) -> None:
    model, ids = build(family), tokens()
    alone = logits_alone(model, ids)
    expected = gradients(model, alone)
    sightline.hf.enable(model)
    packed = model(input_ids=ids, position_ids=positions(), document_lengths=LENGTHS).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert_gradients_close(gradients(model, packed), expected)


@pytest.mark.parametrize("family", INSTALLED)
def test_layers_are_found(family: str) -> None:
    model = build(family)
    assert unsupported_recurrence(model) is None
    assert enable_recurrence(model) == [FAMILIES[family][0]]


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_padding_is_in_no_document(family: str) -> None:
    lengths = [[11, 1, 20], [2, 18]]
    model, ids = build(family), tokens()
    alone = logits_alone(model, ids, lengths)
    expected = gradients(model, alone)
    sightline.hf.enable(model)
    packed = model(input_ids=ids, position_ids=positions(lengths), document_lengths=lengths).logits
    packed = packed * (alone != 0).any(dim=-1, keepdim=True)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert_gradients_close(gradients(model, packed), expected)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_stated_left_padding_is_in_no_document(family: str) -> None:
    model, ids = build(family), tokens()
    documents = torch.zeros(2, 37, dtype=torch.int32)
    documents[0, :5] = documents[1, :9] = -1
    alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in (ids[0, 5:], ids[1, 9:])]
    sightline.hf.enable(model)
    where = torch.stack([torch.arange(37) - 5, torch.arange(37) - 9]).clamp(min=0)
    logits = model(input_ids=ids, position_ids=where, document_ids=documents).logits
    torch.testing.assert_close(logits[documents >= 0], torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "mamba", "lfm2", "recurrent_gemma"])
def test_other_documents_change_no_bit(family: str) -> None:
    model, ids = sightline.hf.enable(build(family)), tokens()
    other = ids.clone()
    other[0, 3] = 3 + (ids[0, 3] - 2) % (VOCABULARY - 3)
    first, second = (model(input_ids=x, document_lengths=LENGTHS).logits for x in (ids, other))
    assert not torch.equal(first[0, 3:11], second[0, 3:11])
    assert torch.equal(first[0, 11:], second[0, 11:]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("source", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_sources_of_transformers(source: str) -> None:
    model, ids = build("qwen3_next"), tokens()
    alone = logits_alone(model, ids)
    sightline.hf.enable(model)
    lengths = torch.tensor([count for row in LENGTHS for count in row])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths).view(2, 37)
    cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    given = {"position_ids": positions(), "cu_seq_lens_q": cumulative, "seq_idx": documents.int()}[source]
    packed = model(input_ids=ids, **{"position_ids": positions(), source: given}).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_one_document_per_row_takes_the_path_of_transformers(family: str) -> None:
    model, ids = build(family), tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    given = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    expected = model(input_ids=ids, attention_mask=mask, **given).logits
    sightline.hf.enable(model)
    found = model(input_ids=ids, attention_mask=mask, **given).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in OF_EACH_KIND if name != "minimax"])
def test_generation_is_unchanged(family: str) -> None:
    model, ids = build(family), tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    sightline.hf.enable(model)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [name for name in OF_EACH_KIND if name != "mamba"])
def test_recomputation_gives_the_same_bits(family: str, reentrant: bool) -> None:
    model, ids = sightline.hf.enable(build(family).train()), tokens()
    given = {"position_ids": positions(), "document_lengths": LENGTHS, "use_cache": False}
    expected = gradients(model, model(input_ids=ids, **given).logits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logits = model(input_ids=ids, **given).logits
    with torch.no_grad():  # another forward in between, of other documents
        model(input_ids=ids, document_lengths=[[37], [37]], use_cache=False)
    if family == "lfm2" and not LFM2_PASSES_ARGUMENTS:
        with pytest.raises(ValueError, match="disable gradient checkpointing"):
            gradients(model, logits)
        return
    found = gradients(model, logits)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_recomputation_of_layers_without_keyword_arguments(family: str) -> None:
    model, ids = sightline.hf.enable(build(family).train()), tokens()
    expected = gradients(model, model(input_ids=ids, use_cache=False).logits)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, model(input_ids=ids, use_cache=False).logits)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logits = model(input_ids=ids, document_lengths=LENGTHS, use_cache=False).logits
    with pytest.raises(ValueError, match="disable gradient checkpointing"):
        logits.sum().backward()
    model.eval().generate(ids, max_new_tokens=2)  # packed rows before do not matter with a cache


def test_disable_and_copies() -> None:
    model, ids = build("qwen3_next"), tokens()
    stock = model(input_ids=ids).logits
    alone = logits_alone(model, ids)
    sightline.hf.enable(sightline.hf.enable(model))  # twice is once
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sightline.hf.disable(model)
        packed = twin(input_ids=ids, document_lengths=LENGTHS).logits
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        sightline.hf.disable(twin)
        assert torch.equal(twin(input_ids=ids).logits, stock)
        assert all("forward" not in vars(module) for module in twin.modules())
        sightline.hf.enable(model)
    sightline.hf.disable(model)
    assert torch.equal(model(input_ids=ids).logits, stock)


def test_a_replaced_forward_is_kept() -> None:
    model, ids, calls = build("lfm2"), tokens(), []
    layer = model.model.layers[0].conv
    original = layer.forward

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        return original(*args, **kwargs)

    layer.forward = counted  # as accelerate's hooks do
    sightline.hf.enable(model)
    calls.clear()
    model(input_ids=ids, document_lengths=LENGTHS)
    assert calls
    sightline.hf.disable(model)
    assert layer.forward is counted


@pytest.mark.parametrize(
    ("family", "layer"), [("zaya", "ZayaCCAProjection"), ("inkling_text", "InklingShortConvolution")]
)
def test_layers_of_another_kind_are_refused(family: str, layer: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON))
    with pytest.raises(ValueError, match=f"{layer} carries a state from one document of a row to the next"):
        sightline.hf.enable(model)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_shared_prefixes(family: str) -> None:
    """A prompt of 9 tokens with two responses, of which one is continued twice; not all directly after their prefix."""
    counts, parents = [9, 6, 8, 7, 7], [0, 0, 0, 1, 1]
    model, ids = build(family), tokens()[:1]
    documents = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))[None]
    spans = list(ids[0].split(counts))
    chains = [spans[0], *(torch.cat([spans[0], spans[i]]) for i in (1, 2))]
    chains += [torch.cat([chains[1], spans[i]]) for i in (3, 4)]
    alone = torch.cat(
        [model(input_ids=x[None], use_cache=False).logits[0, -n:] for x, n in zip(chains, counts, strict=True)]
    )[None]
    expected = gradients(model, alone)
    sightline.hf.enable(model)
    where = torch.cat([torch.arange(len(x))[-n:] for x, n in zip(chains, counts, strict=True)])[None]
    prefixes = torch.tensor(parents)[documents]
    packed = model(input_ids=ids, position_ids=where, document_ids=documents, prefix_ids=prefixes).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert_gradients_close(gradients(model, packed), expected)


def test_masks_of_the_caller_are_refused() -> None:
    model, ids = sightline.hf.enable(build("lfm2")), tokens()
    mask = document(torch.arange(37).expand(2, -1) // 10) & causal(2, 37)
    with pytest.raises(
        ValueError, match="Lfm2Model has recurrent layers, which need all tokens of a document in order"
    ):
        model(input_ids=ids, attention_masks=mask)
    with pytest.raises(ValueError, match="does not tell where documents start; pass document_ids"):
        model(input_ids=ids, attention_mask=mask.to_dense()[:, None])
