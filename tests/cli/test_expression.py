"""Expressions of rules: that they give the mask Python would, and evaluate nothing else."""

import pytest
import torch

from sightline import masks
from sightline.cli.expression import HELPERS, RULES, documents, evaluate, positions, repeat
from sightline.masks import AttentionMask, causal, chunked, document, global_tokens, prefix_lm, sliding_window

IDS = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 2])
POSITIONS = torch.tensor([[*range(5), *range(9), 0, 0]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("causal(1, 64)", causal(1, 64)),
        ("causal(1, 64) & sliding_window(1, 64, 8)", sliding_window(1, 64, 8)),
        ("causal(1, 16) & document(documents(5, 9, padding=2))", causal(1, 16) & document(IDS)),
        (" sliding_window(batch_size=1, length=16, window=3) ", sliding_window(1, 16, 3)),
        ("chunked(positions(5, 9, padding=2), 4)", chunked(POSITIONS, 4)),
        (
            "(prefix_lm(positions(5, 9, padding=2), repeat([3, 2, 0], [5, 9, 2])) | causal(1, 16))"
            " & document(documents(5, 9, padding=2))",
            (prefix_lm(POSITIONS, torch.tensor([[3] * 5 + [2] * 9 + [0] * 2])) | causal(1, 16)) & document(IDS),
        ),
        ("document([[0, 0, 1], [0, -1, -1]])", document(torch.tensor([[0, 0, 1], [0, -1, -1]]))),
        ("global_tokens([True, False, False])", global_tokens(torch.tensor([[True, False, False]]))),
        ("or_masks(and_masks(causal(1, 4), sliding_window(1, 4, 2)), causal(1, 4))", causal(1, 4)),
    ],
)
def test_an_expression_is_the_mask_it_says(text: str, expected: AttentionMask) -> None:
    assert evaluate(text).equal(expected)


def test_facts_about_tokens() -> None:
    assert documents(2, 3, padding=1) == [0, 0, 1, 1, 1, -1]
    assert positions(2, 3, padding=1) == [0, 1, 0, 1, 2, 0]
    assert repeat([7, 5], [2, 3]) == [7, 7, 5, 5, 5]


def test_every_public_rule_can_be_written() -> None:
    public = {name for name in masks.__all__ if name in vars(masks.rules)} - {"AttentionMask"}
    assert set(RULES) == public


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal(1, 4", "is not an expression of rules .*never closed.*rules: causal, document"),
        ("", "is not an expression of rules"),
        ("window(1, 4)", "unknown name 'window'.*sliding_window.*documents, positions, repeat"),
        ("causal(1, S)", "unknown name 'S'"),
        ("documents(5, 9)", "gives a list, expected a mask"),
        ("3", "gives a number, expected a mask"),
        ("causal(1, 4) & 3", "join two masks, got a number in 'causal"),
        ("causal(1, 4) + causal(1, 4)", "cannot stand in an expression"),
        ("causal(1)", r"'causal\(1\)' does not fit causal\(batch_size, length\)"),
        ("causal(1, 4, 5)", r"does not fit causal\(batch_size, length\)"),
        ("causal(1, [1, 2])", "does not fit causal"),
        ("sliding_window(1, 4, 0)", "at least 1; got 0"),
        ("causal(1, 4) & causal(1, 5)", "masks of different shape"),
        ("repeat([1], [2, 3])", "as many values as lengths, got 1 and 2"),
        ("document([[0, 0], [1]])", "lists of one length"),
        ("document([])", "document_ids must be integers"),
        ("causal(*[1, 4])", r"\* and \*\* cannot stand"),
        ("causal(**[1, 4])", r"\* and \*\* cannot stand"),
    ],
)
def test_what_is_no_mask_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "causal.__globals__",
        "causal(1, 4).start",
        "(lambda: causal(1, 4))()",
        "[x for x in (1, 2)]",
        "causal(1, 10 ** 10)",
        "causal(1, open('/etc/hostname'))",
        "eval('1')",
        "causal(1, 4) if 1 else causal(1, 5)",
        "f'{causal}'",
    ],
)
def test_nothing_else_of_python_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="expression of rules"):
        evaluate(text)


def test_helpers_and_rules_have_names_of_their_own() -> None:
    assert not set(RULES) & set(HELPERS)
