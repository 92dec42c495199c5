"""Divisors, and numbers formatted as text."""

import re

import pytest

from sightline.numbers import check_divisible, count, divisors, duration, flops, nearest, size


def test_divisors() -> None:
    assert [divisors(n) for n in (1, 7, 12)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12]]


@pytest.mark.parametrize(("wanted", "text"), [(5, "4 or 6"), (4, "3 or 6"), (20, "12"), (0, "1")])
def test_nearest(wanted: int, text: str) -> None:
    assert nearest(wanted, divisors(12)) == text
    assert nearest(wanted, reversed(divisors(12))) == text


def test_nearest_without_choices() -> None:
    assert nearest(3, []) == nearest(3, [3]) == ""


def test_check_divisible_lists_divisors() -> None:
    check_divisible("model.num-heads", 6, "model.num-kv-heads", 3, "key/value heads")
    message = "model.num-heads 6 is not divisible by model.num-kv-heads 4; key/value heads that divide it: [1, 2, 3, 6]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_divisible("model.num-heads", 6, "model.num-kv-heads", 4, "key/value heads")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (725, "12:05"), (11525, "3:12:05")])
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(640, "640"), (9_400, "9.4 K"), (7_940_000, "7.9 M"), (8.03e9, "8.0 B")])
def test_count(number, text) -> None:
    assert count(number) == text


def test_flops() -> None:
    assert [flops(number) for number in (640, 9.4e6, 1.234e9, 2e13, 5.5e17, 3e18)] == [
        "640 FLOP", "9.4 MFLOP", "1.23 GFLOP", "20 TFLOP", "550 PFLOP", "3 EFLOP",
    ]  # fmt: skip


def test_size() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024, 3 * 2**40)] == [
        "0 B", "1,023 B", "1 KiB", "1.5 MiB", "3 TiB",
    ]  # fmt: skip
