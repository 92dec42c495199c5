"""Checks that all ranks of a run have the same versions, options and data, which no later step would notice."""

from __future__ import annotations

import platform
from typing import Any

import torch

from sightline import __version__
from sightline.parallel.host import HostGroup

REMEDIES = {
    "version of": "install the same versions on every machine",
    "data": "copy the same files to every machine, or read them from a shared file system",
    "tokenizer": "give the same tokenizer on every machine, and install the same version of the package tokenizers",
}
"""Remedy of a difference, by the first characters of its name; all other names are options."""


def check_same(host: HostGroup, facts: dict[str, Any]) -> None:
    """Compare the facts of all ranks, {name: value}, with those of rank 0. Each rank compares its own.

    Raises:
        ValueError: on every rank, if one of them differs; the message names the rank and both values.
    """
    expected = host.broadcast(facts)
    names = sorted(name for name in expected.keys() | facts.keys() if expected.get(name) != facts.get(name))
    found = host.gather([(name, facts.get(name)) for name in names])

    def report() -> None:
        ranks = [rank for rank, differences in enumerate(found) if differences]
        if ranks:
            rank, differences = ranks[0], found[ranks[0]]
            values = "; ".join(
                f"{name} is {value!r} on rank {rank}, but {expected.get(name)!r} on rank 0"
                for name, value in differences[:3]
            )
            more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
            others = f" (also different: {len(ranks) - 1} other ranks)" if len(ranks) > 1 else ""
            raise ValueError(f"{values}{more}{others}; all ranks must be the same: {_remedy(differences[0][0])}")

    host.from_rank_zero(report)


def versions() -> dict[str, str]:
    """Return the versions that affect results, by name."""
    found = {"sightline": __version__, "PyTorch": torch.__version__, "Python": platform.python_version()}
    return {f"version of {name}": version for name, version in found.items()}


def _remedy(name: str) -> str:
    command = "start every rank with the same command"
    return next((remedy for prefix, remedy in REMEDIES.items() if name.startswith(prefix)), command)
