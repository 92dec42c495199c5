"""Groups of responses: each prompt is computed once, and all results are those of each prompt and response alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sightline.hf import GroupedRows, enable, pack_groups, response_log_probs
from sightline.hf.documents import find_documents
from tests.support.hf_models import tiny_model

FAMILIES = [
    "llama", "qwen2", "olmo3", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3", "mixtral", "qwen3_moe",
]  # fmt: skip
"""Windows of 8 tokens by position, chunks of 8 tokens, sinks, soft caps, narrower values (MLA), experts."""

LAYERS = {"qwen2": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}}

Pairs = tuple[list[list[int]], list[list[int]]]


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(4, 100) for _ in range(count)]


def dialogues() -> Pairs:
    """Return prompts and responses: three groups, one of which continues another by a turn, and by two (depth 3).

    The lengths are no multiples of windows or chunks.
    """
    prompt, other = tokens(21, 0), tokens(13, 1)
    turn = prompt + tokens(11, 2)
    last = turn + tokens(9, 3)
    prompts = [prompt, other, turn, prompt, last, other, turn, last, prompt]
    return prompts, [tokens(n, 10 + n) for n in (9, 5, 14, 1, 4, 7, 2, 6, 3)]


def alone(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies [N, C] by a forward of each prompt and response."""
    shape = len(prompts), max(map(len, responses))
    log_probs, entropies = torch.zeros(shape), torch.zeros(shape)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        values = logits.log_softmax(-1)
        log_probs[i, : len(response)] = values.gather(1, torch.tensor(response)[:, None])[:, 0]
        entropies[i, : len(response)] = -(values.exp() * values).sum(-1)
    return log_probs, entropies


