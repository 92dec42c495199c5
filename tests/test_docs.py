"""The drawings of docs/masks.md are what the program draws, and its example rule does what it says."""

import re
from pathlib import Path

import pytest
import torch

from sightline.cli.expression import RULES, evaluate
from sightline.masks import AttentionMask
from sightline.plots.mask_text import to_text

PAGE = (Path(__file__).parent.parent / "docs" / "masks.md").read_text()
DRAWN = re.findall(r'```console\n\$ sightline masks "([^"]+)"\n(.*?)\n```', PAGE, re.DOTALL)


@pytest.mark.parametrize(("expression", "drawing"), DRAWN, ids=[e for e, _ in DRAWN])
def test_drawing(expression: str, drawing: str) -> None:
    assert to_text(evaluate(expression), 0, 80) == drawing


def test_every_rule_is_drawn() -> None:
    drawn = " ".join(expression for expression, _ in DRAWN)
    missing = [rule for rule in RULES if rule not in drawn and rule not in ("and_masks", "or_masks")]
    assert not missing


def test_the_example_of_a_new_rule() -> None:
    source = re.search(r"```python\n(def block_before.*?)```", PAGE, re.DOTALL)
    names: dict = {"torch": torch, "AttentionMask": AttentionMask}
    exec(source.group(1), names)
    mask = names["block_before"](2, 23, 5)
    block = torch.arange(23) // 5
    assert torch.equal(mask.to_dense(), (block[None, :] == block[:, None] - 1).expand(2, 23, 23))
