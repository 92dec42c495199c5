"""The batch of PackedCollator: what it states about documents, and which examples it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening, RobertaConfig, RobertaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sightline.hf import PackedCollator, enable
from sightline.hf.documents import find_documents
from tests.support.hf import build_gpt_oss, build_llama, build_llama4, random_documents

EXAMPLES = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7, 8]}, {"input_ids": [9]}]


def tensors(batch: dict) -> dict:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_one_row_of_all_documents():
    assert tensors(PackedCollator()(EXAMPLES)) == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7, 8, 9]],
        "labels": [[-100, 2, 3, -100, 5, 6, 7, 8, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4, 0]],
        "document_ids": [[0, 0, 0, 1, 1, 1, 1, 1, 2]],
        "document_lengths": [[3, 5, 1]],
        "cu_seq_lens_q": [0, 3, 8, 9],
        "cu_seq_lens_k": [0, 3, 8, 9],
        "max_length_q": 5,
        "max_length_k": 5,
        "seq_idx": [[0, 0, 0, 1, 1, 1, 1, 1, 2]],
    }


def test_rows_of_max_length():
    """A document is in the first row with room; padding is one more document for all but document_ids and lengths."""
    batch = PackedCollator(max_length=6, pad_token_id=99, position_start=2)(EXAMPLES)
    assert tensors(batch) == {
        "input_ids": [[1, 2, 3, 9, 99, 99], [4, 5, 6, 7, 8, 99]],
        "labels": [[-100, 2, 3, -100, -100, -100], [-100, 5, 6, 7, 8, -100]],
        "position_ids": [[2, 3, 4, 2, 2, 3], [2, 3, 4, 5, 6, 2]],
        "document_ids": [[0, 0, 0, 1, -1, -1], [0, 0, 0, 0, 0, -1]],
        "document_lengths": [[3, 1], [5]],
        "cu_seq_lens_q": [0, 3, 4, 6, 11, 12],
        "cu_seq_lens_k": [0, 3, 4, 6, 11, 12],
        "max_length_q": 5,
        "max_length_k": 5,
        "seq_idx": [[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 1]],
    }
    integers = {"input_ids": torch.int64, "labels": torch.int64, "position_ids": torch.int64}
    assert {name: batch[name].dtype for name in integers} == integers
    assert all(
        batch[name].dtype == torch.int32 for name in ("document_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
    )


def test_equals_the_collator_of_transformers():
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(EXAMPLES)
    ours = PackedCollator()(EXAMPLES)
    assert tensors({name: ours[name] for name in theirs}) == tensors(theirs)


def test_equals_the_collator_of_trl():
    """Rows of TRL's packing "bfd": their documents are those of seq_lengths."""
    examples = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, -100, 3, 4, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7, 8, 9], "labels": [6, 7, 8, -100], "seq_lengths": [1, 3]},
    ]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    ours = PackedCollator()(examples)
    assert tensors({name: ours[name] for name in theirs}) == tensors(theirs)
    assert ours["document_lengths"] == [[3, 2, 1, 3]]
    assert PackedCollator(max_length=5)(examples)["document_lengths"] == [[3, 2], [1, 3]]


def test_masks_become_labels():
    example = {
        "input_ids": [1, 2, 3, 4, 5, 6],
        "seq_lengths": [4, 2],
        "completion_mask": [0, 0, 1, 1, 1, 1],
        "assistant_masks": [1, 1, 0, 1, 1, 1],
    }
    assert PackedCollator()([example])["labels"].tolist() == [[-100, -100, -100, 4, -100, 6]]
    example["labels"] = [1, 2, 3, -100, 5, 60]
    assert PackedCollator()([example])["labels"].tolist() == [[-100, -100, -100, -100, -100, 60]]


