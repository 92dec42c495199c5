"""Ten planted faults, each of which `enable`, the leakage test or a refusal finds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import sightline.hf
from sightline.hf import attention, rules
from sightline.hf.calls import random_call
from tests.support.hf_models import packed_rows, tiny_model

ROWS = packed_rows((9, 1, 14))


def leak_of(model: PreTrainedModel, call: str) -> None:
    report = sightline.hf.leaks(model, calls=[call])
    assert report.leaks and report.layer, str(report)
    raise ValueError(f"leaks from {report.layer}")


def builder_without_positions(_patch: pytest.MonkeyPatch) -> None:
    """gpt-oss passes no position_ids to transformers' mask builder."""
    leak_of(tiny_model("gpt_oss"), "no_cache")


def layers_without_positions(_patch: pytest.MonkeyPatch) -> None:
    """Llama 4 passes position_ids to the builder, but not to its layers."""
    model = tiny_model("llama4_text")
    model.set_attn_implementation("sightline")
    model(**ROWS)


def unknown_closure(patch: pytest.MonkeyPatch) -> None:
    """The window of a builder is a function that is not known, in a row that is too long to try every pair."""
    patch.setattr(rules, "_factory", lambda function: "")
    patch.setattr(rules, "MOST_TOKENS", 16)
    sightline.hf.enable(tiny_model("mistral"), check=False)(**ROWS)


def mask_taken_away(_patch: pytest.MonkeyPatch) -> None:
    """accelerate's context parallelism replaces the masks of attention layers by is_causal."""
    model = sightline.hf.enable(tiny_model("llama"))

    def take_away(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": None, "is_causal": True}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(take_away, with_kwargs=True)
    model(**ROWS)


def mrope_positions(_patch: pytest.MonkeyPatch) -> None:
    """Positions [3, B, S] of several documents do not say where each starts."""
    model = sightline.hf.enable(tiny_model("Qwen2_5_VLForConditionalGeneration"))
    model(input_ids=ROWS["input_ids"], position_ids=ROWS["position_ids"].expand(3, -1, -1))


def ignored_cu_seq_lens(_patch: pytest.MonkeyPatch) -> None:
    """Recurrent layers of transformers that carry their state on, whatever cu_seq_lens says."""
    leak_of(tiny_model("jamba"), "cu_seq_lens")


def mask_read_as_a_tensor(_patch: pytest.MonkeyPatch) -> None:
    """Doge selects keys by its mask, outside of the attention function."""
    sightline.hf.enable(tiny_model("doge"))


def dropout(_patch: pytest.MonkeyPatch) -> None:
    sightline.hf.enable(tiny_model("llama", attention_dropout=0.1)).train()(**ROWS)


def ignored_sinks(patch: pytest.MonkeyPatch) -> None:
    """Attention without the sinks of gpt-oss leaks nothing, but differs from eager attention."""
    original = attention.packed_attention

    def without_sinks(*args: Any, s_aux: Tensor | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    patch.setitem(AttentionInterface._global_mapping, "sightline", without_sinks)
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(3.0)
    sightline.hf.enable(model)


def chunks_from_the_row(patch: pytest.MonkeyPatch) -> None:
    """Chunks are counted from the start of the row in place of the document."""

    def mask(self: rules.Chunk, tokens: rules.Tokens) -> Any:
        first = tokens.index - tokens.index % self.size
        return tokens.interval(first, first + self.size)

    patch.setattr(rules.Chunk, "mask", mask)
    sightline.hf.enable(tiny_model("llama4_text"))


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    builder_without_positions: r"leaks from model\.layers\.0\.self_attn",
    layers_without_positions: r"nothing tells sightline where.*sightline\.hf\.enable",
    unknown_closure: r"is not known to sightline.*pass attention_masks",
    mask_taken_away: r"accelerate's context parallelism does.*sightline\.hf\.context_parallel",
    mrope_positions: r"several documents.*pass document_ids",
    ignored_cu_seq_lens: r"leaks from model\.layers\.0\.mamba",
    mask_read_as_a_tensor: r"attention mask as a tensor",
    dropout: r"attention dropout 0\.1 is not supported.*set it to 0",
    ignored_sinks: r"differs from the same document alone",
    chunks_from_the_row: r"differs from the same document alone",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=FAULTS[fault]):
        fault(monkeypatch)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mistral", "llama"])
def test_without_faults_nothing_is_found(family: str) -> None:
    model = sightline.hf.enable(tiny_model(family))
    assert not sightline.hf.leaks(model).leaks
    assert random_call(model, "position_ids")["position_ids"].min() == 0
