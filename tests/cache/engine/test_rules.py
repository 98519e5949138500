"""Forecast rules: their notation and their coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.cache.engine.rules import (
    QUANTITIES,
    VARIABLES,
    Rule,
    correction_weights,
    parse_rule,
    position,
    taylor_weights,
    weights,
)
from hasten.core.errors import HastenError, InvalidSetting, UnknownName

RULES = st.builds(
    Rule,
    st.sampled_from(QUANTITIES),
    st.sampled_from(VARIABLES),
    st.integers(min_value=0, max_value=3),
    st.booleans(),
    st.sampled_from([1.0, 0.5, 0.25, 0.0]),
)
STEPS = st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=6).map(
    lambda gaps: [float(sum(gaps[: k + 1])) for k in range(len(gaps))]
)
ORDERS = st.integers(min_value=0, max_value=3)


@given(RULES)
def test_a_rule_is_read_as_it_is_written(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule


def test_the_notation() -> None:
    assert parse_rule("velocity/index/1c") == Rule("velocity", "index", 1, correct=True)
    assert str(Rule("clean", "angle", 2)) == "clean/angle/2"
    assert str(Rule("velocity", "index", 1, correct=True, trust=0.5)) == "velocity/index/1c@0.5"


@given(STEPS, ORDERS, st.floats(min_value=0, max_value=1))
def test_trust_lies_between_holding_and_the_whole_extrapolation(
    positions: list[float], order: int, trust: float
) -> None:
    at = positions[-1] + 2
    full, held = weights(positions, at, order), weights(positions, at, 0)
    found = Rule(order=order, trust=trust).weights(positions, at)
    expected = [trust * one for one in full]
    expected[-1] += (1 - trust) * held[-1]
    assert found == pytest.approx(expected)
    assert sum(found) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("velocity/index", "quantity/variable/order"),
        ("velocty/index/1", "velocity"),
        ("clean/sigma/1", "flow_time"),
        ("clean/index/4", "from 0 (hold) to 3, not 4"),
        ("clean/index/c", "digit"),
        ("clean/index/1cc", "digit"),
        ("clean/index/-1", "digit"),
        ("clean/index/1@", "digit"),
        ("clean/index/1@1.2.3", "digit"),
        ("clean/index/1@2", "from 0 to 1"),
        ("", "quantity/variable/order"),
    ],
)
def test_wrong_notation_is_explained(text: str, said: str) -> None:
    with pytest.raises(HastenError) as caught:
        parse_rule(text)
    assert isinstance(caught.value, InvalidSetting | UnknownName)
    assert said in str(caught.value)


@given(STEPS, ORDERS, st.floats(min_value=0, max_value=12))
def test_a_polynomial_of_the_order_is_forecast_exactly(steps: list[float], order: int, ahead: float) -> None:
    degree = min(order, len(steps) - 1)
    at = steps[-1] + ahead
    found = weights(steps, at, order)
    assert len(found) == degree + 1
    for power in range(degree + 1):
        forecast = sum(c * node**power for c, node in zip(found, steps[-degree - 1 :], strict=True))
        assert forecast == pytest.approx(at**power, rel=1e-6, abs=1e-6)


def test_a_short_history_lowers_the_order() -> None:
    assert weights([4.0], 6.0, 2) == (1.0,)
    assert weights([2.0, 4.0], 6.0, 2) == (-1.0, 2.0)
    assert weights([0.0, 2.0, 4.0], 6.0, 1) == (-1.0, 2.0)


@pytest.mark.parametrize("positions", [[], [1.0, 1.0], [1.0, math.nan]])
def test_positions_that_define_no_forecast_are_refused(positions: list[float]) -> None:
    with pytest.raises(InvalidSetting):
        weights(positions, 3.0, 1)


@pytest.mark.parametrize("order", [-1, 4, True, 1.0])
def test_absurd_orders_are_refused(order: int) -> None:
    with pytest.raises(InvalidSetting, match="from 0"):
        weights([1.0], 2.0, order)


def test_a_correction_meets_the_outputs_at_both_ends() -> None:
    assert correction_weights([0.0, 2.0], 6.0, 2.0, 1) == (1.0, 0.0)
    assert correction_weights([0.0, 2.0], 6.0, 6.0, 1) == (0.0, 1.0)
    assert correction_weights([0.0, 2.0], 6.0, 3.0, 0) == (0.75, 0.25)
    assert sum(correction_weights([0.0, 2.0], 6.0, 3.0, 2)) == pytest.approx(1)
    assert len(correction_weights([0.0, 2.0], 6.0, 3.0, 2)) == 3


class LiteralTaylor:
    """The published procedure on numbers, with factors that are renewed at each full step."""

    def __init__(self, order: int) -> None:
        self.order, self.factors, self.newest = order, list[float](), 0.0

    def full(self, step: float, output: float) -> None:
        window, old, self.factors = step - self.newest, self.factors, [output]
        for degree in range(min(self.order, len(old))):
            self.factors.append((self.factors[degree] - old[degree]) / window)
        self.newest = step

    def forecast(self, step: float) -> float:
        ahead = step - self.newest
        return sum(factor * ahead**j / math.factorial(j) for j, factor in enumerate(self.factors))


@given(STEPS, ORDERS, st.integers(min_value=0, max_value=9), st.integers(min_value=0, max_value=10**6))
def test_taylor_weights_are_the_published_procedure(steps: list[float], order: int, ahead: int, seed: int) -> None:
    outputs = np.random.default_rng(seed).standard_normal(len(steps)).tolist()
    literal = LiteralTaylor(order)
    for step, output in zip(steps, outputs, strict=True):
        literal.full(step, output)
    found = taylor_weights(steps, steps[-1] + ahead, order)
    forecast = sum(c * y for c, y in zip(found, outputs[-len(found) :], strict=True))
    assert forecast == pytest.approx(literal.forecast(steps[-1] + ahead), rel=1e-9, abs=1e-9)


def test_taylor_is_the_line_at_order_one_and_no_parabola_at_order_two() -> None:
    assert taylor_weights([0, 3, 5], 7, 1) == pytest.approx(weights([0, 3, 5], 7, 1))
    assert taylor_weights([0, 2, 4], 6, 2) == pytest.approx((0.5, -2.0, 2.5))
    assert weights([0, 2, 4], 6, 2) == pytest.approx((1, -3, 3))


def test_positions_along_each_variable() -> None:
    assert position("index", 7, 0.5, 0.5) == 7
    assert position("flow_time", 7, 0.25, 0.75) == 0.75
    assert position("angle", 7, 0.0, 1.0) == pytest.approx(math.pi / 2)
