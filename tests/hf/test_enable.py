"""enable(): stated documents in every wrapper, refusals by name, and disable()."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForCausalLM, BloomConfig, BloomForCausalLM, DynamicCache, LlamaForCausalLM

import sightline.hf
from sightline.masks import causal, document, sliding_window
from tests.support.hf_models import document_ids, packed_rows, tiny_model

LAYOUT = (9, 1, 14)
OTHER = (4, 12, 8)
FAMILIES = ["llama", "llama4_text", "gpt_oss", "gemma3_text"]


def alone(model: Any, rows: dict[str, Tensor], *layouts: tuple[int, ...]) -> Tensor:
    """Return the logits of each document alone, with eager attention."""
    sightline.hf.disable(model)
    model.set_attn_implementation("eager")
    logits = []
    with torch.no_grad():
        for tokens, lengths in zip(rows["input_ids"], layouts, strict=True):
            parts = [model(input_ids=part[None], use_cache=False).logits[0] for part in tokens.split(lengths)]
            logits.append(torch.cat(parts))
    return torch.stack(logits)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-4, rtol=1e-4)


def ways_to_state(rows: dict[str, Tensor], *layouts: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Return arguments that state the same documents, by name. Positions are always those of the documents."""
    tokens, positions = rows["input_ids"], rows["position_ids"]
    ids = document_ids(*layouts)
    lengths = torch.tensor([n for layout in layouts for n in layout])
    cumulative = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    ones = torch.ones_like(tokens)
    arguments = {"input_ids": tokens, "position_ids": positions}
    return {
        "positions": arguments,
        "positions, no cache": {**arguments, "use_cache": False},
        "positions, mask of ones": {**arguments, "attention_mask": ones},
        "document_ids": {**arguments, "document_ids": ids},
        "document_lengths": {**arguments, "document_lengths": [list(layout) for layout in layouts]},
        "cu_seq_lens": {**arguments, "cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "seq_idx": ids.int()},
        "numbered mask": {**arguments, "attention_mask": ids + 1},
        "embeddings": {"inputs_embeds": None, "position_ids": positions, "document_ids": ids},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_state_documents(family: str) -> None:
    model = tiny_model(family)
    rows = packed_rows(LAYOUT, OTHER)
    expected = alone(model, rows, LAYOUT, OTHER)
    assert sightline.hf.enable(model) is model
    for name, arguments in ways_to_state(rows, LAYOUT, OTHER).items():
        if "inputs_embeds" in arguments:
            arguments["inputs_embeds"] = model.get_input_embeddings()(rows["input_ids"])
        with torch.no_grad():
            assert close(model(**arguments).logits, expected), name


def test_stated_documents_win_over_positions_that_run_on() -> None:
    model = sightline.hf.enable(tiny_model("llama"))
    rows = packed_rows(LAYOUT)
    arguments = {"position_ids": torch.arange(24)[None], "document_ids": document_ids(LAYOUT)}
    before = model(input_ids=rows["input_ids"], **arguments).logits
    rows["input_ids"][0, 3] += 1
    after = model(input_ids=rows["input_ids"], **arguments).logits
    assert torch.equal(before[:, 9:], after[:, 9:]) and not torch.equal(before[:, 3:9], after[:, 3:9])


def test_rows_without_positions_are_documents() -> None:
    model = tiny_model("llama4_text")
    rows = packed_rows((24,))
    expected = alone(model, rows, (24,))
    sightline.hf.enable(model)
    assert close(model(input_ids=rows["input_ids"]).logits, expected)


def test_masks_of_the_caller_replace_all_rules() -> None:
    model = tiny_model("gpt_oss")
    rows, ids = packed_rows(LAYOUT), document_ids(LAYOUT)
    expected = alone(model, rows, LAYOUT)
    sightline.hf.enable(model)
    window = model.config.sliding_window
    masks = {"full_attention": causal(1, 24) & document(ids), "sliding_attention": sliding_window(1, 24, window)}
    masks["sliding_attention"] &= document(ids)
    assert close(model(**rows, attention_masks=masks).logits, expected)
    with pytest.raises(ValueError, match="no mask for layers of type 'sliding_attention'"):
        model(**rows, attention_masks=masks["full_attention"])
    for wrong in (masks["full_attention"].to_dense(), causal(1, 23)):
        with pytest.raises(
            ValueError, match=r"expected a sightline\.masks\.AttentionMask of \(B, Q, T\) = \(1, 24, 24\)"
        ):
            model(**rows, attention_masks=wrong)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[1, 24, 24\]"):
        model(**rows, attention_mask=masks["full_attention"].to_dense())


def test_dense_mask_of_the_caller_decides() -> None:
    model = tiny_model("llama")
    rows, ids = packed_rows(LAYOUT), document_ids(LAYOUT)
    expected = alone(model, rows, LAYOUT)
    dense = (causal(1, 24) & document(ids)).to_dense()[:, None]
    sightline.hf.enable(model)
    run_on = torch.arange(24)[None]
    assert close(model(**rows, attention_mask=dense).logits, expected)
    additive = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    assert close(model(**rows, attention_mask=additive).logits, expected)
    leaking = causal(1, 24).to_dense()[:, None]
    assert close(
        model(input_ids=rows["input_ids"], position_ids=run_on, attention_mask=leaking).logits,
        alone(model, rows, (24,)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_and_generate(family: str) -> None:
    model = tiny_model(family)
    tokens = packed_rows((14,), (14,), (14,))["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :6], mask[1, :1] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens, **options)
    sightline.hf.enable(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, **options, cache_implementation="static"), expected)


def test_packed_rows_continue_no_cache() -> None:
    model = sightline.hf.enable(tiny_model("llama"))
    rows = packed_rows(LAYOUT)
    one = torch.zeros(1, 1, dtype=torch.long)
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    for arguments in ({}, {name: DynamicCache()}):
        packed = model(**rows, **arguments)[name]
        with pytest.raises(ValueError, match="the cache holds several documents"):
            model(input_ids=one, **{name: packed})
    cache = model(input_ids=rows["input_ids"])[name]
    with pytest.raises(ValueError, match="document_ids cannot be given together with a cache"):
        model(input_ids=one, document_ids=one, **{name: cache})
    assert model(input_ids=one, **{name: cache}).logits.shape[1] == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_recomputed_layers_are_equal_to_the_bit(family: str, reentrant: bool) -> None:
    model = sightline.hf.enable(tiny_model(family)).train()
    rows = packed_rows(LAYOUT, OTHER)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        run_on = torch.arange(24).expand(2, -1)
        stated = {"input_ids": rows["input_ids"], "position_ids": run_on, "document_ids": document_ids(LAYOUT, OTHER)}
        model(**stated, labels=rows["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_deep_copy_is_a_model_of_its_own() -> None:
    model = sightline.hf.enable(tiny_model("llama"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    arguments = {**packed_rows(LAYOUT), "document_ids": document_ids(LAYOUT)}
    assert close(other(**arguments).logits, 2 * model(**arguments).logits)
    sightline.hf.disable(other)
    assert sightline.hf.is_enabled(model) and not sightline.hf.is_enabled(other)
    assert "forward" not in vars(other)


def test_queries_that_are_scaled_by_their_index_in_the_row_are_refused() -> None:
    model = sightline.hf.enable(tiny_model("llama4_text", floor_scale=24, attn_temperature_tuning=True))
    model(**packed_rows((9, 1, 13)))
    model(**packed_rows((24,)))
    with pytest.raises(ValueError, match=r"attn_temperature_tuning scales queries.*fewer than 24 tokens, got 24"):
        model(**packed_rows(LAYOUT))


def test_positional_arguments_are_found() -> None:
    model = sightline.hf.enable(tiny_model("llama4_text"))
    rows = packed_rows(LAYOUT)
    assert torch.equal(model(rows["input_ids"], None, rows["position_ids"]).logits, model(**rows).logits)


def test_disable_restores_the_model() -> None:
    model = tiny_model("gemma3_text")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    sightline.hf.enable(model)
    model(**packed_rows(LAYOUT))
    assert sightline.hf.is_enabled(model) and model.config._attn_implementation == "sightline"
    sightline.hf.disable(model)
    assert not sightline.hf.is_enabled(model) and model.config._attn_implementation == "eager"
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_documents_do_not_outlive_a_forward_that_fails() -> None:
    model = sightline.hf.enable(tiny_model("llama"))
    rows = packed_rows(LAYOUT)
    with pytest.raises(ValueError, match="document_ids must be integers"):
        model(**rows, document_ids=document_ids((3,)))
    with pytest.raises(Exception, match="index"):
        model(input_ids=rows["input_ids"] + 10**6, position_ids=rows["position_ids"])
    assert sightline.hf.running.current() is None
    model(**rows)


def test_an_interrupted_forward_leaves_no_documents_to_the_next() -> None:
    model = sightline.hf.enable(tiny_model("llama"))
    rows = packed_rows(LAYOUT)
    expected = model(input_ids=rows["input_ids"]).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**rows)
    hook.remove()
    assert torch.equal(model(input_ids=rows["input_ids"]).logits, expected)


def test_an_interrupted_forward_leaves_no_documents_to_a_model_with_the_name_alone() -> None:
    model, other = sightline.hf.enable(tiny_model("llama")), tiny_model("mistral", attn_implementation="sightline")
    rows = packed_rows((sum(LAYOUT),))
    expected = other(**rows, use_cache=False).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**packed_rows(LAYOUT))
    assert torch.equal(other(**rows, use_cache=False).logits, expected)


def test_two_models_and_two_threads() -> None:
    """A teacher that is called inside of a student's forward has documents of its own; so does each thread."""
    student, teacher = (sightline.hf.enable(tiny_model("llama")) for _ in range(2))
    rows, other = packed_rows(LAYOUT), packed_rows(OTHER)
    expected = student(**rows).logits, teacher(**other).logits
    nested: list[Tensor] = []
    hook = student.model.layers[1].register_forward_hook(lambda *_: nested.append(teacher(**other).logits) and None)
    assert torch.equal(student(**rows).logits, expected[0]) and torch.equal(nested[0], expected[1])
    hook.remove()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(lambda batch: student(**batch).logits, batch) for batch in (rows, other) * 8]
    for call, logits in zip(calls, expected * 8, strict=True):
        assert torch.equal(call.result(), logits)


def test_nothing_is_left_in_a_saved_model(tmp_path) -> None:
    model = sightline.hf.enable(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    assert "sightline" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and not sightline.hf.is_enabled(again)
    named = type(model).from_pretrained(tmp_path, attn_implementation="sightline")
    rows = packed_rows(LAYOUT)
    assert close(named(**rows).logits, model(**rows).logits)


def test_positions_that_start_after_padding() -> None:
    """RoBERTa counts positions from its padding index on, as its own forward does without position_ids."""
    model = tiny_model("roberta")
    start = model.config.pad_token_id + 1
    rows = packed_rows(LAYOUT)
    expected = alone(model, rows, LAYOUT)
    sightline.hf.enable(model)
    shifted = rows["position_ids"] + start
    assert close(model(input_ids=rows["input_ids"], position_ids=shifted).logits, expected)
    with pytest.raises(ValueError, match=rf"start at {start}.*PackedCollator\(position_start={start}\)"):
        model(**rows)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "needs a model of transformers.*got Linear"),
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2)),
            "BloomForCausalLM computes its attention itself",
        ),
        (
            lambda: BartForCausalLM(BartConfig(vocab_size=8, d_model=8, decoder_layers=1, decoder_attention_heads=2)),
            "BartForCausalLM takes no position_ids",
        ),
    ],
)
def test_models_that_cannot_be_right_are_refused(model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sightline.hf.enable(model())


@pytest.mark.parametrize("family", ["mistral", "llama4_text"])
def test_padding_inside_a_row_equals_eager(family: str) -> None:
    """Windows and chunks count it, as those of transformers do."""
    model, rows = tiny_model(family), packed_rows((24,))
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[0, 5:9] = 0
    with torch.no_grad():
        sightline.hf.disable(model).set_attn_implementation("eager")
        expected = model(**rows, attention_mask=mask, use_cache=False).logits[mask == 1]
        actual = sightline.hf.enable(model)(**rows, attention_mask=mask).logits[mask == 1]
    assert close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attention_mask": torch.ones(1, 20)},
            r"attention_mask has the shape \[1, 20\]; expected \[B, S\] = \[1, 24\]",
        ),
        ({"attention_mask": torch.ones(2, 24)}, r"attention_mask has the shape \[2, 24\]"),
        (
            {"attention_masks": causal(1, 24), "document_ids": document_ids(LAYOUT)},
            "attention_masks and document_ids both",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sightline.hf.enable(tiny_model("llama"))(**packed_rows(LAYOUT), **arguments)
