"""The plots in docs/masks.md equal those of the program, and its example of a new rule works."""

import re
from pathlib import Path

import pytest
import torch

from sightline.cli.expression import RULES, evaluate
from sightline.masks import AttentionMask
from sightline.plots.mask_text import to_text

PAGE = (Path(__file__).parent.parent / "docs" / "masks.md").read_text()
PLOTS = re.findall(r'```console\n\$ sightline masks "([^"]+)"\n(.*?)\n```', PAGE, re.DOTALL)


@pytest.mark.parametrize(("expression", "plot"), PLOTS, ids=[e for e, _ in PLOTS])
def test_plot(expression: str, plot: str) -> None:
    assert to_text(evaluate(expression), 0, 80) == plot


def test_every_rule_has_a_plot() -> None:
    plotted = " ".join(expression for expression, _ in PLOTS)
    missing = [rule for rule in RULES if rule not in plotted and rule not in ("and_masks", "or_masks")]
    assert not missing


def test_the_example_of_a_new_rule() -> None:
    source = re.search(r"```python\n(def block_before.*?)```", PAGE, re.DOTALL)
    names: dict = {"torch": torch, "AttentionMask": AttentionMask}
    exec(source.group(1), names)
    mask = names["block_before"](2, 23, 5)
    block = torch.arange(23) // 5
    assert torch.equal(mask.to_dense(), (block[None, :] == block[:, None] - 1).expand(2, 23, 23))
