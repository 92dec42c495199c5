"""Rules read from transformers' closures equal the masks that transformers itself builds, pair by pair."""

import logging

import pytest
import torch
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import sdpa_mask, sliding_window_overlay

from sightline.hf import rules
from sightline.hf.documents import Documents, find_documents
from sightline.hf.rules import Tokens, Unknown, layer_type, read_rule

LENGTH = 24
POSITIONS = torch.stack(
    [torch.cat([torch.arange(n) for n in (7, 1, 10, 6)]), torch.cat([torch.arange(n) for n in (1, 1, 22)])]
)


def builder_calls(builder: str, position_ids=None, attention_mask=None, cache=None, **options) -> list[dict]:
    """Return the arguments with which a builder of transformers calls the mask function of an implementation."""
    calls: list[dict] = []
    masking_utils.AttentionMaskInterface.register("recorder", lambda **call: calls.append(call))
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=4)
    config.sliding_window, config.attention_chunk_size = 5, 4
    config._attn_implementation = "recorder"
    embeddings = torch.zeros(2, LENGTH, 4)
    arguments = [config, embeddings, attention_mask]
    if "bidirectional" not in builder:
        arguments += [cache, position_ids]
    getattr(masking_utils, builder)(*arguments, **options)
    masking_utils.AttentionMaskInterface._global_mapping.pop("recorder")
    return calls


def dense(call: dict) -> torch.Tensor:
    """Return transformers' own mask of a call: bool [B, Q, T]."""
    call = {**call, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": True}
    return sdpa_mask(**call)[:, 0]


def ours(call: dict, documents: Documents | None = None) -> torch.Tensor:
    reading = read_rule(call["mask_function"])
    if documents is None and reading.document_ids is not None:
        documents = Documents(reading.document_ids.int(), "position_ids")
    index = torch.arange(call["q_length"]).expand(2, -1) + int(call["q_offset"])
    in_document = None if documents is None else documents.index_in_document
    mask = reading.rule.mask(Tokens(index, call["kv_length"], int(call["kv_offset"]), in_document))
    return (mask if documents is None else mask & documents.mask).to_dense()


BUILDERS = {
    "create_causal_mask": "full_attention",
    "create_sliding_window_causal_mask": "sliding_attention",
    "create_chunked_causal_mask": "chunked_attention",
}


def skip_wrong_chunks(builder: str) -> None:
    if "chunked" in builder and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        pytest.skip("transformers before 5.23 counts the chunks of packed rows from the start of the row")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("builder", BUILDERS)
def test_rules_of_rows_and_of_packed_rows(builder: str, packed: bool) -> None:
    if packed:
        skip_wrong_chunks(builder)
    (call,) = builder_calls(builder, POSITIONS if packed else torch.arange(LENGTH).expand(2, -1))
    assert torch.equal(ours(call), dense(call))
    assert layer_type(read_rule(call["mask_function"]).rule) == BUILDERS[builder]


@pytest.mark.parametrize("builder", ["create_bidirectional_mask", "create_bidirectional_sliding_window_mask"])
def test_bidirectional_rules(builder: str) -> None:
    if not hasattr(masking_utils, builder):
        pytest.skip("this version of transformers has no such builder")
    (call,) = builder_calls(builder)
    assert torch.equal(ours(call), dense(call))


@pytest.mark.parametrize("builder", BUILDERS)
def test_left_padding_moves_chunks(builder: str) -> None:
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, :5] = False
    (call,) = builder_calls(builder, None, padding)
    documents = find_documents((2, LENGTH), attention_mask=padding)
    assert documents is not None
    queries = padding[:, :, None]
    assert torch.equal(ours(call, documents) & queries, dense(call) & queries)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(("cached", "queries"), [(9, 1), (9, 4), (0, 6)])
def test_rules_with_a_cache(builder: str, cached: int, queries: int) -> None:
    (call,) = builder_calls(builder)
    first_key = max(0, cached - 6) if builder == "create_sliding_window_causal_mask" else 0
    call |= {"q_length": queries, "q_offset": cached, "kv_length": cached + queries - first_key, "kv_offset": first_key}
    assert torch.equal(ours(call), dense(call))


@pytest.mark.parametrize("builder", BUILDERS)
def test_spans_of_images_go_by_index_also_in_packed_rows(builder: str) -> None:
    """transformers looks up spans by position in the overlay `or_mask_function`, which is wrong in packed rows."""
    skip_wrong_chunks(builder)
    if not hasattr(masking_utils, "blockwise_overlay"):
        pytest.skip("this version of transformers has no such spans")
    spans = torch.full((2, LENGTH), -1)
    spans[0, 10:14], spans[1, 3:9] = 0, 1
    (call,) = builder_calls(builder, POSITIONS, or_mask_function=masking_utils.blockwise_overlay(spans))
    (plain,) = builder_calls(builder, POSITIONS)
    same_span = (spans[:, :, None] == spans[:, None, :]) & (spans >= 0)[:, :, None]
    same_document = dense(builder_calls("create_causal_mask", POSITIONS)[0])
    same_document = same_document | same_document.mT
    assert torch.equal(ours(call), dense(plain) | (same_span & same_document))


def test_rules_that_are_combined() -> None:
    (call,) = builder_calls("create_causal_mask", POSITIONS, and_mask_function=sliding_window_overlay(3))
    assert torch.equal(ours(call), dense(call))
    assert layer_type(read_rule(call["mask_function"]).rule) == "sliding_attention"


def every_third(batch, head, query, key):
    return (query - key) % 3 == 0


@pytest.mark.parametrize("packed", [False, True])
def test_unknown_rule_is_evaluated_pair_by_pair_with_one_warning(packed: bool, caplog, monkeypatch) -> None:
    monkeypatch.setattr(rules, "_WARNED", set())
    (call,) = builder_calls("create_causal_mask", POSITIONS if packed else None, and_mask_function=every_third)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(ours(call), dense(call))
    assert [record.args for record in caplog.records] == [("every_third",)]


def test_unknown_rule_is_refused_for_long_rows() -> None:
    index = torch.arange(2).expand(1, -1)
    with pytest.raises(ValueError, match=r"every_third is not known to sightline.*the limit is 8192"):
        Unknown(every_third).mask(Tokens(index, rules.MOST_TOKENS + 1))
