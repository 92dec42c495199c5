"""Every private API of PyTorch that this package uses, tried on torch 2.13.0: look here first when PyTorch changes."""

from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard"]
