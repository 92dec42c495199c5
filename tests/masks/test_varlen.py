import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import causal, chunked, document, global_tokens, prefix_lm, sliding_window
from sightline.masks.varlen import VarlenLayout
from tests.support.random_masks import expressions, packed_rows


def dense_of(layout: VarlenLayout, rows: int, length: int) -> torch.Tensor:
    """Dense mask of a layout, as varlen kernels interpret it: bool [B, S, S]."""
    total = rows * length
    flat = torch.zeros(total, total, dtype=torch.bool)
    left, right = layout.window
    for first, last in zip(layout.cu_seqlens.tolist(), layout.cu_seqlens.tolist()[1:], strict=False):
        index = torch.arange(last - first)
        distance = index[:, None] - index
        visible = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            visible &= distance <= left
        if right >= 0:
            visible &= distance >= -right
        flat[first:last, first:last] = visible
    dense = torch.stack([flat[r * length : (r + 1) * length, r * length : (r + 1) * length] for r in range(rows)])
    assert flat.sum() == dense.sum(), "a sequence crosses rows"
    if layout.padding is not None:
        dense &= ~layout.padding[:, :, None]
    return dense


@settings(max_examples=100, deadline=None)
@given(packed_rows(), st.integers(1, 12))
def test_supported_masks_equal_their_dense_mask(rows, size) -> None:
    batch, length = rows.shape
    documents = document(rows.document_ids)
    for mask in (
        documents,
        documents & causal(batch, length),
        documents & sliding_window(batch, length, size),
        documents & chunked(rows.positions, size),
        documents & chunked(rows.positions, size) & causal(batch, length),
    ):
        layout = mask.to_varlen()
        assert torch.equal(dense_of(layout, batch, length), mask.to_dense())
        assert layout.max_length == int(layout.cu_seqlens.diff().max())
        assert layout.cu_seqlens.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_layouts_are_exact_or_rejected(pair) -> None:
    mask, dense = pair
    try:
        layout = mask.to_varlen()
    except ValueError as error:
        assert "row " in str(error) and "attends to" in str(error)
    else:
        assert torch.equal(dense_of(layout, mask.shape[0], mask.shape[1]), dense)


def test_layout_of_packed_documents() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]])
    layout = (causal(2, 5) & document(ids)).to_varlen()
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 7, 8, 9, 10]
    assert layout.window == (-1, 0)
    assert layout.padding.tolist() == [[False] * 5, [False, False, True, True, True]]
    assert (sliding_window(2, 5, 2) & document(ids)).to_varlen().window == (1, 0)


def test_errors_state_the_reason() -> None:
    positions = torch.arange(8)[None]
    with pytest.raises(ValueError, match="none of these"):
        (prefix_lm(positions, torch.full_like(positions, 3)) | causal(1, 8)).to_varlen()
    is_global = positions == 0
    with pytest.raises(ValueError, match=r"query \d+ attends to 2"):
        ((global_tokens(is_global) | sliding_window(1, 8, 2)) & causal(1, 8)).to_varlen()
    with pytest.raises(ValueError, match="Q=4 and T=8"):
        causal(1, 8).take_queries(torch.arange(4)).to_varlen()
