"""FlexAttention mask functions: evaluate any `mask_mod` for all pairs, and build the one that reads intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

PAIRS_PER_STEP = 2**21  # bounds the memory of the tensors inside a mask_mod: 16 MiB for an int64 result per pair
MAX_COMPARED_INTERVALS = 16  # 32 reads per pair; a table of bits takes one
WORDS_PER_STEP = 2**20


def evaluate_mask_mod(
    mask_mod: MaskMod, shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Evaluate a `mask_mod(b, h, q_idx, kv_idx)` for all pairs, in blocks of consecutive queries.

    shape: (B, Q, T). Yields dense masks bool [B, Q', T]. The function gets scalar tensors, as in FlexAttention.

    Raises:
        ValueError: if the function uses h, does not return a scalar bool, or cannot be evaluated by `torch.vmap`.
    """
    batch_size, query_length, key_length = shape
    if 0 in shape:  # torch.vmap does not accept sizes of zero
        yield torch.zeros(shape, dtype=torch.bool, device=device)
        return
    rows, keys = torch.arange(batch_size, device=device), torch.arange(key_length, device=device)
    step = max(1, PAIRS_PER_STEP // (batch_size * key_length))
    for first in range(0, query_length, step):
        queries = torch.arange(first, min(first + step, query_length), device=device)
        yield _evaluate_block(mask_mod, rows, queries, keys)


def _evaluate_block(mask_mod: MaskMod, rows: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Evaluate a `mask_mod` for all combinations of rows, queries and keys: bool [B, Q, T]."""
    returned = False

    def scalar_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        nonlocal returned
        visible = _require_bool(mask_mod(b, h, q_idx, kv_idx), b.device)
        returned = True
        return visible

    # Heads come last, with a result that has no dimension of heads: vmap refuses one that was computed from h, and a
    # function that ignores h costs nothing more.
    function: Callable[..., Any] = scalar_mask_mod
    for in_dims, out_dim in (
        ((None, None, None, 0), 0),
        ((None, None, 0, None), 0),
        ((0, None, None, None), 0),
        ((None, 0, None, None), None),
    ):
        function = torch.vmap(function, in_dims=in_dims, out_dims=out_dim)  # type: ignore[arg-type]
    head = torch.zeros(1, dtype=torch.int64, device=rows.device)
    try:
        with torch.no_grad(), _IndexByTensors():
            visible: Tensor = function(rows, head, queries, keys)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"mask_mod cannot be evaluated: {type(error).__name__}: {error}\nIt is called under torch.vmap with scalar "
            "tensors b, h, q_idx, kv_idx, as in FlexAttention: write it with tensor operations, without if, and, or, "
            f"int(), .item() or lists, and keep the tensors that it reads on {str(rows.device)!r} (device=)"
        ) from error
    except ValueError as error:
        if not returned:
            raise
        raise ValueError(
            "mask_mod computes its result from h, but all heads share an AttentionMask; build one mask per head, with "
            "h fixed: lambda b, h, q_idx, kv_idx: mask_mod(b, torch.tensor(0), q_idx, kv_idx)"
        ) from error
    return visible


def _require_bool(visible: Any, device: torch.device) -> Tensor:
    """Return the result of a `mask_mod` as a scalar bool tensor."""
    if isinstance(visible, bool):
        return torch.tensor(visible, device=device)
    if not isinstance(visible, Tensor):
        raise ValueError(f"mask_mod must return a scalar bool tensor for a pair, got {type(visible).__name__}")
    if visible.dtype != torch.bool or visible.dim() > 0:
        raise ValueError(
            f"mask_mod must return a scalar bool tensor for a pair, got {visible.dtype} {tuple(visible.shape)}; "
            "return a comparison such as `value > 0`, reduced by .any() or .all()"
        )
    if visible.device != device:
        raise ValueError(
            f"mask_mod returned a tensor on {str(visible.device)!r}, expected {str(device)!r}; pass device= of the "
            "tensors that it reads"
        )
    return visible


class _IndexByTensors(TorchFunctionMode):
    """Index tensors by scalar tensors without reading their values, which vmap does not allow: `ids[b, q_idx]`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, Tensor) for index in indices) and all(map(_is_plain_index, indices)):
                source = args[0]
                return torch.ops.aten.index(source, [_as_index(index, source.device) for index in indices])
        return func(*args, **(kwargs or {}))


