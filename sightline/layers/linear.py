"""Linear layers for generation and evaluation on a CPU: the fastest matrix product for the number of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.torch_private import HAS_ONEDNN_LINEAR, onednn_linear

ONEDNN_SIZE = 2**17
"""Products of the number of tokens and the elements of the weight from which oneDNN's overhead of 8 us is small."""


class Linear(nn.Linear):
    """nn.Linear whose forward is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight' + bias as F.linear does; faster without gradients in float32 on a CPU.

    F.linear calls MKL, which uses AVX-512 on Intel's processors only, and which is slow for 2 to 4 tokens. On an AMD
    EPYC, the product of the weight and the transposed tokens takes half of its time for 2 to 4 tokens; oneDNN takes
    0.75 of its time for one token and a large weight, and half of its time for 64 tokens and more.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_plain_float32(x, weight):
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if 2 <= rows <= 4:
        out = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias)
    if HAS_ONEDNN_LINEAR and rows * weight.numel() >= ONEDNN_SIZE:
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_plain_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether both are plain float32 tensors on a CPU, without autocast; FSDP and tracing use subclasses of Tensor."""
    plain = type(x) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter)
    return plain and x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