def test_examples_of_tensors_and_arrays():
    as_tensors = [{name: torch.tensor(value) for name, value in example.items()} for example in EXAMPLES]
    as_arrays = [{name: np.array(value, dtype=np.int32) for name, value in example.items()} for example in EXAMPLES]
    expected = tensors(PackedCollator()(EXAMPLES))
    assert tensors(PackedCollator()(as_tensors)) == expected
    assert tensors(PackedCollator()(as_arrays)) == expected
    whole = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in EXAMPLES]
    assert tensors(PackedCollator()(whole)) == expected
    assert EXAMPLES[0] == {"input_ids": [1, 2, 3]}  # examples are not changed


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([{"input_ids": [1]}, {"input_ids": []}], "input_ids of example 1 is empty"),
        ([{"input_ids": [1.0, 2.0]}], "input_ids of example 0 .*float32; expected a list of integers"),
        ([{"input_ids": ["a", "b"]}], "input_ids of example 0 is no list of integers"),
        ([{"input_ids": "text"}], "input_ids of example 0 is no list of integers"),
        ([{"input_ids": [[1, 2]]}], r"input_ids of example 0 has shape \(1, 2\)"),
        ([{"input_ids": 3}], r"input_ids of example 0 has shape \(\)"),
        ([{"labels": [1]}], "expected input_ids: tokenize"),
        ([{"input_ids": [1, 2], "labels": [1]}], "labels of example 0 has 1 elements for 2 tokens"),
        ([{"input_ids": [1, 2], "completion_mask": [1, 0, 0]}], "completion_mask of example 0 has 3 elements"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "padding=False"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 2]}], "padding=False"),
        ([{"input_ids": [1, 2], "seq_lengths": [1, 2]}], r"2 tokens and seq_lengths \[1, 2\]"),
        ([{"input_ids": [1, 2], "seq_lengths": [2, 0]}], r"seq_lengths \[2, 0\]"),
        ([{"input_ids": [1], "pixel_values": [0.5]}], r"columns \['pixel_values'\].*remove_columns"),
        ([{"input_ids": [1, 2, 3, 4, 5]}], "document 0 of the batch has 5 tokens, more than max_length=4"),
    ],
)
def test_refused_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        PackedCollator(max_length=4)(examples)


def test_refused_options():
    with pytest.raises(ValueError, match="max_length must be at least 1 token, or None for one row, got 0"):
        PackedCollator(max_length=0)


def test_documents_are_found_without_reading_a_device():
    """With document_lengths, tensors on a device stay there; reading one on the meta device would raise."""
    batch = PackedCollator(max_length=6)(EXAMPLES)
    names = ("document_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids")
    on_device = {name: batch[name].to("meta") for name in names}
    found = find_documents((2, 6), document_lengths=batch["document_lengths"], **on_device)
    assert found is not None and found.ids.tolist() == batch["document_ids"].tolist()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        find_documents((2, 6), **on_device)
    cut = {**on_device, "cu_seq_lens_q": on_device["cu_seq_lens_q"][:2]}  # by accelerate's dispatch of 2 rows
    with pytest.raises(ValueError, match=r"3 documents.*2 elements.*dispatch_batches"):
        find_documents((2, 6), document_lengths=batch["document_lengths"], **cut)


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("build", [build_llama, build_llama4, build_gpt_oss])
def test_forward_and_backward_do_not_read_the_device(build, max_length):
    """Reading a tensor on the meta device raises. (With use_cache=False, transformers' own mask builder reads one.)"""
    model = enable(build().to("meta", torch.bfloat16), check=False).train()
    batch = PackedCollator(max_length=max_length)([{"input_ids": tokens} for tokens in random_documents(6)])
    on_device = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    loss = model(**on_device).loss
    loss.backward()
    assert loss.device.type == "meta" and all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("max_length", [None, 6])
def test_positions_of_roberta(max_length):
    """RoBERTa counts positions from the id of its padding token + 1."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = RobertaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, is_decoder=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = RobertaForCausalLM(config)
    alone = [model(input_ids=torch.tensor([example["input_ids"]])).logits[0] for example in EXAMPLES]
    batch = PackedCollator(max_length=max_length, position_start=1)(EXAMPLES)
    logits = enable(model)(**batch).logits
    order = alone if max_length is None else [alone[0], alone[2], alone[1]]
    torch.testing.assert_close(logits[batch["document_ids"] >= 0], torch.cat(order))
