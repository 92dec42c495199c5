"""`sightline plan`: estimate memory, communication and FLOPs of a run on a mesh, without the GPUs."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from sightline.cli.train import parse
from sightline.config.checks import LARGEST
from sightline.recipes import RECIPES
from sightline.training.flops import GPU_PEAKS

HELP = """usage: sightline plan RECIPE [--processes N] [options of sightline train]

RECIPE is a recipe of `sightline train`, or package.module:RUN for one of your own.

Estimate what a run needs on a mesh: memory and communication of each rank, pipeline bubble, FLOPs. Runs on one CPU
process, without torchrun, for any number of ranks. Rejects what training would reject, with the same message. The
ranks are GPUs, unless --training.device is cpu.

  --processes N    number of ranks of the run (default: the product of the degrees)
  --gpu NAME       GPU whose peak FLOP/s give the shortest step (default: H100), one of:
                   {gpus}
  --rows N         rows of the recipe's data for which context parallelism is planned (default: 4)
  --picture PATH   plot token owners, keys sent between ranks, and work; needs --parallel.context above 1

How to choose a mesh from the tables:
  memory     The total of the largest rank should leave 10 % of the GPU memory free. Otherwise use more
             --parallel.shard, then --training.recompute selective or full, then --parallel.tensor up to the GPUs of
             one machine, then --parallel.pipeline.
  bubble     Should be small. Otherwise use more rows per step, a smaller --training.micro-batch-size, or another
             --parallel.pipeline-schedule.
  received   Should take less time than the step. tensor needs the fastest links, then context and expert, then shard;
             pipeline and replicate work with the slowest.

Parameters, gradients and optimizer state are exact to the byte. Values marked "estimate" come from tracing one layer of
each kind on fake tensors. They do not include an image encoder, a multi-token prediction module, or the keys received
with context parallelism.

examples:
  sightline plan llama3-8b --processes 8
  sightline plan llama3-70b --processes 64 --parallel.tensor 8 --training.recompute full
  sightline plan llama3-405b --processes 4096 --parallel.tensor 8 --parallel.pipeline 16 \\
      --training.global-batch-size 2048 --parallel.pipeline-schedule Interleaved1F1B
  sightline plan qwen3-30b-a3b --processes 64 --parallel.expert 8
  sightline plan llama3-tiny --parallel.context 8 --training.sequence-length 32768 --picture plan.png"""


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP.format(gpus=", ".join(GPU_PEAKS)))
        return
    options, others = _parse_options(argv)
    run = parse(others)
    if options.gpu not in GPU_PEAKS:
        raise ValueError(f"unknown --gpu {options.gpu!r}; known GPUs: {', '.join(GPU_PEAKS)}")
    if options.picture and run.parallel.context == 1:
        raise ValueError("--picture plots context parallelism; set --parallel.context above 1, or remove --picture")
    importlib.import_module("sightline.cli.show_plan").show_plan(others[0], run, **vars(options))


def _parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the arguments into the options of this command and those of `sightline train`."""
    parser = argparse.ArgumentParser(prog="sightline plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    options, others = parser.parse_known_args(argv)
    if not others:
        raise ValueError(f"the recipe is missing: sightline plan RECIPE ...; recipes: {', '.join(RECIPES)}")
    for name in ("processes", "rows"):
        if (number := getattr(options, name)) is not None and not 0 < number <= LARGEST:
            raise ValueError(f"--{name} must be greater than 0 and at most {LARGEST}, got {number}")
    return options, others
