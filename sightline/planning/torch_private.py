"""All private PyTorch APIs that this package uses, tested with torch 2.13.0: look here first when PyTorch changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.distributed_c10d import _resolve_process_group as process_group_of
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["FakeTensorMode", "TorchDispatchMode", "process_group_of", "tree_leaves", "unset_fake_temporarily"]


@contextmanager
def fake_process_group(world: int, rank: int) -> Iterator[None]:
    """Make this process rank `rank` of a fake group of `world` ranks, whose collectives do nothing."""
    assert not dist.is_initialized(), "a fake process group needs a process whose torch.distributed is not initialized"
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()
