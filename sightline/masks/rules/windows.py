"""Windows: rules by the distance between query and key, along the row, by position, or on a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sightline.masks.mask import AttentionMask
from sightline.masks.rules.arguments import check_count, check_token_tensors, single_interval

__all__ = ["sliding_window", "dilated_window", "neighborhood"]  # noqa: RUF022  # the order in errors and help texts


def sliding_window(
    batch_size: int,
    length: int,
    window: int | None = None,
    *,
    left: int | None = None,
    right: int | None = 0,
    positions: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """Sliding window: each query attends to the keys from `left` before it to `right` after it, itself included.

    `sliding_window(B, S, window)` is causal, `q - window < kv <= q`: it equals `left=window - 1`. With `left` and
    `right` the window is `q - left <= kv <= q + right`; None is no limit on that side. The default is thus causal.

    With `positions` the distance is between positions, in place of indices, over the whole row:
    `positions[q] - left <= positions[kv] <= positions[q] + right`. This is the window on a tree of shared prefixes,
    where positions continue from ancestor to descendant: combine with `& prefix_tree(...) & causal(...)`. K is at most
    the number of runs of positions that do not decrease; without positions K = 1.

    window     keys of a causal window, the query included
    left       keys before the query; None: no limit
    right      keys after the query; None: no limit
    positions  int [B, S]; the mask is on their device
    """
    if window is not None:
        if left is not None or right != 0:
            raise ValueError(
                f"sliding_window: got window={window} with left={left} and right={right}; window is a causal window, "
                "the query included. Give either window, or left and right, which do not count the query"
            )
        check_count("sliding_window", "window", window, 1, "counts keys, the query included,")
        left = window - 1
    for name, side, word in (("left", left, "before"), ("right", right, "after")):
        if side is not None:
            check_count("sliding_window", name, side, 0, f"counts the keys {word} the query (None: no limit)")
    if positions is not None:
        check_token_tensors("sliding_window", positions=positions)
        if positions.shape != (batch_size, length):
            raise ValueError(
                f"sliding_window: positions have shape {tuple(positions.shape)}; expected [batch_size, length] = "
                f"{(batch_size, length)}"
            )
        return _position_window(positions.long(), left, right)
    index = torch.arange(length, dtype=torch.int32, device=device).expand(batch_size, length)
    start = torch.zeros_like(index) if left is None else index - min(left, length)
    stop = torch.full_like(index, length) if right is None else index + min(right, length) + 1
    return single_interval(start, stop, length)


def _position_window(positions: Tensor, left: int | None, right: int | None) -> AttentionMask:
    """Window by position: int64 [B, S]. The intervals depend on the query's position only: one lookup per position."""
    rows, length = positions.shape
    if not positions.numel():
        return AttentionMask.from_intervals(positions[..., None], positions[..., None], length)
    values, query_values = positions.unique(return_inverse=True)
    first, span = values[0], values[-1] - values[0] + 1
    # Within a run the positions do not decrease; adding run * span makes the keys of the row sorted.
    run = torch.zeros_like(positions)
    run[:, 1:] = (positions[:, 1:] < positions[:, :-1]).cumsum(dim=1)
    keys = run * span + (positions - first)
    low = torch.zeros_like(values) if left is None else (values - first - left).clamp(min=0)
    high = torch.full_like(values, span - 1) if right is None else torch.minimum(values - first + right, span - 1)
    offsets = torch.arange(int(run.max()) + 1, device=positions.device) * span
    start, stop = (
        torch.searchsorted(keys, (limit[:, None] + offsets).flatten().repeat(rows, 1), right=is_stop)
        for limit, is_stop in ((low, False), (high, True))
    )
    shape = (rows, len(values), len(offsets))
    return AttentionMask.from_intervals(start.view(shape), stop.view(shape), length).take_queries(query_values)


