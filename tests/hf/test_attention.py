"""The registered name alone: right, or refused with the remedy."""

import pytest
import torch
from transformers import AttentionInterface

import sightline.hf
from sightline.hf.attention import packed_attention
from tests.hf.test_enable import LAYOUT, OTHER, alone, close, ways_to_state
from tests.support.hf_models import causal_classes, document_ids, packed_rows, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "deepseek_v3", "afmoe"])
def test_name_alone_is_right_where_layers_receive_positions(family: str) -> None:
    model = tiny_model(family)
    rows = packed_rows(LAYOUT, OTHER)
    expected = alone(model, rows, LAYOUT, OTHER)
    model.set_attn_implementation("sightline")
    for name, arguments in ways_to_state(rows, LAYOUT, OTHER).items():
        if name in ("embeddings", "numbered mask", "document_lengths"):
            continue
        with torch.no_grad():
            assert close(model(**arguments).logits, expected), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama4_text", "ctrl", "gpt_bigcode", "persimmon"])
def test_name_alone_refuses_where_nothing_states_documents(family: str, training: bool) -> None:
    model = tiny_model(family).train(training)
    try:
        model.set_attn_implementation("sightline")
    except ValueError as error:
        pytest.skip(str(error))
    rows = packed_rows(LAYOUT)
    if model.config._attn_implementation != "sightline":
        pytest.skip(f"{family} takes no attention implementation")
    with pytest.raises(ValueError, match=r"nothing tells sightline where.*sightline\.hf\.enable\(model\)"):
        model(**rows, attention_mask=torch.ones_like(rows["input_ids"]))


def test_a_padding_mask_states_rows() -> None:
    model = tiny_model("llama4_text")
    tokens = packed_rows((12,), (12,))["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    model.set_attn_implementation("sightline")
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    assert close(logits[mask.bool()], expected[mask.bool()])


def test_dense_mask_that_contradicts_positions_is_refused() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sightline")
    rows = packed_rows(LAYOUT)
    with pytest.raises(ValueError, match="disagree about documents"):
        model(**rows, attention_mask=torch.ones(1, 1, 24, 24, dtype=torch.bool).tril())


def heads() -> list[torch.Tensor]:
    return list(torch.randn(3, 1, 2, 24, 8))


class Layer(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "Layer: attention dropout 0.1 is not supported.*set it to 0"),
        ({"position_bias": torch.zeros(1)}, "position_bias is added to the attention scores"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"is_causal": True}, "accelerate's context parallelism"),
        ({"attention_mask": torch.zeros(1, 2, 24, 24)}, r"needs \[B, 1, Q, T\] = \[1, 1, 24, 24\]"),
        ({"attention_mask": torch.full((1, 1, 24, 24), -0.5)}, "adds a bias"),
        ({}, "nothing tells sightline where"),
    ],
)
def test_arguments_that_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(Layer(), *heads(), **{"attention_mask": None, **arguments})


def test_layer_without_a_mask_uses_what_it_is_given() -> None:
    q, k, v = heads()
    ids = document_ids(LAYOUT)
    by_ids, _ = packed_attention(Layer(), q, k, v, None, seq_idx=ids)
    by_positions, _ = packed_attention(Layer(), q, k, v, None, position_ids=packed_rows(LAYOUT)["position_ids"])
    assert torch.equal(by_ids, by_positions)
    window, _ = packed_attention(Layer(), q, k, v, None, seq_idx=ids, sliding_window=3)
    assert not torch.equal(window, by_ids)


def test_a_mask_used_as_a_tensor_is_refused() -> None:
    if "doge" not in causal_classes():
        pytest.skip("this version of transformers has no Doge")
    model = tiny_model("doge")
    model.set_attn_implementation("sightline")
    with pytest.raises(ValueError, match="uses its attention mask as a tensor"):
        model(**packed_rows(LAYOUT))


def test_names_are_registered() -> None:
    assert AttentionInterface._global_mapping["sightline"] is packed_attention
    assert sightline.hf.NAME == "sightline"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    sightline.hf.enable(model)
    rows = packed_rows(LAYOUT)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        packed = model(**rows).logits.float()
        separate = [model(input_ids=part[None]).logits[0].float() for part in rows["input_ids"][0].split(LAYOUT)]
    assert (packed[0] - torch.cat(separate)).abs().max() < 0.05 * packed.abs().max()
