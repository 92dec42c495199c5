"""sightline.hf.leaks: which calls of which models leak, planted faults, and no false alarm over families."""

import json
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import sightline.hf as hf
from sightline.hf.calls import CALLS, random_call, special_ids
from sightline.hf.check import check_packed
from sightline.hf.documents import Documents
from sightline.hf.leaks import ModelReport
from sightline.masks import causal, document, shared_prefix
from tests.support.hf_models import document_ids, packed_rows, tiny_model

FAMILIES = (
    "llama", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3", "glm4",
    "olmo3", "phi3",
)  # fmt: skip
LAYOUT = (9, 12, 3)


def verdicts(report: ModelReport) -> dict[str, str]:
    return {one.call: one.verdict for one in report.calls}


def small(family: str, implementation: str = "sdpa", **fields: Any) -> PreTrainedModel:
    model = tiny_model(family, **fields)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_enabled_models_do_not_leak(family: str) -> None:
    model = hf.enable(tiny_model(family), check=False)
    report = hf.leaks(model)
    assert verdicts(report) == dict.fromkeys([name for name in CALLS if "mrope" not in name], "no leak"), str(report)
    assert all(one.report.gradient == 0 and one.report.change < 1e-5 for one in report.calls)
    assert (report.leaks, report.layer, report.enabled, report.attention) == (False, None, True, "sightline")
    check_packed(model)
    assert not model.training and hf.is_enabled(model)


def test_which_calls_of_transformers_own_attention_leak() -> None:
    report = hf.leaks(small("qwen3"))
    assert verdicts(report) == {
        "position_ids": "leaks", "no_cache": "no leak", "ones_mask": "leaks", "cu_seq_lens": "no leak",
        "two_rows": "no leak",
    }  # fmt: skip
    assert report.leaks and report.layer == "model.layers.0.self_attn"
    text = str(report)
    assert text.startswith("Qwen3ForCausalLM, attention sdpa: 2 of 5 calls leak, 0 refused\ncall ")
    assert "from layer\nposition_ids  leaks " in text and "model.layers.0.self_attn (attention)" in text
    values = json.loads(json.dumps(report.to_dict()))
    assert values["leaks"] and values["calls"][1]["verdict"] == "no leak"
    assert values["calls"][0]["report"]["kind"] == "attention"


def test_builder_without_positions() -> None:
    """gpt-oss does not pass position_ids to the mask builder: every call leaks, without and with a cache."""
    report = hf.leaks(small("gpt_oss", "eager"))
    assert set(verdicts(report).values()) == {"leaks"}
    with pytest.raises(
        ValueError, match=r"GptOss.*second document.*first, from model.layers.0.self_attn \(attention\)"
    ):
        check_packed(small("gpt_oss", "eager"))


def test_layers_without_positions() -> None:
    """Llama 4 passes no positions to its layers: what the name alone cannot know is refused, and listed as such."""
    report = hf.leaks(small("llama4_text", "sightline"))
    assert verdicts(report)["position_ids"] == verdicts(report)["ones_mask"] == "refused" and not report.leaks
    assert "nothing tells sightline where the documents of a row start" in str(report)
    assert report.to_dict()["calls"][0]["report"] is None


def test_recurrent_layer_that_ignores_documents() -> None:
    report = hf.leaks(small("jamba"), calls=["cu_seq_lens"])
    assert verdicts(report) == {"cu_seq_lens": "leaks"} and report.layer == "model.layers.0.mamba"
    assert report.calls[0].report.kind == "recurrent layer"


def test_recurrent_layer_beside_attention() -> None:
    """Parallel branches of one layer: the attention that is called last does not leak."""
    report = hf.leaks(small("falcon_h1"), calls=["no_cache"])
    assert report.layer == "model.layers.0.mamba"


class MixingConvolution(nn.Module):
    """A causal convolution over the row, in place of the MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(size, size, 4, padding=3, groups=size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x.mT)[..., : x.shape[1]].mT


def test_convolution_over_a_boundary() -> None:
    model = hf.enable(tiny_model("llama"), check=False)
    model.model.layers[2].mlp = MixingConvolution(64)
    report = hf.leaks(model, calls=["document_ids"])
    assert report.leaks and report.layer == "model.layers.2.mlp"
    with pytest.raises(ValueError, match=r"from model\.layers\.2\.mlp \(convolution\) on"):
        check_packed(model)


def test_chunks_counted_from_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are isolated, but wrong: the check compares with each document alone, too."""
    model = hf.enable(tiny_model("llama4_text", attention_chunk_size=4), check=False)
    check_packed(model)
    in_the_row = property(lambda self: torch.arange(self.ids.shape[1]).expand(self.ids.shape))
    monkeypatch.setattr(Documents, "index_in_document", in_the_row)
    assert not hf.leaks(model, calls=["position_ids"]).leaks
    with pytest.raises(ValueError, match="a document of a packed row differs from the same document alone by"):
        check_packed(model)


