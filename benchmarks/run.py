"""Run every benchmark that this machine supports: `make bench`. Takes less than an hour on two cores."""

from __future__ import annotations

import runpy
import sys

import torch

CPU = [
    ("benchmarks.masks", []),
    ("benchmarks.attention", ["--dense"]),
    ("benchmarks.attention", ["--kv-heads", "2", "--lengths", "8192"]),
    ("benchmarks.memory", []),
    ("benchmarks.training_step", ["--threads", "1"]),
    ("benchmarks.training_step", ["--threads", "2"]),
    ("benchmarks.families", ["--rounds", "3"]),
    ("benchmarks.moe", []),
    ("benchmarks.decode", []),
    ("benchmarks.hf_loss", []),
    ("benchmarks.huggingface", ["--lengths", "2048"]),
    ("benchmarks.hf_shared_prompt", ["--rounds", "2"]),
    ("benchmarks.mesh", []),
    ("benchmarks.scale", []),
    ("benchmarks.context_plan", []),
    ("benchmarks.context_step", ["--rounds", "3"]),
]


def main() -> None:
    for module, arguments in [("benchmarks.gpu", [])] if torch.cuda.is_available() else CPU:
        print(f"\npython -m {module} {' '.join(arguments)}", flush=True)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
