"""Call the native kernel with tensors.

The mask travels as one tensor, int32 [n]: the sizes B, Q, T, K, the numbers of blocks and chunks, then start and stop
[B, Q, K], blocks [., 4] and chunks [., 2] of `sightline_attention_plan`. A compiled graph then has one input whose size
depends on the mask, and no size that is 1 for some masks only.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from sightline.native.library import ARGUMENTS, check, get_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers of the dtypes in csrc/attention.h."""
HEADER = struct.Struct("6i")
"""Sizes before the intervals in a packed mask."""
MIN_BLOCK = 32
"""Queries of a block, except the last block of a row, at least."""
NO_TENSOR = (0, 0, 0, 0)


def pack_intervals(start: Tensor, stop: Tensor, keys: int) -> Tensor:
    """Return a mask and its plan as one tensor, int32 [n], from canonical intervals int32 [B, Q, K] on the CPU.

    keys  T

    Raises:
        ValueError: if the intervals are not canonical or leave [0, T).
        Missing: if the library is not built.
    """
    library = get_library()
    start, stop = (x.to(torch.int32).contiguous() for x in (start, stop))
    rows, queries, intervals = start.shape
    num_blocks, num_chunks = ctypes.c_int64(rows * -(-queries // MIN_BLOCK)), ctypes.c_int64(0)
    num_chunks.value = 4 * num_blocks.value
    while True:
        blocks = torch.empty(num_blocks.value, 4, dtype=torch.int32)
        chunks = torch.empty(num_chunks.value, 2, dtype=torch.int32)
        check(
            library.sightline_attention_plan(
                start.data_ptr(), stop.data_ptr(), rows, queries, keys, intervals,
                blocks.data_ptr(), len(blocks), chunks.data_ptr(), len(chunks),
                ctypes.byref(num_blocks), ctypes.byref(num_chunks),
            )
        )  # fmt: skip
        if num_blocks.value <= len(blocks) and num_chunks.value <= len(chunks):
            break
    header = torch.tensor([rows, queries, keys, intervals, num_blocks.value, num_chunks.value], dtype=torch.int32)
    used = blocks[: num_blocks.value], chunks[: num_chunks.value]
    return torch.cat([header, *(x.flatten() for x in (start, stop, *used))])


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Compute attention: output [B, H, Q, Dv], contiguous as [B, Q, H, Dv], and log-sum-exp float32 [B, H, Q].

    q, k, v  [B, H, Q, D], [B, G, T, D], [B, G, T, Dv]: float32 or bfloat16, of any strides
    sinks    float32 [H]
    mask     from `pack_intervals`
    softcap  0 for none

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    out, lse = empty_outputs(q, v)
    sinks = None if sinks is None else sinks.contiguous()
    arguments = ARGUMENTS.pack(
        *_head(q, k, v, sinks, mask, scale, softcap, out, lse), *(NO_TENSOR * 4), 0,
    )  # fmt: skip
    check(get_library().sightline_attention_forward(arguments))
    return out, lse


def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor, out: Tensor, lse: Tensor,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v and sinks (float32 [H], or [0] without sinks) from that of the output."""
    d_out, q, k, v, out = (_rows_contiguous(x) for x in (d_out, q, k, v, out))
    lse = lse.contiguous()
    d_q, d_k, d_v, d_sinks = empty_gradients(q, k, v, sinks)
    sinks = None if sinks is None else sinks.contiguous()
    for name, x in {"output": out, "gradient of the output": d_out}.items():
        if x.dtype != q.dtype or x.shape != (*q.shape[:3], v.shape[3]):
            found, expected = f"{x.dtype} {tuple(x.shape)}", f"{q.dtype} {(*q.shape[:3], v.shape[3])}"
            raise ValueError(f"native attention: the {name} is {found}, expected {expected}")
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3]:
        found = f"{lse.dtype} {tuple(lse.shape)}"
        raise ValueError(f"native attention: the log-sum-exp is {found}, expected float32 {tuple(q.shape[:3])}")
    arguments = ARGUMENTS.pack(
        *_head(q, k, v, sinks, mask, scale, softcap, out, lse),
        *_pointer(d_out), *_pointer(d_q), *_pointer(d_k), *_pointer(d_v), d_sinks.data_ptr() if len(d_sinks) else 0,
    )  # fmt: skip
    check(get_library().sightline_attention_backward(arguments))
    return d_q, d_k, d_v, d_sinks


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the output [B, H, Q, Dv], contiguous as [B, Q, H, Dv], and the log-sum-exp float32 [B, H, Q]."""
    rows, heads, queries, _ = q.shape
    shape = (rows, heads, queries)
    lse = q.new_empty_strided(shape, (heads * queries, queries, 1), dtype=torch.float32)
    return _empty_heads(q, (*shape, v.shape[3])), lse


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate gradients: of q, k, v contiguous as [B, S, heads, D], of the sinks float32 [H], or [0] without sinks."""
    d_q, d_k, d_v = (_empty_heads(x, x.shape) for x in (q, k, v))
    return d_q, d_k, d_v, q.new_empty(0 if sinks is None else q.shape[1], dtype=torch.float32)


def _empty_heads(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate a tensor [B, heads, S, D] that is contiguous as [B, S, heads, D]."""
    _, heads, tokens, dim = shape
    return x.new_empty_strided(shape, (heads * tokens * dim, dim, heads * dim, 1))


def _head(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor, scale: float, softcap: float, out: Tensor,
    lse: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the fields of `sightline_attention` that forward and backward share."""
    rows, queries, keys, intervals, num_blocks, num_chunks = _read_header(mask)
    heads, kv_heads, dim, value_dim = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    shapes = (rows, heads, queries, dim), (rows, kv_heads, keys, dim), (rows, kv_heads, keys, value_dim)
    if (q.shape, k.shape, v.shape) != shapes:
        found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"native attention: a mask of (B, Q, T) = {(rows, queries, keys)} does not fit {found}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(
            f"native attention: expected q, k, v of dtype float32 or bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32):
        raise ValueError(f"native attention: expected sinks float32 [{heads}], got {sinks.dtype} {tuple(sinks.shape)}")
    start = mask.data_ptr() + HEADER.size
    stop = start + 4 * rows * queries * intervals
    blocks = stop + stop - start
    return (
        rows, queries, keys, heads, kv_heads, dim, value_dim, intervals, DTYPES[q.dtype], scale, softcap,
        start, stop, blocks, num_blocks, blocks + 16 * num_blocks, num_chunks,
        0 if sinks is None else sinks.data_ptr(),
        *_pointer(q), *_pointer(k), *_pointer(v), *_pointer(out), lse.data_ptr(),
    )  # fmt: skip


def _read_header(mask: Tensor) -> tuple[int, ...]:
    """Return B, Q, T, K and the numbers of blocks and chunks of a packed mask.

    Raises:
        ValueError: if the tensor is not a packed mask.
    """
    if mask.dtype == torch.int32 and mask.dim() == 1 and mask.is_contiguous() and 4 * mask.numel() >= HEADER.size:
        header = HEADER.unpack(ctypes.string_at(mask.data_ptr(), HEADER.size))
        rows, queries, _, intervals, num_blocks, num_chunks = header
        needed = HEADER.size // 4 + 2 * rows * queries * intervals + 4 * num_blocks + 2 * num_chunks
        if min(header) >= 0 and needed == mask.numel():
            return header
    raise ValueError(f"native attention: expected a mask from pack_intervals, got {mask.dtype} {tuple(mask.shape)}")


def _pointer(x: Tensor) -> tuple[int, int, int, int]:
    """Return a tensor's address and the strides of its first three dimensions."""
    row, head, token, _ = x.stride()
    return x.data_ptr(), row, head, token


def _rows_contiguous(x: Tensor) -> Tensor:
    """Return `x`, copied if its last dimension is not contiguous: the kernel reads all other strides."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
