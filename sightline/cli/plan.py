"""`sightline plan`: what a run will need on a mesh, before any machine is asked for."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from sightline.cli.train import parse
from sightline.recipes import RECIPES
from sightline.training.flops import GPU_PEAKS

HELP = """usage: sightline plan RECIPE [--processes N] [options of sightline train]

RECIPE is one of `sightline train`, or package.module:RUN, one of your own.

Say what a run needs on a mesh: memory and communication of each process, waiting, arithmetic. Needs no GPU and no
torchrun, for any number of processes. What training would refuse, this refuses with the same words.

  --processes N    processes of the job; without it, the product of the degrees
  --gpu NAME       GPU whose peak speed the shortest step is told for: {gpus} (default: H100)
  --rows N         rows of the recipe's data that context parallelism is planned for (default: 4)
  --picture PATH   draw who owns which tokens and who sends keys to whom; with --parallel.context

How to read it, from above: does the memory of the largest process fit the GPU, with a tenth to spare? If not: more
--parallel.shard, then --training.recompute selective or full, then --parallel.tensor up to the GPUs of one machine,
then --parallel.pipeline. Is the bubble small? If not: more rows a step or a smaller --training.micro-batch-size, or
another --parallel.pipeline-schedule. Does the busiest link fit the step? tensor wants the fastest, then context and
expert, then shard; pipeline and replicate do with the slowest.

Weights, gradients and moments are exact to the byte. What is "about" is found by running one layer of each kind without
memory. It leaves out an image encoder and the extra layer that predicts a token further, and keys that context
parallelism has received.

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
    options, others = _own_options(argv)
    run = parse(others)
    if options.gpu not in GPU_PEAKS:
        raise ValueError(f"unknown --gpu {options.gpu!r}; the GPUs whose speed is known: {', '.join(GPU_PEAKS)}")
    if options.picture and run.parallel.context == 1:
        raise ValueError("--picture draws context parallelism; give --parallel.context too, or leave --picture away")
    importlib.import_module("sightline.cli.show_plan").show_plan(others[0], run, **vars(options))


def _own_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, and those of `sightline train`."""
    parser = argparse.ArgumentParser(prog="sightline plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    options, others = parser.parse_known_args(argv)
    if not others:
        raise ValueError(f"the recipe is missing: sightline plan RECIPE ...; recipes: {', '.join(RECIPES)}")
    for name in ("processes", "rows"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} must be greater than 0, got {getattr(options, name)}")
    return options, others
