"""Divisors for messages, and numbers as text: counts, FLOPs, bytes, durations."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(n: int) -> list[int]:
    """All divisors of n >= 1, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest(wanted: int, choices: Iterable[int]) -> str:
    """The closest of `choices` below and above `wanted` as text: `4 or 8`, or the one that there is."""
    choices = sorted(choices)
    below, above = [c for c in choices if c < wanted], [c for c in choices if c > wanted]
    return " or ".join(map(str, below[-1:] + above[:1]))


def check_divisible(name: str, number: int, by: str, divisor: int, kind: str) -> None:
    """Check that `divisor` divides `number`; `kind` says what its alternatives are called.

    Raises:
        ValueError: it does not; the message names the divisors.
    """
    if number % divisor:
        raise ValueError(
            f"{name} {number} is not divisible by {by} {divisor}; {kind} that divide it: {divisors(number)}"
        )


def count(number: float) -> str:
    """`640`, `9.4 K`, `7.9 M`, `8.0 B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """`1.23 TFLOP`."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}FLOP"
    return f"{number:,.0f} FLOP"


def size(number: float) -> str:
    """Bytes as text: `1.23 GiB`."""
    power = min(4, max(0, int(number).bit_length() - 1) // 10)
    return f"{number / 1024**power:,.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:12:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
