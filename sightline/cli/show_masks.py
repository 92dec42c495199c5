"""The pictures and counts of `sightline masks`."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sightline.batch import PADDING
from sightline.cli.expression import evaluate
from sightline.cli.first_batch import MaskSource, first_batch
from sightline.cli.masks import Masks
from sightline.cli.output import tabulate, writing
from sightline.masks import AttentionMask
from sightline.masks.statistics import Statistics, check_row, get_statistics
from sightline.models import Family
from sightline.numbers import flops
from sightline.plots.mask_page import to_html
from sightline.plots.mask_png import plot_masks
from sightline.plots.mask_text import to_text
from sightline.recipes import RECIPES, get_family, get_recipe
from sightline.training.run_directory import RunDirectory, load_config

WIDEST = 100  # columns a picture takes by itself; a wider one would not fit a screen in height


def show_masks(options: Masks) -> None:
    """Print the masks and their counts, and write the files that the options name."""
    console = Console(highlight=False)
    family = None if options.family is None else get_family(options.family)
    subject = find_mask_source(options.what, options.sequence_length, family)
    for mask in subject.masks.values():
        check_row(mask, options.row)
    counted = {name: get_statistics(mask, options.block_size) for name, mask in subject.masks.items()}
    for name, mask in subject.masks.items():
        show(console, name, mask, options)
    if options.stats:
        console.print(tabulate({name: describe(counted[name], subject, name) for name in counted}))
        if subject.model is not None:
            console.print(tabulate({"a training step, forward and backward": describe_step(counted, subject)}))
    if options.png:
        with writing(options.png):
            plot_masks(subject.masks, options.png, options.row)
    if options.html:
        facts = {
            name: describe_flops(get_statistics(mask[options.row]), subject, name)
            for name, mask in subject.masks.items()
        }
        page = to_html(subject.masks, options.row, title=subject.title, block_size=options.block_size, facts=facts)
        with writing(options.html):
            options.html.write_text(page, encoding="utf-8")


def find_mask_source(what: str, sequence_length: int | None, family: Family | None = None) -> MaskSource:
    """The masks of a recipe, of the directory of a run (`family` as in `load_config`), or of an expression.

    Errors: ValueError where `what` is none of them, or cannot be read as what it is.
    """
    if what in RECIPES:
        return first_batch(what, RECIPES[what], None, sequence_length)
    if os.path.isdir(what):
        config = RunDirectory(Path(what)).config
        if not config.exists():
            raise ValueError(
                f"{what} is no directory of a run: it has no {config.name}, which `sightline train` writes"
            )
        return first_batch(what, load_config(config, family), Path(what), sequence_length)
    if "(" in what:
        if sequence_length is not None:
            raise ValueError("--sequence-length is for recipes and runs; an expression of rules states its own lengths")
        return MaskSource(title=what, masks={"attention": evaluate(what)})
    if ":" in what:
        return first_batch(what, get_recipe(what), None, sequence_length)
    raise ValueError(
        f"{what!r} is no recipe ({', '.join(RECIPES)}), no directory, and no expression of rules such as "
        f'"causal(1, 64) & sliding_window(1, 64, 8)"'
    )


def show(console: Console, name: str, mask: AttentionMask, options: Masks) -> None:
    """One mask in the terminal, in colour where it has colours."""
    rows = f", row {options.row} of {mask.shape[0]}" if mask.shape[0] > 1 else ""
    console.print(
        Text.assemble((name, "bold"), f"{rows}: {get_statistics(mask[options.row]).describe()}"), soft_wrap=True
    )
    unicode = console.encoding.lower().startswith("utf")
    width = options.width or min(console.width, WIDEST)
    picture = Text(to_text(mask, options.row, width, unicode=unicode))
    picture.highlight_regex(r"[█▓▒░▀▄#*+]+", "bright_blue")
    picture.highlight_regex(r"[·─│┌.|-]+", "dim")
    console.print(picture, soft_wrap=True)
    console.print()


def describe(counts: Statistics, subject: MaskSource, name: str) -> dict[str, str]:
    """What there is to count of one mask, over all rows of the batch."""
    pairs, blocks = counts.visible_pairs, counts.blocks
    spread = f" ({min(pairs):,} to {max(pairs):,})" if len(pairs) > 1 else ""
    share = {} if counts.share_of_causal is None else {"share of causal": f"{counts.share_of_causal:.2%}"}
    full, partial, empty = (f"{number:,} ({number / sum(blocks):.1%})" for number in blocks)
    return {
        "rows, queries, keys": f"{len(pairs)}, {counts.queries:,}, {counts.keys:,}",
        "intervals a query (K)": f"{counts.intervals}",
        "visible pairs a row": f"{round(counts.pairs_per_row):,}{spread}",
        **share,
        "sparsity": f"{counts.sparsity:.2%}",
        f"blocks of {counts.block_size}, full": full,
        f"blocks of {counts.block_size}, partial": partial,
        f"blocks of {counts.block_size}, empty": empty,
        **describe_flops(counts, subject, name),
    }


def describe_flops(counts: Statistics, subject: MaskSource, name: str) -> dict[str, str]:
    """Forward and backward FLOPs of attention under one mask, over all rows; nothing for a mask without a model."""
    if subject.model is None:
        return {}
    layers, groups = subject.model.attention_shape(name)
    if not layers:
        return {"attention FLOPs, all layers": "0: no layer attends under this mask"}
    total = sum(counts.visible_pairs) * subject.model.flops_per_pair(name)
    return {
        "attention FLOPs, all layers": flops(total),
        f"one of {layers} layers": flops(total / layers),
        f"one of its {groups} head groups": flops(total / layers / groups),
    }


def describe_step(counted: dict[str, Statistics], subject: MaskSource) -> dict[str, str]:
    """Forward and backward FLOPs of the whole batch: what MFU counts, and what it would count without the masks."""
    assert subject.model is not None and subject.batch is not None
    attention = causal = 0.0
    for name, counts in counted.items():
        per_pair, rows, length = subject.model.flops_per_pair(name), len(counts.visible_pairs), counts.keys
        attention += per_pair * sum(counts.visible_pairs)
        causal += per_pair * rows * length * (length + 1) / 2
    tokens = int((subject.batch.document_ids != PADDING).sum())
    matmul = tokens * subject.model.flops_per_token()
    step = matmul + attention
    return {
        "tokens": f"{tokens:,} ({subject.batch.fill():.1%} of the rows)",
        "matrix products": flops(matmul),
        "attention": f"{flops(attention)} ({attention / step:.1%} of the step)",
        "the step": flops(step),
        "as plain causal rows": f"{flops(matmul + causal)}, {(matmul + causal) / step:.2f} times as much",
    }
