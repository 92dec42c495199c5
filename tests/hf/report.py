"""The table of `python -m tests.hf.classes`, in Markdown."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
import transformers

from tests.hf.isolation import PADDED, TOLERANCE, Outcome, Row

HEADER = """\
# Classes of transformers

Every causal class of the installed transformers, random and tiny, and whether packed rows equal each document alone
with `attn_implementation="sightline"`. The file is made by `{command}`; do not edit it.

transformers {transformers}, torch {torch}. {classes}; {images}.

- **equal**: the logits of packed rows are those of each document alone with eager attention, within {tolerance} of the
  largest logit, and the gradients of all parameters within {tolerance} of the largest one. Calls: the default one,
  `use_cache=False`, a mask of ones, `cu_seq_lens_q` without positions, two rows with different documents, and
  `document_ids` with positions that run on. Left-padded rows and generated tokens equal those of eager attention.
- **refused**: an error says why, and what to do.
- **equal or refused**: some calls are refused, such as positions [3, B, S] of rows with images, the others are equal.
- **isolated**: no document depends on another one, but results differ by more, as with sdpa: the model amplifies
  rounding errors.

Columns "eager" (the default call), "sdpa" (`use_cache=False`) and "sdpa, ones" (a mask of ones) show what transformers
does without Sightline: by how much a logit of documents 2 and 3 changes when a token of document 1 changes; 0 is right,
"-" an error. Column "name alone": the model is loaded with the name, without `sightline.hf.enable(model)`; "enable":
with it. A number is the largest relative error of the logits, and of the gradients. The rows "with images" pack
documents of text with an image each; there, the columns without Sightline hold relative errors.
"""
IMAGES = "with images"
"""Stands in place of the class in rows of documents with an image each."""
STOCK = ("eager, default", "sdpa, use_cache=False", "sdpa, all-ones mask")


def write_report(rows: list[Row], path: Path) -> None:
    """Write the table of all classes, and the reasons of those that are refused."""
    header = HEADER.format(
        command=f"python -m tests.hf.classes --output docs/{path.name}",
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        classes=count_verdicts("model types", [row for row in rows if row.cls != IMAGES]),
        images=count_verdicts("with images", [row for row in rows if row.cls == IMAGES]),
        tolerance=TOLERANCE,
    )
    lines = [header, *_table(rows), "", "## Why classes are refused", "", *_reasons(rows)]
    path.write_text("\n".join(lines) + "\n")


def count_verdicts(what: str, rows: list[Row]) -> str:
    """Return the number of rows, what they are, and how many have each verdict, the most frequent one first."""
    counts = Counter(row.verdict() for row in rows)
    return f"{len(rows)} {what}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| model type | class | eager | sdpa | sdpa, ones | name alone | enable |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stock = [row.stock.get(name, "-") for name in STOCK]
        leaks = ["-" if isinstance(leak, str) else f"{leak:.2g}" if leak else "0" for leak in stock]
        enabled = "refused" if row.refused else summary(row.enabled)
        cells = [row.model, row.cls, *leaks, summary(row.name_alone), enabled]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(outcomes: dict[str, Outcome]) -> str:
    """Return one cell: the errors if all calls are right, otherwise the verdicts other than right, with their calls."""
    other: dict[str, list[str]] = defaultdict(list)
    for call, outcome in outcomes.items():
        if outcome.verdict != "right":
            other[outcome.verdict].append(call)
    if "refused" in other and set(outcomes) - set(PADDED) <= {*other["refused"], *other.get("unsupported", [])}:
        return "refused"
    if set(other) == {"ignored"}:
        return "ignored by the class"
    right = [outcome for outcome in outcomes.values() if outcome.verdict == "right" and outcome.error is not None]
    numbers = f"{max(o.error or 0 for o in right):.0e}" if right else "-"
    gradients = [o.gradient for o in outcomes.values() if o.gradient is not None]
    numbers += f", {max(gradients):.0e}" if gradients else ""
    return "; ".join([numbers, *(f"{verdict}: {', '.join(calls)}" for verdict, calls in other.items())])


def _reasons(rows: list[Row]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[short_reason(refusal(row), row.cls)].append(row.model)
    groups.pop("", None)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"- **{len(models)}**: {reason}\n  ({', '.join(models)})" for reason, models in ordered]


def refusal(row: Row) -> str:
    """Return why a class is refused or was not built; empty if it is neither."""
    if row.verdict() == "not built":
        return f"Not built: {row.not_built}"
    if row.verdict() != "refused":
        return ""
    return row.refused or next(outcome.reason for outcome in row.enabled.values() if outcome.verdict == "refused")


def short_reason(message: str, cls: str) -> str:
    """Return a message without names and numbers of its class, on one line, so that equal reasons are grouped."""
    message = message.replace(cls, "the class")
    message = re.sub(r"^\w*(Attention|Layer|Mixer)\w*:? ", "", message)
    message = re.sub(r"\((\w+)\) outside", "outside", message)
    message = re.sub(
        r"attends to \d+ keys.* = \([\d, ]+\)", "attends to other keys than the mask of the model", message
    )
    return " ".join(message.split())[:400]
