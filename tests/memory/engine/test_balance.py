"""Pieces spread over devices by size."""

from __future__ import annotations

import pytest

from hasten.memory.engine.balance import TooLarge, spread

EVEN = [10] * 10


def test_balanced_gives_equal_shares_to_neighbours() -> None:
    assert spread(EVEN, {"a": 100, "b": 100}, "balanced") == ["a"] * 5 + ["b"] * 5


def test_what_a_small_device_cannot_take_goes_to_the_others() -> None:
    assert spread(EVEN, {"a": 20, "b": 100, "c": 100}, "balanced") == ["a"] * 2 + ["b"] * 4 + ["c"] * 4


def test_low_0_leaves_the_first_device_as_empty_as_it_can() -> None:
    assert spread(EVEN, {"a": 100, "b": 100, "c": 100}, "balanced_low_0") == ["b"] * 5 + ["c"] * 5
    assert spread(EVEN, {"a": 100, "b": 40, "c": 40}, "balanced_low_0") == ["a"] * 2 + ["b"] * 4 + ["c"] * 4
    assert spread(EVEN, {"a": 100}, "balanced_low_0") == ["a"] * 10


def test_sequential_fills_one_after_the_other() -> None:
    assert spread(EVEN, {"a": 75, "b": 100}, "sequential") == ["a"] * 7 + ["b"] * 3


def test_a_large_piece_goes_where_it_fits() -> None:
    assert spread([10, 80, 10], {"a": 50, "b": 100}, "balanced") == ["a", "b", "b"]


@pytest.mark.parametrize("how", ["balanced", "balanced_low_0", "sequential"])
def test_no_device_takes_more_than_it_has(how: str) -> None:
    sizes = [7, 31, 3, 3, 19, 40, 2, 2, 25]
    memory = {"a": 60, "b": 70, "c": 50}
    chosen = spread(sizes, memory, how)  # pyright: ignore[reportArgumentType]
    for place, room in memory.items():
        assert sum(size for size, where in zip(sizes, chosen, strict=True) if where == place) <= room


def test_what_does_not_fit_is_said_with_figures() -> None:
    with pytest.raises(TooLarge, match=r"take 100 bytes, and there is room for a 30 bytes, b 30 bytes"):
        spread(EVEN, {"a": 30, "b": 30}, "sequential")
