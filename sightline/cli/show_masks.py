"""The plots and counts of `sightline masks`."""

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
from sightline.paths import printable
from sightline.plots.mask_page import to_html
from sightline.plots.mask_png import plot_masks
from sightline.plots.mask_text import to_text
from sightline.recipes import RECIPES, get_family, get_recipe
from sightline.training.run_directory import RunDirectory, load_config

MAX_WIDTH = 100  # columns of a plot by default; a wider plot would be taller than a screen


def show_masks(options: Masks) -> None:
    """Print the masks and their counts, and write the files named by the options."""
    console = Console(highlight=False)
    family = None if options.family is None else get_family(options.family)
    source = find_mask_source(options.what, options.sequence_length, family)
    for mask in source.masks.values():
        check_row(mask, options.row)
    statistics = {name: get_statistics(mask, options.block_size) for name, mask in source.masks.items()}
    for name, mask in source.masks.items():
        show(console, name, mask, options)
    if options.stats:
        console.print(tabulate({name: describe(statistics[name], source, name) for name in statistics}))
        if source.model is not None:
            console.print(tabulate({"training step, forward and backward": describe_step(statistics, source)}))
    if options.png:
        with writing(options.png):
            plot_masks(source.masks, options.png, options.row)
    if options.html:
        facts = {
            name: describe_flops(get_statistics(mask[options.row]), source, name) for name, mask in source.masks.items()
        }
        page = to_html(source.masks, options.row, title=source.title, block_size=options.block_size, facts=facts)
        with writing(options.html):
            options.html.write_text(page, encoding="utf-8")


def find_mask_source(what: str, sequence_length: int | None, family: Family | None = None) -> MaskSource:
    """Return the masks of a recipe, of a run directory (`family` as in `load_config`), or of a mask expression.

    Raises:
        ValueError: if `what` is none of them, or cannot be read.
    """
    if what in RECIPES:
        return first_batch(what, RECIPES[what], None, sequence_length)
    if os.path.isdir(what):
        config = RunDirectory(Path(what)).config
        if not config.exists():
            raise ValueError(
                f"{what} is not a run directory: it has no {config.name}; expected one written by sightline train"
            )
        return first_batch(what, load_config(config, family), Path(what), sequence_length)
    if "(" in what:
        if sequence_length is not None:
            raise ValueError("--sequence-length applies to recipes and runs; a mask expression states its own lengths")
        return MaskSource(title=what, masks={"attention": evaluate(what)})
    if ":" in what:
        return first_batch(what, get_recipe(what), None, sequence_length)
    raise ValueError(
        f"{what!r} is not a recipe, a run directory, or a mask expression such as "
        f'"causal(1, 64) & sliding_window(1, 64, 8)"; the recipes are: {", ".join(RECIPES)}'
    )


def show(console: Console, name: str, mask: AttentionMask, options: Masks) -> None:
    """Plot one mask in the terminal, in color if the terminal supports it."""
    rows = f", row {options.row} of {mask.shape[0]}" if mask.shape[0] > 1 else ""
    console.print(
        Text.assemble((printable(name), "bold"), f"{rows}: {get_statistics(mask[options.row]).describe()}"),
        soft_wrap=True,
    )
    unicode = console.encoding.lower().startswith("utf")
    width = options.width or min(console.width, MAX_WIDTH)
    picture = Text(to_text(mask, options.row, width, unicode=unicode))
    picture.highlight_regex(r"[█▓▒░▀▄#*+]+", "bright_blue")
    picture.highlight_regex(r"[·─│┌.|-]+", "dim")
    console.print(picture, soft_wrap=True)
    console.print()


def describe(counts: Statistics, source: MaskSource, name: str) -> dict[str, str]:
    """Counts of one mask over all rows of the batch, as text by label."""
    pairs, blocks = counts.visible_pairs, counts.blocks
    spread = f" ({min(pairs):,} to {max(pairs):,})" if len(pairs) > 1 else ""
    share = {} if counts.share_of_causal is None else {"share of causal": f"{counts.share_of_causal:.2%}"}
    full, partial, empty = (f"{number:,} ({number / sum(blocks):.1%})" for number in blocks)
    return {
        "rows, queries, keys": f"{len(pairs)}, {counts.queries:,}, {counts.keys:,}",
        "intervals per query (K)": f"{counts.intervals}",
        "visible pairs per row": f"{round(counts.pairs_per_row):,}{spread}",
        **share,
        "sparsity": f"{counts.sparsity:.2%}",
        f"blocks of {counts.block_size}, full": full,
        f"blocks of {counts.block_size}, partial": partial,
        f"blocks of {counts.block_size}, empty": empty,
        **describe_flops(counts, source, name),
    }


def describe_flops(counts: Statistics, source: MaskSource, name: str) -> dict[str, str]:
    """Forward and backward attention FLOPs under one mask, over all rows; empty for a mask without a model."""
    if source.model is None:
        return {}
    layers, groups = source.model.attention_shape(name)
    if not layers:
        return {"attention FLOPs, all layers": "0: no layer uses this mask"}
    total = sum(counts.visible_pairs) * source.model.flops_per_pair(name)
    return {
        "attention FLOPs, all layers": flops(total),
        f"per layer ({layers} layers)": flops(total / layers),
        f"per head group ({groups} in a layer)": flops(total / layers / groups),
    }


def describe_step(statistics: dict[str, Statistics], source: MaskSource) -> dict[str, str]:
    """Forward and backward FLOPs of a training step on the batch, as MFU counts them, and with plain causal masks."""
    assert source.model is not None and source.batch is not None
    attention = causal = 0.0
    for name, counts in statistics.items():
        per_pair, rows, length = source.model.flops_per_pair(name), len(counts.visible_pairs), counts.keys
        attention += per_pair * sum(counts.visible_pairs)
        causal += per_pair * rows * length * (length + 1) / 2
    tokens = int((source.batch.document_ids != PADDING).sum())
    matmul = tokens * source.model.flops_per_token()
    step = matmul + attention
    return {
        "tokens": f"{tokens:,} ({source.batch.fill():.1%} of the rows)",
        "matrix products": flops(matmul),
        "attention": f"{flops(attention)} ({attention / step:.1%} of the step)",
        "total": flops(step),
        "with plain causal rows": f"{flops(matmul + causal)}, {(matmul + causal) / step:.2f} times as much",
    }
