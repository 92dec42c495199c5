"""Classes of transformers, random and tiny: packed rows equal each document alone, or are refused, in every call."""

from __future__ import annotations

import pytest

import sightline.hf
from tests.hf.images import KINDS, check_images
from tests.hf.isolation import Row, check_class
from tests.support.hf_models import causal_classes

EQUAL = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma4_text"),
    *("gpt_oss", "llama4_text", "deepseek_v3", "olmo3", "cohere2", "glm4", "granite", "phi3", "smollm3"),
    *("gpt2", "gpt_bigcode", "opt", "nemotron", "roberta"),
]
REFUSED = {
    "bart": "takes no position_ids",
    "bloom": "computes its attention itself",
    "deepseek_v32": "uses its attention mask as a tensor",
    "deepseek_v4": "it compresses, selects or adds keys",
    "inkling_text": "InklingShortConvolution carries a state",
}
REMEDIES = ("use ", "call ", "pass ", "set ", "add ", "do not pack")


def assert_right_or_refused(row: Row) -> None:
    """Check that no call of a class is wrong, and that each refusal names a remedy."""
    faults = {
        (way, call): (outcome.verdict, outcome.error, outcome.gradient, outcome.reason)
        for way, outcomes in (("name alone", row.name_alone), ("enable", row.enabled))
        for call, outcome in outcomes.items()
        if outcome.verdict in ("LEAK", "WRONG", "error")
    }
    assert not faults
    reasons = [o.reason for o in (*row.name_alone.values(), *row.enabled.values()) if o.verdict == "refused"]
    for reason in (*reasons, row.refused):
        assert not reason or any(remedy in reason for remedy in REMEDIES), reason


@pytest.mark.parametrize("name", EQUAL)
def test_packed_rows_equal_each_document_alone(name: str) -> None:
    row = check_class(name, name)
    assert_right_or_refused(row)
    assert row.verdict() == "equal", row.refused or row.not_built


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    if name not in causal_classes():
        pytest.skip("not in this version of transformers")
    row = check_class(name, name)
    assert_right_or_refused(row)
    assert row.verdict() == "refused", row.not_built
    reasons = [row.refused, *(outcome.reason for outcome in row.enabled.values())]
    assert any(REFUSED[name] in reason for reason in reasons), reasons


@pytest.mark.parametrize("cls", KINDS)
def test_rows_with_images(cls: str) -> None:
    row = check_images(cls)
    assert_right_or_refused(row)
    assert row.enabled["document_ids"].verdict == "right"


def test_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: with an enable() that does nothing, documents depend on each other."""
    monkeypatch.setattr(sightline.hf, "enable", lambda model: model)
    row = check_class("llama", "LlamaForCausalLM")
    assert row.verdict() == "LEAK"
    assert {row.enabled[call].verdict for call in ("default", "all-ones mask", "two rows")} == {"LEAK"}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", causal_classes())
def test_every_class_is_right_or_refused(name: str) -> None:
    row = check_class(name, name)
    assert_right_or_refused(row)
