"""Private collectives of PyTorch: an uneven all-to-all, started and waited for apart. Tried with torch 2.13.0."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(rows: Tensor, sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Starts to send `rows`; the result is not there before `wait`."""
    return torch.ops._c10d_functional.all_to_all_single(rows, received_sizes, sizes, group.group_name)


def wait(rows: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(rows)