def gradients(model: PreTrainedModel, log_probs: Tensor, entropies: Tensor) -> Tensor:
    """Return the gradients of a loss with a different factor for each token."""
    model.zero_grad()
    factors = torch.linspace(-1, 2, log_probs.numel()).view(log_probs.shape)
    ((log_probs * factors).sum() + entropies.sum() / 7).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_equal_each_response_alone(family):
    model = tiny_model(family, **LAYERS.get(family, {}))
    prompts, responses = dialogues()
    expected = alone(model, prompts, responses)
    expected_gradients = gradients(model, *expected)
    enable(model)
    rows = pack_groups(prompts, responses, shortest_shared=4)
    assert depth(rows) == 4  # the responses to the third turn
    assert rows.input_ids.numel() < 0.6 * sum(map(len, prompts + responses))
    results = response_log_probs(model, rows)
    torch.testing.assert_close(results.log_probs, expected[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(results.entropies, expected[1], rtol=0, atol=5e-5)
    difference = gradients(model, *results) - expected_gradients
    assert difference.abs().max() < 4e-5 * expected_gradients.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4_text"])
def test_logits_equal_each_response_alone(family):
    model = tiny_model(family)
    prompts, responses = dialogues()
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        expected = [model(torch.tensor([sequence]), use_cache=False).logits[0] for sequence in sequences]
        enable(model)
        rows = pack_groups(prompts, responses, max_length=70, shortest_shared=4)
        assert len(rows.input_ids) > 1
        logits = model(**rows.inputs()).logits.flatten(0, 1)
    for prompt, response, want, index in zip(prompts, responses, expected, rows.index, strict=True):
        got = logits[index[: len(response)]]
        torch.testing.assert_close(got, want[len(prompt) - 1 : -1], rtol=0, atol=5e-5)


def depth(rows: GroupedRows) -> int:
    """Return the number of documents from the root to the deepest leaf of the first row."""
    ids, parents = rows.document_ids[0].tolist(), rows.prefix_ids[0].tolist()
    depths: dict[int, int] = {}
    for number, parent in zip(ids, parents, strict=True):
        depths.setdefault(number, 1 if parent == number else depths[parent] + 1)
    return max(depths.values())


def sequence_of(rows: GroupedRows, place: int) -> list[int]:
    """Return the tokens up to a place of the flattened rows, through the documents that its document continues."""
    row, column = divmod(place, rows.input_ids.shape[1])
    ids, parents, values = (x[row].tolist() for x in (rows.document_ids, rows.prefix_ids, rows.input_ids))
    path = [value for number, value in zip(ids[: column + 1], values, strict=False) if number == ids[column]]
    if parents[column] == ids[column]:
        return path
    last = max(i for i, number in enumerate(ids) if number == parents[column])
    return sequence_of(rows, row * rows.input_ids.shape[1] + last) + path


def random_pairs(seed: int) -> Pairs:
    """Return sequences that repeat, begin alike at random lengths, or are the beginning of others."""
    draw = random.Random(seed)
    base = [tokens(draw.randint(1, 40), seed * 100 + i) for i in range(3)]
    prompts, responses = [], []
    for i in range(draw.randint(1, 14)):
        sequence = draw.choice(base)
        sequence = sequence[: draw.randint(1, len(sequence))] + tokens(draw.randint(0, 12), draw.randint(0, 3))
        cut = draw.randint(1, len(sequence))
        prompts.append(sequence[:cut])
        responses.append(sequence[cut:])
        if i % 4 == 0:
            base.append(sequence)
    return prompts, responses


@pytest.mark.parametrize("seed", range(40))
def test_every_token_follows_its_sequence(seed):
    prompts, responses = random_pairs(seed)
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    rows = pack_groups(prompts, responses, [None, longest, longest + 9][seed % 3], shortest_shared=1 + seed % 5)
    labels = rows.labels.flatten()
    for prompt, response, index in zip(prompts, responses, rows.index.tolist(), strict=True):
        assert index[len(response) :] == [-1] * (len(index) - len(response))
        for i, place in enumerate(index[: len(response)]):
            assert sequence_of(rows, place) == prompt + response[:i]
            assert labels[place] == response[i]
            assert rows.position_ids.flatten()[place] == len(prompt) + i - 1
    scored = {place for index in rows.index.tolist() for place in index if place >= 0}
    assert (labels >= 0).nonzero().flatten().tolist() == sorted(scored)
    for ids in rows.document_ids.tolist():  # documents are whole, and numbered in order
        assert all(b in (a, a + 1, -1) for a, b in pairwise(ids))
        assert -1 not in ids[: len(ids) - ids.count(-1)]


def test_a_group_costs_its_prompt_once():
    prompt, responses = tokens(50, 0), [tokens(10, i) for i in range(1, 9)]
    rows = pack_groups([prompt] * 8, responses)
    assert rows.input_ids.shape == (1, 49 + 8 * 11)  # the last token of the prompt begins each response


def test_equal_responses_are_computed_once():
    prompt, response = tokens(50, 0), tokens(10, 1)
    rows = pack_groups([prompt] * 8, [response] * 8)
    assert rows.input_ids.tolist() == [prompt + response]
    assert rows.index.tolist() == [list(range(49, 59))] * 8


def test_a_short_beginning_is_not_shared():
    rows = pack_groups([tokens(16, 0)] * 2, [[5], [6]])
    assert rows.document_ids.amax() == 1
    rows = pack_groups([tokens(17, 0)] * 2, [[5], [6]])
    assert rows.document_ids.amax() == 2


def test_a_long_group_takes_several_rows():
    prompt, responses = tokens(50, 0), [tokens(10, i) for i in range(1, 9)]
    rows = pack_groups([prompt] * 8, responses, max_length=49 + 4 * 11)
    assert rows.input_ids.shape == (2, 49 + 4 * 11)
    assert rows.input_ids[:, :49].tolist() == [prompt[:49]] * 2


def test_rows_hold_several_groups():
    prompts = [tokens(20, i // 2) for i in range(8)]
    rows = pack_groups(prompts, [tokens(5, 10 + i) for i in range(8)], max_length=70)
    assert rows.input_ids.shape == (2, 62)
    assert (rows.document_ids == -1).sum() == 0


def test_prompts_of_one_token_and_empty_responses():
    model = enable(tiny_model("llama"))
    prompts, responses = [[5], [5], tokens(20, 0), tokens(20, 0)], [tokens(3, 1), [], [], tokens(2, 2)]
    rows = pack_groups(prompts, responses)
    assert (rows.index >= 0).sum(dim=1).tolist() == [3, 0, 0, 2]
    results = response_log_probs(model, rows)
    torch.testing.assert_close(results.log_probs, alone(model, prompts, responses)[0], rtol=0, atol=2e-5)
    empty = response_log_probs(model, pack_groups([[5, 6]], [[]]))
    assert empty.log_probs.shape == (1, 0)


def test_temperature_and_chunks(monkeypatch):
    model = enable(tiny_model("llama"))
    rows = pack_groups(*dialogues())
    with torch.no_grad():
        logits = model(**rows.inputs()).logits / 0.7
    expected = rows.gather(logits.log_softmax(-1).gather(2, rows.labels.clamp(min=0)[..., None])[..., 0])
    monkeypatch.setattr("sightline.hf.log_probs.CHUNK_SIZE", 5)
    torch.testing.assert_close(response_log_probs(model, rows, temperature=0.7).log_probs, expected)


def test_gradient_checkpointing_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        model = enable(tiny_model("gpt_oss")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append(gradients(model, *response_log_probs(model, pack_groups(*dialogues()))))
    assert torch.equal(*results)


def test_refused_arguments():
    with pytest.raises(ValueError, match="2 prompts and 1 responses; repeat the prompt"):
        pack_groups([[1], [2]], [[3]])
    with pytest.raises(ValueError, match="LlamaForCausalLM does not know documents that continue others"):
        response_log_probs(tiny_model("llama"), pack_groups([[1]], [[3]]))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pack_groups([[1], []], [[3], [4]])
    with pytest.raises(ValueError, match="has 4 tokens, more than the longest row, 3"):
        pack_groups([[1, 2]], [[3, 4]], max_length=3)
    with pytest.raises(ValueError, match="shortest_shared is a number of tokens, at least 1, got 0"):
        pack_groups([[1, 2]], [[3, 4]], shortest_shared=0)


@pytest.mark.parametrize(
    ("document_ids", "prefix_ids", "position_ids", "message"),
    [
        ([0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 2, 2], "tokens next to each other"),
        ([1, 0, 0, 0], [0, 0, 0, 0], [3, 0, 1, 2], "each after the document that it continues"),
        ([0, 0, 1, 1], [0, 0, 3, 3], [0, 1, 2, 3], "which must be in the row"),
        ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1], "token 2 of row 0 has position 0 after 1"),
        ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 4], "token 3 of row 0 has position 4 after 2"),
    ],
)
def test_trees_that_masks_cannot_follow_are_refused(document_ids, prefix_ids, position_ids, message):
    given = {"document_ids": document_ids, "prefix_ids": prefix_ids, "position_ids": position_ids}
    with pytest.raises(ValueError, match=message):
        find_documents((1, 4), **{name: torch.tensor([values]) for name, values in given.items()})


def test_roots_may_start_at_any_position():
    given = {"document_ids": [0, 0, 1, 1, -1], "prefix_ids": [0, 0, 0, 0, -1], "position_ids": [2, 3, 4, 5, 0]}
    documents = find_documents((1, 5), **{name: torch.tensor([values]) for name, values in given.items()})
    assert documents.mask.to_dense()[0, :4, :4].tolist() == [[True] * 2 + [False] * 2] * 2 + [[True] * 4] * 2
