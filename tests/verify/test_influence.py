"""Influence between tokens and the trials of a leakage test, against dense matrices of pairs."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sightline.masks import AttentionMask, causal, document, shared_prefix, sliding_window
from sightline.verify.influence import Influence, number_documents, plan_trials


def masks() -> st.SearchStrategy[AttentionMask]:
    """Random masks of up to 3 rows of up to 12 tokens, sparse and dense ones."""

    def build(rows: int, length: int, density: float, seed: int) -> AttentionMask:
        pairs = torch.rand(rows, length, length, generator=torch.Generator().manual_seed(seed)) < density
        return AttentionMask.from_dense(pairs)

    return st.builds(
        build, st.integers(1, 3), st.integers(1, 12), st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.6]), st.integers(0, 999)
    )


def dense_influence(layers: list[AttentionMask]) -> Tensor:
    """bool [B, S, S]: whether an input (last dim) may influence an output through these layers, with residuals."""
    rows, length, _ = layers[0].shape
    reach = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
    for mask in layers:
        step = (mask.to_dense() | torch.eye(length, dtype=torch.bool)).float()
        reach = step @ reach.float() > 0
    return reach


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(0, 3))
def test_sources_equal_products_of_dense_masks(mask: AttentionMask, depth: int) -> None:
    rows, length, _ = mask.shape
    layers = [mask if index % 2 else mask & causal(rows, length) for index in range(depth + 1)]
    reach = dense_influence(layers)
    any_depth = dense_influence([mask] * length)
    for token in range(length):
        chosen = torch.zeros(rows, length, dtype=torch.bool)
        chosen[:, token] = True
        assert torch.equal(Influence(layers).sources(chosen), reach[:, token])
        assert torch.equal(Influence(mask).sources(chosen), any_depth[:, token])


@settings(max_examples=60, deadline=None)
@given(masks())
def test_documents_are_the_connected_tokens(mask: AttentionMask) -> None:
    either = mask.to_dense() | mask.to_dense().mT
    connected = dense_influence([AttentionMask.from_dense(either)] * mask.shape[1])
    numbers = number_documents(mask)
    assert torch.equal(numbers[:, :, None] == numbers[:, None, :], connected)
    assert all(not set(a.tolist()) & set(b.tolist()) for a, b in combinations(numbers, 2))


@settings(max_examples=60, deadline=None)
@given(masks())
def test_trials_of_all_tokens_cover_every_hidden_pair_and_no_other(mask: AttentionMask) -> None:
    rows, length, _ = mask.shape
    trials, documents = plan_trials(Influence(mask), None)
    tested = torch.zeros(rows, length, rows, length, dtype=torch.bool)
    for trial in trials:
        tested |= trial.outputs[:, :, None, None] & trial.hidden
    allowed = torch.zeros_like(tested)
    for row, reach in enumerate(dense_influence([mask] * length)):
        allowed[row, :, row] = reach
    visible = mask.visible_queries()
    assert torch.equal(tested, ~allowed & visible[:, :, None, None])
    assert documents == len(number_documents(mask)[visible].unique())


def test_documents_need_few_trials() -> None:
    """100 documents of 3 tokens in 4 rows: 2 log2(100) trials test every pair of documents."""
    ids = torch.arange(100).view(4, 25).repeat_interleave(3, dim=1)
    trials, documents = plan_trials(Influence(document(ids)), 2)
    assert (len(trials), documents) == (14, 100)
    assert torch.stack([trial.outputs for trial in trials]).any(dim=0).all()


def test_a_window_reaches_further_in_each_layer() -> None:
    window = causal(1, 12) & sliding_window(1, 12, 3)
    last = torch.arange(12)[None] == 11
    reach = [int(Influence([window] * depth).sources(last).sum()) for depth in (1, 2, 5)]
    assert reach == [3, 5, 11] and Influence(window).sources(last).all()


def test_a_response_may_depend_on_its_prompt_and_not_the_reverse() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]])
    influence = Influence(shared_prefix(ids, torch.zeros_like(ids)))
    assert influence.sources(ids == 2).tolist() == [[True, True, False, False, True, True]]
    assert influence.sources(ids == 0).tolist() == [[True, True, False, False, False, False]]


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an AttentionMask, a dict or a list of them, got \[\]"):
        Influence([])
    with pytest.raises(ValueError, match=r"the same S keys.*Q=3, T=6.*without a cache"):
        Influence(causal(1, 6).take_queries(torch.arange(3)))