def _is_plain_index(index: Any) -> bool:
    """Return whether an index selects by number or is a full slice."""
    if isinstance(index, Tensor):
        return index.dtype != torch.bool
    if isinstance(index, slice):
        return index == slice(None)
    return isinstance(index, int) and not isinstance(index, bool)


def _as_index(index: Any, device: torch.device) -> Tensor | None:
    """Return an index as `aten::index` takes it: a tensor, or None for a full slice."""
    if isinstance(index, slice):
        return None
    return index if isinstance(index, Tensor) else torch.tensor(index, device=device)


def build_mask_mod(start: Tensor, stop: Tensor, key_length: int) -> MaskMod:
    """Return a `mask_mod` that computes `any_k(start[b, q, k] <= kv < stop[b, q, k])` for canonical int32 [B, Q, K].

    The closure contains tensors only, so a new document layout does not recompile. K is padded to a power of two with
    empty intervals, so masks whose K varies from batch to batch compile a handful of kernels instead of one per K.

    More than 16 intervals would take more reads per pair than a kernel is worth: the function then reads a table of
    one bit per pair, T / 8 bytes per query. (A binary search would need no table, but takes minutes to compile.)
    """
    num_intervals = 1 << (start.shape[2] - 1).bit_length()
    if num_intervals > MAX_COMPARED_INTERVALS:
        return _read_bits(pack_bits(start, stop, key_length))
    start = F.pad(start, (0, num_intervals - start.shape[2]))
    stop = F.pad(stop, (0, num_intervals - stop.shape[2]))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = (kv_idx >= start[b, q_idx, 0]) & (kv_idx < stop[b, q_idx, 0])
        for k in range(1, num_intervals):
            visible = visible | ((kv_idx >= start[b, q_idx, k]) & (kv_idx < stop[b, q_idx, k]))
        return visible

    return mask_mod


def _read_bits(words: Tensor) -> MaskMod:
    """Return a `mask_mod` that reads bit kv of each query: int32 [B, Q, ceil(T / 32)]."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((words[b, q_idx, kv_idx // 32] >> (kv_idx % 32)) & 1) == 1

    return mask_mod


def pack_bits(start: Tensor, stop: Tensor, key_length: int) -> Tensor:
    """Pack the dense mask, key 32 i + j into bit j of word i: int32 [B, Q, ceil(T / 32)] of canonical int32 [B, Q, K].

    The bits from j up are 2^32 - 2^j. An interval adds those from its start in the word of the start, subtracts those
    from its stop in the word of the stop, and adds all bits in the words between: O(Q (K + T / 32)).
    """
    count = -(-key_length // 32)
    step = max(1, WORDS_PER_STEP // max(1, start.shape[0] * max(count, start.shape[2])))
    blocks = []
    for low, high in zip(start.long().split(step, dim=1), stop.long().split(step, dim=1), strict=True):
        words = torch.zeros((*low.shape[:2], count + 1), dtype=torch.int64, device=start.device)
        opened = torch.zeros_like(words)  # intervals that start in a word less those that stop in it
        for bounds, sign in ((low, 1), (high, -1)):
            words.scatter_add_(2, bounds // 32, sign * (2**32 - (1 << (bounds % 32))))
            opened.scatter_add_(2, bounds // 32, torch.full_like(bounds, sign))
        words += (opened.cumsum(dim=2) - opened) * (2**32 - 1)
        blocks.append((words - ((words >> 31) << 32)).to(torch.int32)[..., :count])  # bit 31 is the sign of an int32
    return torch.cat(blocks, dim=1)