def dilated_window(
    batch_size: int,
    length: int,
    dilation: int,
    *,
    left: int | None = None,
    right: int | None = 0,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """Dilated window: each query attends to every `dilation`-th key of a window, `(q - kv) % dilation == 0`.

    The window is `q - left <= kv <= q + right`, as in `sliding_window`; None is no limit on that side (Longformer,
    arXiv:2004.05150; the strided pattern of Sparse Transformers, arXiv:1904.10509, is
    `dilated_window(B, S, stride) | sliding_window(B, S, stride)`). A dilation of at least 2 needs an interval for each
    key: K = 1 + left // dilation + right // dilation.
    """
    check_count("dilated_window", "dilation", dilation, 1, "is a distance in keys")
    for name, side, word in (("left", left, "before"), ("right", right, "after")):
        if side is not None:
            check_count("dilated_window", name, side, 0, f"is a distance in keys {word} the query (None: no limit)")
    if dilation == 1:
        return sliding_window(batch_size, length, left=left, right=right, device=device)
    before, after = ((length if side is None else min(side, length)) // dilation for side in (left, right))
    index = torch.arange(length, dtype=torch.int32, device=device)
    keys = index[:, None] + torch.arange(-before, after + 1, dtype=torch.int32, device=device) * dilation
    mask = AttentionMask.from_intervals(keys[None], keys[None] + 1, length)  # drops keys before and after the row
    return mask[[0] * batch_size]


def neighborhood(
    batch_size: int,
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """Neighborhood attention: each query attends to the `kernel_size` nearest keys in each dimension of a grid.

    A row is a grid of tokens in row-major order, such as the patches of an image: (height, width), or (frames, height,
    width). At the borders the window moves inside the grid, so that all queries attend to the same number of keys. The
    definition, and the names of the parameters, are those of NATTEN (arXiv:2204.07143, 2209.15001, 2504.16922).

    K is the product of `kernel_size` without the last dimension, and with it if the last dimension is dilated: the
    kernel's height for an image. Each of the parameters is one value, or one for each dimension.

    shape        tokens in each dimension; their product is the length of the row
    kernel_size  keys in each dimension; an even size has one more key before the center than after it
    stride       queries in each dimension that share a window, that of their center; 1: each query has its own
    dilation     distance between the keys in each dimension
    is_causal    the window ends at the query in this dimension, and is smaller at the start
    """
    if not isinstance(shape, Sequence):
        raise ValueError(f"neighborhood: shape must be a tuple of one size for each dimension; got {shape}")
    sizes = tuple(shape)
    for size in sizes or (0,):
        check_count("neighborhood", "each dimension of shape", size, 1, "is a number of tokens")
    parameters = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    given = [_per_dimension(name, value, len(sizes)) for name, value in parameters.items()]
    windows = [_axis_window(*values) for values in zip(sizes, *given, strict=True)]
    width = torch.ones(sizes[-1], 1, dtype=torch.int32)
    if given[2][-1] == 1:  # without dilation, the keys in the last dimension are one interval
        width = windows[-1][:, -1:] - windows[-1][:, :1] + 1
        windows[-1] = windows[-1][:, :1]
    start = torch.zeros(1, 1, dtype=torch.int32)  # [queries, intervals] of the dimensions so far
    for size, keys in zip(sizes, windows, strict=True):
        start = (start[:, None, :, None] * size + keys[None, :, None, :]).flatten(2).flatten(0, 1)
    stop = start + width.repeat(len(start) // len(width), 1)
    return AttentionMask.from_intervals(start[None], stop[None], len(start))[[0] * batch_size].to(device)


def _per_dimension(name: str, value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Return one value for each dimension; a single value is repeated."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dimensions
    if len(values) != dimensions:
        raise ValueError(
            f"neighborhood: {name} has {len(values)} values, {values}, but the grid has {dimensions} dimensions; give "
            "one value, or one for each dimension"
        )
    for number in values:
        check_count("neighborhood", name, number, 0 if name == "is_causal" else 1, "is one value per dimension")
    return values


def _axis_window(size: int, kernel_size: int, stride: int, dilation: int, is_causal: int) -> Tensor:
    """Return the coordinates, in one dimension, of the keys of each coordinate: int32 [size, kernel_size], ascending.

    A causal window that begins before the grid repeats its first key.
    """
    if kernel_size * dilation > size:
        raise ValueError(
            f"neighborhood: kernel_size {kernel_size} with dilation {dilation} needs {kernel_size * dilation} tokens, "
            f"but a dimension of the grid has {size}; use a smaller kernel_size or dilation"
        )
    if stride > kernel_size:
        raise ValueError(f"neighborhood: stride must be at most kernel_size {kernel_size}; got {stride}")
    coordinate = torch.arange(size, dtype=torch.int32)
    # Tokens with the same remainder form a grid of their own, in which the window is contiguous.
    query, remainder = coordinate // dilation, coordinate % dilation
    last = (size - 1 - remainder) // dilation
    group = query // stride * stride
    if is_causal:
        first = torch.minimum(group + stride - 1, last) - (kernel_size - 1)
        keys = first[:, None] + torch.arange(kernel_size, dtype=torch.int32)
        keys = torch.minimum(keys, query[:, None]).clamp(min=0)
    else:
        center = torch.minimum(group + stride // 2, last)
        first = torch.minimum((center - kernel_size // 2).clamp(min=0), last - (kernel_size - 1))
        keys = first[:, None] + torch.arange(kernel_size, dtype=torch.int32)
    return keys * dilation + remainder[:, None]
