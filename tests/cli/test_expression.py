"""Mask expressions give the same mask as Python, and evaluate nothing but rules and helpers."""

import pytest
import torch

from sightline import masks
from sightline.cli.expression import HELPERS, RULES, documents, evaluate, positions, repeat
from sightline.masks import (
    AttentionMask,
    causal,
    chunked,
    document,
    document_visibility,
    global_tokens,
    neighborhood,
    prefix_lm,
    sliding_window,
    token_tree,
)

IDS = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 2])
VISIBLE_IDS, VISIBLE = torch.tensor([[0, 0, 1]]), torch.tensor([[[True, False], [True, True]]])
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
        ("sliding_window(1, 8, left=None, right=2)", sliding_window(1, 8, left=None, right=2)),
        ("neighborhood(1, (3, 4), 3, is_causal=(True, False))", neighborhood(1, (3, 4), 3, is_causal=(True, False))),
        ("document_visibility([0, 0, 1], [[[1, 0], [1, 1]]])", document_visibility(VISIBLE_IDS, VISIBLE)),
        ("token_tree([-1, 0, 0], 2)", token_tree(torch.tensor([[-1, 0, 0]]), 2)),
        ("or_masks(and_masks(causal(1, 4), sliding_window(1, 4, 2)), causal(1, 4))", causal(1, 4)),
    ],
)
def test_expression_equals_the_python_mask(text: str, expected: AttentionMask) -> None:
    assert evaluate(text).equal(expected)


def test_helpers() -> None:
    assert documents(2, 3, padding=1) == [0, 0, 1, 1, 1, -1]
    assert positions(2, 3, padding=1) == [0, 1, 0, 1, 2, 0]
    assert repeat([7, 5], [2, 3]) == [7, 7, 5, 5, 5]


def test_every_public_rule_is_available() -> None:
    public = {name for name in masks.__all__ if name in vars(masks.rules)} - {"AttentionMask"}
    assert set(RULES) == public


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal(1, 4", "is not a mask expression .*never closed.*rules: causal, document"),
        ("", "is not a mask expression"),
        ("window(1, 4)", "unknown name 'window'.*sliding_window.*documents, positions, repeat"),
        ("causal(1, S)", "unknown name 'S'"),
        ("documents(5, 9)", "is a list; expected a mask"),
        ("3", "is a number; expected a mask"),
        ("causal(1, 4) & 3", "combine two masks; got a number in 'causal"),
        ("causal(1, 4) + causal(1, 4)", "is not allowed in a mask expression"),
        ("causal(1)", r"'causal\(1\)' does not match causal\(batch_size, length\)"),
        ("causal(1, 4, 5)", r"does not match causal\(batch_size, length\)"),
        ("causal(1, [1, 2])", "does not match causal"),
        ("sliding_window(1, 4, 0)", "at least 1; got 0"),
        ("causal(1, 4) & causal(1, 5)", "masks of different shape"),
        ("repeat([1], [2, 3])", "one length per value; got 1 values and 2 lengths"),
        ("document([[0, 0], [1]])", "lists of the same length"),
        ("document([])", "document_ids must be integers"),
        ("document((0, 0, 1))", r"does not match document\(document_ids, key_document_ids\)"),
        ("neighborhood(1, 12, 3)", "a tuple of one size for each dimension; got 12"),
        ("sliding_window(1, 4, 2, left=1)", "Give either window, or left and right"),
        ("causal(*[1, 4])", r"\* and \*\* are not allowed"),
        ("causal(**[1, 4])", r"\* and \*\* are not allowed"),
    ],
)
def test_wrong_expressions_are_refused(text: str, message: str) -> None:
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
def test_no_other_python_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="mask expression"):
        evaluate(text)


def test_helpers_and_rules_have_distinct_names() -> None:
    assert not set(RULES) & set(HELPERS)
