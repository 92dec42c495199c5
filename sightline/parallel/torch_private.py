"""All private PyTorch APIs that this package uses, tested with torch 2.13.0: check here first after an upgrade."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.attention.varlen  # registers torch.ops.torch_attn
from torch import Tensor
from torch.distributed import _functional_collectives, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import SAC_IGNORED_OPS

from sightline.attention.native import ATTENTION

GROUPED_MM = torch.ops.aten._grouped_mm.default
ATTENTION_OPS = (
    # the native and the tiled backend on a CPU, the CUDA kernels of scaled_dot_product_attention, FlexAttention, varlen
    ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.torch_attn._varlen_attn.default,
)
RECEIVING_OPS = (
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
)
all_to_all_single_autograd = _functional_collectives.all_to_all_single_autograd
wait = torch.ops._c10d_functional.wait_tensor
flatten = DeviceMesh._flatten
"""Returns a mesh of several axes as a mesh with one axis."""
default_store = distributed_c10d._get_default_store
"""Returns the store that `init_process_group` was given or created."""
set_timeout = distributed_c10d._set_pg_timeout
"""Sets the timeout of a process group; DeviceMesh gives its groups one of 10 or 30 minutes."""
foreach_norm = torch._foreach_norm
foreach_multiply_ = torch._foreach_mul_


def all_to_all(rows: Tensor, sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Start an asynchronous all-to-all of `rows`; call `wait` on the result before reading it."""
    return torch.ops._c10d_functional.all_to_all_single(rows, received_sizes, sizes, group.group_name)


def ignore_profiler_ops_of_recompute() -> None:
    """Let selective checkpointing run the profiler's marks of FSDP without looking for a saved result.

    FSDP marks the all-gather of weights that are not gathered yet. Within a layer, experts have their own: the
    recomputation gathers others than the forward did, and checkpointing requires equal numbers of all other operations.
    """
    SAC_IGNORED_OPS.update(
        (
            torch.ops.profiler._record_function_enter_new.default,
            torch.ops.profiler._record_function_exit._RecordFunction,
        )
    )


def skip_side_effects_of_recompute() -> None:
    """Keep compiled layers from changing module attributes when the backward recomputes their forward."""
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
