"""Divisors for error messages, and numbers as text: counts, FLOPs, bytes, durations."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(n: int) -> list[int]:
    """Return all divisors of n >= 1 in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest(wanted: int, choices: Iterable[int]) -> str:
    """Return the nearest choices below and above `wanted` as text: `4 or 8`, or only one if there is no other."""
    choices = sorted(choices)
    below, above = [c for c in choices if c < wanted], [c for c in choices if c > wanted]
    return " or ".join(map(str, below[-1:] + above[:1]))


def check_divisible(name: str, number: int, by: str, divisor: int, kind: str) -> None:
    """Check that `divisor` divides `number`.

    Raises:
        ValueError: if it does not; the message lists the divisors, with `kind` as their name.
    """
    if number % divisor:
        raise ValueError(
            f"{name} {number} is not divisible by {by} {divisor}; {kind} that divide it: {divisors(number)}"
        )


def count(number: float) -> str:
    """Return a count as text: `640`, `9.4 K`, `7.9 M`, `8.0 B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """Return a number of FLOPs as text: `1.23 TFLOP`."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}FLOP"
    return f"{number:,.0f} FLOP"


def size(number: float) -> str:
    """Return a number of bytes as text: `1.23 GiB`."""
    power = min(4, max(0, int(number).bit_length() - 1) // 10)
    return f"{number / 1024**power:,.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    """Return a duration as text: `0:42`, `12:05`, `3:12:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
