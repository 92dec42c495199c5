"""Positions of packed rows: stated documents bring their own, and RoPE that depends on the longest one is refused."""

from typing import Any

import pytest
import torch

import sightline.hf
from sightline.hf.positions import check_divided_positions
from tests.hf.test_enable import alone, close
from tests.support.hf_models import document_ids, packed_rows, tiny_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def rope_model(rope: dict[str, Any]) -> Any:
    return tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama4_text"])
def test_stated_documents_have_positions_of_their_own(family: str) -> None:
    model, layouts = tiny_model(family), ((9, 1, 14), (4, 20))
    rows = packed_rows(*layouts)
    expected = alone(model, rows, *layouts)
    sightline.hf.enable(model)
    with torch.no_grad():
        stated = model(input_ids=rows["input_ids"], document_ids=document_ids(*layouts))
        lengths = model(input_ids=rows["input_ids"], document_lengths=[list(layout) for layout in layouts])
    assert close(stated.logits, expected) and torch.equal(stated.logits, lengths.logits)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_of_short_documents_in_a_long_row(rope: dict[str, Any]) -> None:
    model, rows = rope_model(rope), packed_rows((10, 14))
    expected = alone(model, rows, (10, 14))
    sightline.hf.enable(model)
    with torch.no_grad():
        assert close(model(**rows).logits, expected)
        assert close(model(input_ids=rows["input_ids"], document_ids=document_ids((10, 14))).logits, expected)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_that_depends_on_another_document_is_refused(rope: dict[str, Any]) -> None:
    model = sightline.hf.enable(rope_model(rope))
    with pytest.raises(ValueError, match="differ from those of a document of 4 tokens alone; pack documents"):
        model(**packed_rows((20, 4)))
    running = {"position_ids": torch.arange(24)[None], "document_ids": document_ids((10, 14))}
    with pytest.raises(ValueError, match="largest position of the forward, 23"):
        model(input_ids=packed_rows((24,))["input_ids"], **running)


def test_longrope_of_documents_that_are_all_long() -> None:
    model, rows = rope_model(LONGROPE), packed_rows((20, 17))
    expected = alone(model, rows, (20, 17))
    with torch.no_grad():
        assert close(sightline.hf.enable(model)(**rows).logits, expected)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_with_the_name_alone(rope: dict[str, Any]) -> None:
    model = rope_model(rope)
    model.set_attn_implementation("sightline")
    model(**packed_rows((6, 10)))
    with pytest.raises(ValueError, match=r"largest position of the row; call sightline\.hf\.enable"):
        model(**packed_rows((20, 4)))


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_of_divided_rows(rope: dict[str, Any]) -> None:
    """Each rank has other positions, so its frequencies would be others as well."""
    model = rope_model(rope)
    check_divided_positions(model, packed_rows((10, 14))["position_ids"][:, :10])
    with pytest.raises(ValueError, match="here 19, and a rank has a part of them"):
        check_divided_positions(model, packed_rows((20, 4))["position_ids"])
