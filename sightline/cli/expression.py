"""Parser of mask expressions: `causal(1, 16) & document(documents(5, 9, padding=2))`.

An expression has calls of mask rules and of a few helpers, numbers, None, lists, tuples, & and |. No other Python is
evaluated.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sightline.masks import AttentionMask
from sightline.masks.rules import RULES


def documents(*lengths: int, padding: int = 0) -> list[int]:
    """Document ids of documents with these lengths: documents(2, 3, padding=1) is 0 0 1 1 1 -1."""
    return repeat([*range(len(lengths)), -1], [*lengths, padding])


def positions(*lengths: int, padding: int = 0) -> list[int]:
    """Positions inside documents with these lengths: positions(2, 3, padding=1) is 0 1 0 1 2 0."""
    return [position for length in lengths for position in range(length)] + [0] * padding


def repeat(values: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Each value repeated as many times as its length: repeat([7, 5], [2, 3]) is 7 7 5 5 5."""
    if len(values) != len(lengths):
        raise ValueError(f"repeat needs one length per value; got {len(values)} values and {len(lengths)} lengths")
    return [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]


HELPERS: dict[str, Callable[..., list[int]]] = {helper.__name__: helper for helper in (documents, positions, repeat)}
NAMES = f"rules: {', '.join(RULES)}; helpers for their arguments: {', '.join(HELPERS)}"


def evaluate(text: str) -> AttentionMask:
    """Return the mask of the expression `text`. A list argument [S] is one row, a list of lists [B, S] several rows.

    Raises:
        ValueError: if `text` is not a mask expression; the message shows the wrong part and the names that can be used.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not a mask expression ({error.msg}); {NAMES}") from error
    mask = _value(tree)
    if not isinstance(mask, AttentionMask):
        raise ValueError(f"{text!r} is {_kind(mask)}; expected a mask: the outermost call must be a rule; {NAMES}")
    return mask


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as number):  # also True and False
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
            return -number
        case ast.Constant(value=None):  # no limit
            return None
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):  # sizes, one for each dimension
            return tuple(_value(item) for item in items)
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as operator, right=right):
            return _combine(node, _value(left), operator, _value(right))
        case ast.Call(func=ast.Name(id=name)) if name in RULES or name in HELPERS:
            return _call(node, name)
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
            raise ValueError(f"unknown name {name!r} in a mask expression; {NAMES}")
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed in a mask expression; expected calls, numbers, lists, & and |; " + NAMES
    )


def _combine(node: ast.expr, left: Any, operator: ast.operator, right: Any) -> AttentionMask:
    for side in (left, right):
        if not isinstance(side, AttentionMask):
            raise ValueError(f"& and | combine two masks; got {_kind(side)} in {ast.unparse(node)!r}")
    return left & right if isinstance(operator, ast.BitAnd) else left | right


def _call(node: ast.Call, name: str) -> Any:
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(k.arg is None for k in node.keywords):
        raise ValueError(f"* and ** are not allowed in a mask expression: {ast.unparse(node)!r}; write the values out")
    arguments = [_value(argument) for argument in node.args]
    options = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    function = RULES.get(name) or HELPERS[name]
    if name in RULES:
        arguments = [_to_tensor(argument) for argument in arguments]
        options = {option: _to_tensor(value) for option, value in options.items()}
    try:
        return function(*arguments, **options)
    except (TypeError, RuntimeError, AttributeError) as error:  # raised by Python or torch for a wrong argument
        takes = ", ".join(parameter for parameter in inspect.signature(function).parameters if parameter != "device")
        raise ValueError(f"{ast.unparse(node)!r} does not match {name}({takes}): {error}") from error


def _to_tensor(value: Any) -> Any:
    """Convert a list to the tensor [B, S] that a rule takes; return other values unchanged."""
    if not isinstance(value, list):
        return value
    rows = value if value and isinstance(value[0], list) else [value]
    if len({len(row) if isinstance(row, list) else None for row in rows}) != 1:
        raise ValueError("the rows of a list argument must be lists of the same length")
    return torch.tensor(rows)


def _kind(value: Any) -> str:
    return {int: "a number", bool: "a number", list: "a list"}.get(type(value), type(value).__name__)
