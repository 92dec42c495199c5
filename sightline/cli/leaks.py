"""`sightline leaks --hf MODEL`: test whether documents of a packed row depend on each other in a model."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sightline.cli.options import parse_options

DESCRIPTION = """Test whether the documents of a packed row depend on each other in a model of transformers.

In packed training, several documents share a row, and no token may influence the output of another document. Whether
transformers keeps them apart depends on the model, on its attention and on the arguments of the call. Each call is made
on small random rows of several documents and tested twice: the gradient of one document's outputs by another one's
embeddings must be exactly 0, and its outputs must not change when the other one's tokens do. For a call that leaks, the
module in which the leak begins is printed.

calls:
  position_ids    position_ids alone; use_cache has its default
  no_cache        position_ids, use_cache=False
  ones_mask       the same with an attention_mask of ones, as tokenizers return it
  cu_seq_lens     the same with cu_seq_lens_*, max_length_* and seq_idx, as padding-free collators return them
  two_rows        two packed rows, position_ids, use_cache=False
  mrope_3         position_ids [3, B, S]   (models with M-RoPE)
  mrope_4         position_ids [4, B, S]   (models with M-RoPE)
  document_ids    document_ids alone       (with --enable)

change and gradient are relative: 1 is as much as inside of a document. The exit code is 0 without a leak, 1 with one,
2 for wrong input. A call that a model refuses does not leak.

examples:
  sightline leaks --hf Qwen/Qwen3-0.6B
  sightline leaks --hf ~/gpt-oss-20b --attention eager
  sightline leaks --hf ~/gpt-oss-20b --enable --calls position_ids document_ids --json leaks.json"""


@dataclass(frozen=True, kw_only=True)
class Leaks:
    hf: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A directory that save_pretrained of transformers wrote, or the name of a model on the Hub."""
    attention: str | None = None
    """Attention implementation: eager, sdpa, sightline, flash_attention_2, ...; None is the choice of transformers."""
    enable: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prepare the model by sightline.hf.enable first, which also sets the attention sightline."""
    calls: tuple[str, ...] = ()
    """Only these calls; none given: all that apply to the model."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write the results as JSON."""

    def __post_init__(self) -> None:
        if self.enable and self.attention not in (None, "sightline"):
            raise ValueError(f"--enable sets the attention sightline, so --attention {self.attention} has no effect")


def main(argv: list[str]) -> None:
    options = parse_options(Leaks, argv, prog="sightline leaks", description=DESCRIPTION)
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--hf needs transformers, which is not installed: pip install 'sightline[hf]'")
    importlib.import_module("sightline.cli.show_leaks").show_leaks(options)
