"""What a layer says about itself, so that several processes can compute it together."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Divisible(nn.Module):
    """A layer that is a sum over its heads or channels, which processes can deal out among themselves.

    Each process takes all tokens and the parts of the weights that it holds; the sum over the processes of what their
    `forward` returns is what the whole layer would return. So nothing in `forward` may count heads or channels but by
    the shapes of the weights.
    """

    SHARDED: ClassVar[dict[str, int]] = {}
    """The weights that are cut, by their own name or their module's, and the dim in which they are. All others are
    whole on every process."""
    SUMMED: ClassVar[tuple[str, ...]] = ()
    """The whole weights that are added to what is returned: each process adds its share of them."""

    def parts(self) -> dict[str, int]:
        """What is dealt out and not cut any further, and how many of it there are: `{"key/value heads": 8}`."""
        raise NotImplementedError
