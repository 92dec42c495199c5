"""Documents are found from every argument; stated ones decide, and arguments that disagree are refused."""

import pytest
import torch

from sightline.hf.documents import Documents, find_documents

SHAPE = (2, 6)
IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]])
LENGTHS = [[2, 3, 1], [4, 2]]
CUMULATIVE = torch.tensor([0, 2, 5, 6, 10, 12], dtype=torch.int32)
SOURCES = {
    "document_lengths": LENGTHS,
    "document_ids": IDS,
    "seq_idx": IDS,
    "attention_mask": IDS + 1,
    "cu_seq_lens_q": CUMULATIVE,
    "position_ids": POSITIONS,
}


def found(**arguments) -> Documents:
    documents = find_documents(SHAPE, **arguments)
    assert documents is not None
    return documents


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_documents(name: str) -> None:
    documents = found(**{name: SOURCES[name]})
    assert documents.source == name
    assert torch.equal(documents.ids, IDS)
    assert documents.packed
    assert torch.equal(documents.index_in_document, POSITIONS)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "position_ids"])
def test_stated_documents_win_over_positions_that_run_on_or_jump(name: str) -> None:
    run_on = torch.arange(6).expand(SHAPE)
    jumps = torch.tensor([[0, 5, 0, 7, 9, 0], [0, 3, 3, 3, 0, 8]])
    for positions in (run_on, jumps):
        assert torch.equal(found(**{name: SOURCES[name]}, position_ids=positions).ids, IDS)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "position_ids"])
def test_a_position_of_zero_inside_a_stated_document_is_refused(name: str) -> None:
    positions = POSITIONS.clone()
    positions[1, 2] = 0
    with pytest.raises(ValueError, match=f"start a document at token 2 of row 1, but {name}"):
        found(**{name: SOURCES[name]}, position_ids=positions)


@pytest.mark.parametrize("second", [name for name in SOURCES if name not in ("document_lengths", "position_ids")])
def test_sources_that_disagree_are_refused(second: str) -> None:
    assert found(document_lengths=LENGTHS, **{second: SOURCES[second]}).source == "document_lengths"
    with pytest.raises(ValueError, match=f"document_lengths and {second} state different documents"):
        found(document_lengths=[[2, 2, 2], [4, 2]], **{second: SOURCES[second]})


def test_no_source_gives_nothing() -> None:
    assert find_documents(SHAPE) is None
    assert find_documents(SHAPE, attention_mask=torch.ones(SHAPE)) is None


def test_positions_from_zero_state_one_document() -> None:
    documents = found(position_ids=torch.arange(6)[None])
    assert not documents.packed and documents.ids.shape == SHAPE


def test_padding_masks_state_rows() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    documents = found(attention_mask=mask)
    assert torch.equal(documents.ids, mask.int() - 1)
    assert not documents.packed


def test_positions_are_compared_between_tokens_that_are_no_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 2, 0, 0]])
    documents = found(attention_mask=mask, position_ids=positions)
    assert documents.ids.tolist() == [[-1, -1, 0, 0, 1, 1], [0, 0, -1, 0, 1, -1]]


def test_lists_arrays_and_tensors() -> None:
    for ids in (IDS.tolist(), IDS.numpy(), IDS.long()):
        assert torch.equal(found(document_ids=ids).ids, IDS)
    assert found(document_lengths=torch.tensor([[3, 3], [4, 2]])).ids.tolist() == [[0] * 3 + [1] * 3, [0] * 4 + [1] * 2]


def test_padding_inside_a_document_does_not_end_it() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]])
    documents = found(attention_mask=mask)
    assert documents.index_in_document[mask == 1].tolist() == [0, 1, 3, 4, 0, 1, 2, 4, 5]


def test_stated_documents_and_padding() -> None:
    mask = torch.ones(SHAPE, dtype=torch.int64)
    mask[0, 5] = 0
    assert found(document_ids=IDS, attention_mask=mask).ids[0].tolist() == [0, 0, 1, 1, 1, -1]
    assert found(document_lengths=[[2, 3], [4, 2]]).ids[0].tolist() == [0, 0, 1, 1, 1, -1]


def test_four_positions_have_text_positions_first() -> None:
    mrope = torch.stack([POSITIONS, *torch.randint(9, (3, *SHAPE))])
    assert torch.equal(found(position_ids=mrope).ids, IDS)


def test_three_positions_of_one_document() -> None:
    image = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    assert not found(position_ids=image[:, None].expand(3, *SHAPE)).packed


@pytest.mark.parametrize("first", [3, 1], ids=["positions fall", "one token, then another document"])
def test_three_positions_of_several_documents_are_refused(first: int) -> None:
    positions = torch.cat([torch.arange(first), torch.arange(6 - first)]).expand(3, *SHAPE)
    with pytest.raises(ValueError, match=f"restart at token {first} of row 0.*pass document_ids"):
        found(position_ids=positions)
    assert found(position_ids=positions, document_ids=IDS).source == "document_ids"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"document_ids": IDS[:, :5]}, r"document_ids must be integers \[B, S\] = \[2, 6\]"),
        ({"seq_idx": IDS.float()}, r"seq_idx must be integers"),
        ({"document_lengths": [[6]]}, "for each of 2 rows of 6 tokens"),
        ({"document_lengths": [[7], [6]]}, "for each of 2 rows of 6 tokens"),
        ({"document_lengths": [[6, 0], [6]]}, "at least 1"),
        ({"document_lengths": [6, 6, 6]}, "for each of 2 rows"),
        ({"document_lengths": [[6.0], [6]]}, "document_lengths must list the tokens"),
        ({"document_ids": [[0, 1], [0]]}, r"document_ids must be integers \[B, S\]"),
        ({"document_ids": IDS - 2}, "or -1 for padding, got -2 to 0"),
        ({"document_ids": IDS.long() * 2**32}, "to 2\\*\\*31 - 1"),
        ({"seq_idx": IDS % 2}, "seq_idx has document 0 at several places of row 0; give each document a number"),
        ({"attention_mask": IDS % 2 + 1}, "attention_mask has document 0 at several places"),
        ({"document_ids": "abc"}, r"document_ids must be integers \[B, S\]"),
        ({"cu_seq_lens_q": CUMULATIVE[:-1]}, "ends at 10, but there are 2 x 6 tokens"),
        ({"cu_seq_lens_q": CUMULATIVE + 1}, "start with 0"),
        ({"cu_seq_lens_q": CUMULATIVE, "cu_seq_lens_k": CUMULATIVE * 2}, "cu_seq_lens_q and cu_seq_lens_k differ"),
        ({"position_ids": torch.zeros(2, 5)}, "do not say where documents"),
        ({"position_ids": POSITIONS, "prefix_ids": IDS}, "pass document_ids as well"),
        ({"document_ids": IDS, "prefix_ids": IDS}, "prefix_ids need position_ids"),
    ],
)
def test_wrong_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(**arguments)
