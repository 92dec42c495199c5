"""Keyed permutations that compute each element alone: the shuffled order of N items without an array of N."""

from __future__ import annotations

import numpy as np

ROUNDS = 8
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of the mixing function of SplitMix64


class Permutation:
    """Random permutation of 0 .. size - 1 that depends only on the key: integers of at least 0.

    A Feistel network permutes the numbers of 2 x `bits` bits, of which there are less than 4 x size. A result that is
    not below `size` is permuted again until it is ("cycle walking"; Black and Rogaway, 2002).
    """

    def __init__(self, size: int, *key: int) -> None:
        assert size > 0
        self.size = np.uint64(size)
        bits = max(1, -(-(size - 1).bit_length() // 2))
        self.bits, self.mask = np.uint64(bits), np.uint64(2**bits - 1)
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Return the elements at `index`, int64 of the same shape."""
        result = self._permute(index.astype(np.uint64))
        while (outside := result >= self.size).any():
            result[outside] = self._permute(result[outside])
        return result.astype(np.int64)

    def _permute(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> self.bits, value & self.mask
        for key in self.keys:
            mixed = right + key  # uint64 arithmetic wraps around
            for multiplier in MULTIPLIERS:
                mixed = (mixed ^ (mixed >> np.uint64(31))) * multiplier
            left, right = right, left ^ (mixed >> np.uint64(32)) & self.mask
        return left << self.bits | right