def test_ignored_sinks_are_no_leak_but_differ_from_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a leakage test: what is wrong in each document alone is found by comparison with eager attention."""
    rows = packed_rows((24,))
    expected = tiny_model("gpt_oss")(**rows, use_cache=False).logits
    model = hf.enable(tiny_model("gpt_oss"), check=False)
    assert torch.allclose(model(**rows).logits, expected, atol=1e-4)
    module = sys.modules["sightline.hf.attention"]  # the package has the function under this name
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *args, sinks, **options: attend(*args, sinks=None, **options))
    assert not hf.leaks(model, calls=["document_ids"]).leaks
    assert not torch.allclose(model(**rows).logits, expected, atol=1e-2)


def test_positions_of_mrope() -> None:
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    model = small("Qwen2_5_VLForConditionalGeneration", rope_parameters=sections)
    report = hf.leaks(model, calls=["no_cache", "mrope_3", "mrope_4"])
    assert verdicts(report) == {"no_cache": "leaks", "mrope_3": "leaks", "mrope_4": "no leak"}
    report = hf.leaks(hf.enable(model, check=False))
    assert verdicts(report)["mrope_3"] == "refused" and not report.leaks, str(report)
    assert verdicts(report)["mrope_4"] == verdicts(report)["document_ids"] == "no leak", str(report)


def test_batch_of_the_user() -> None:
    rows = packed_rows(LAYOUT, LAYOUT)
    labels = rows["input_ids"]
    model = small("llama")
    report = hf.leaks(model, {**rows, "labels": labels, "attention_mask": torch.ones_like(labels)})
    assert verdicts(report) == {"batch": "leaks"} and report.calls[0].report.documents == 6
    assert report.calls[0].arguments == "input_ids, position_ids, attention_mask"
    ids = document_ids(LAYOUT, LAYOUT)
    stated = {"input_ids": labels, "document_ids": ids, "labels": labels}
    assert hf.leaks(model, stated).leaks  # transformers takes no document_ids
    assert not hf.leaks(hf.enable(model, check=False), stated).leaks


def test_masks_of_the_user() -> None:
    """Responses depend on their prompt, which is no leak; documents given as one document are one."""
    ids = document_ids(LAYOUT)
    tree = shared_prefix(ids, torch.zeros_like(ids)) & causal(1, 24)
    batch = {**packed_rows(LAYOUT), "attention_masks": tree}
    model = hf.enable(tiny_model("llama"), check=False)
    assert not hf.leaks(model, batch).leaks
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda _m, _args, out: out + out.roll(12, dims=1))
    assert hf.leaks(model, batch).layer == "model.layers.0.mlp"
    assert not hf.leaks(model, {**batch, "attention_masks": document(torch.zeros_like(ids))}).leaks


def test_padded_batch() -> None:
    rows = packed_rows(LAYOUT, LAYOUT)
    padding = torch.ones_like(rows["input_ids"])
    padding[1, 9:] = 0
    model = hf.enable(tiny_model("qwen3"), check=False)
    report = hf.leaks(model, {**rows, "attention_mask": padding})
    assert not report.leaks and report.calls[0].report.documents == 4


def test_training_with_dropout_and_recomputation() -> None:
    model = hf.enable(tiny_model("llama"), check=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not hf.leaks(model).leaks and model.training
    check_packed(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"test the module in eval\(\), or with use_reentrant=False"):
        hf.leaks(model)
    check_packed(model)
    assert model.training and model.model.layers[0].training and all(p.grad is None for p in model.parameters())


def test_wrapped_models() -> None:
    base = tiny_model("qwen3")
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)).train()
    assert hf.leaks(lora, calls=["ones_mask"]).layer.endswith("model.layers.0.self_attn")
    report = hf.leaks(hf.enable(lora, check=False))
    assert not report.leaks and report.model == "Qwen3ForCausalLM" and report.enabled
    check_packed(lora)
    compiled = torch.compile(hf.enable(tiny_model("llama"), check=False), backend="eager")
    compiled(**packed_rows(LAYOUT))
    report = hf.leaks(compiled, calls=["no_cache", "document_ids"])
    assert not report.leaks and all(one.report.gradient == 0 for one in report.calls), str(report)
    check_packed(compiled)


def test_special_tokens_are_neither_drawn_nor_changed() -> None:
    model = tiny_model("Qwen2_5_VLForConditionalGeneration")
    special = special_ids(model.config)
    assert model.config.image_token_id in special
    assert not special & set(random_call(model, "two_rows")["input_ids"].flatten().tolist())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected a model of transformers, or one that wraps it, got Linear"):
        hf.leaks(nn.Linear(1, 1))
    model = small("llama")
    with pytest.raises(ValueError, match="unknown calls nothing; the calls are: position_ids, no_cache"):
        hf.leaks(model, calls=["nothing"])
    with pytest.raises(ValueError, match="states no documents, only input_ids; expected position_ids"):
        hf.leaks(model, {"input_ids": torch.arange(4)[None]})
    with pytest.raises(ValueError, match="has no input_ids"):
        hf.leaks(model, {"pixel_values": torch.zeros(1)})


def test_errors_of_a_model_are_listed_with_their_type() -> None:
    model = small("llama")
    model.register_forward_pre_hook(lambda _m, _args: {}["missing"])
    report = hf.leaks(model, calls=["no_cache"])
    assert report.calls[0].refused == "KeyError('missing')" and not report.leaks
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot run a packed row: KeyError\('missing'\)"):
        check_packed(model)
