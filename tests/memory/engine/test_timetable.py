"""The timesteps of steps to come, in the form in which a pipeline hands them on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.memory.engine.checks import LateChecks, Stopwatch, differs
from hasten.memory.engine.timetable import FORMS, MOST, Timetable

TIMES = torch.linspace(1000, 250, 4)


class Clock:
    """As much of a clock as a timetable reads."""

    def __init__(self, levels: tuple[float, ...] | None = (1.0, 0.75, 0.5, 0.25)) -> None:
        self.facts: Any = None
        if levels is not None:
            self.facts = SimpleNamespace(levels=[SimpleNamespace(flow_time=level) for level in levels])
        self.at(0)

    def at(self, step: int, steps: int = 4) -> None:
        self.now = SimpleNamespace(step=step, steps=steps)


def table(clock: Clock) -> Timetable:
    return Timetable(clock)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_every_form_is_told_from_one_call(form: int, kind: torch.dtype) -> None:
    clock = Clock()
    clock.at(1)
    given = [FORMS[form](time, kind).expand(2) for time in TIMES]
    found = table(clock).inferred(TIMES, given[1])
    assert [stamp.tolist() for stamp in found] == [stamp.tolist() for stamp in given]
    assert {stamp.dtype for stamp in found} == {kind}


def test_an_unknown_form_says_nothing_about_other_steps() -> None:
    given = TIMES[:1] * 0.37
    assert all(stamp is given for stamp in table(Clock()).inferred(TIMES, given))


def test_only_the_last_timesteps_are_run_when_a_picture_is_continued() -> None:
    clock = Clock()
    clock.at(0, steps=2)
    found = table(clock).inferred(TIMES, TIMES[2:3])
    assert [float(stamp) for stamp in found] == [500, 250]


def test_what_was_given_is_remembered_by_schedule() -> None:
    clock = Clock()
    timetable = table(clock)
    for step in range(4):
        clock.at(step)
        assert timetable.known(torch.zeros(2)) is None
        timetable.note(torch.full((2,), float(step)))
    known = timetable.known(torch.zeros(2))
    assert known is not None
    assert [stamp.tolist() for stamp in known] == [[step, step] for step in range(4)]
    half = timetable.known(torch.zeros(1))
    assert half is not None
    assert half[3].tolist() == [3]
    assert timetable.known(torch.zeros(3)) is None, "more rows than were given"
    assert timetable.known(torch.zeros(2, dtype=torch.float64)) is None
    clock.facts = Clock((1.0, 0.5, 0.2, 0.1)).facts
    assert timetable.known(torch.zeros(2)) is None
    clock.facts = Clock().facts
    timetable.forget()
    assert timetable.known(torch.zeros(2)) is None


def test_the_oldest_schedule_is_forgotten() -> None:
    clock = Clock()
    timetable = table(clock)
    for number in range(MOST + 1):
        clock.facts = Clock((float(number),)).facts
        clock.at(0, steps=1)
        timetable.note(torch.zeros(1))
    assert timetable.known(torch.zeros(1)) is not None
    clock.facts = Clock((0.0,)).facts
    assert timetable.known(torch.zeros(1)) is None


def test_an_unknown_scheduler_is_not_remembered() -> None:
    clock = Clock(None)
    timetable = table(clock)
    timetable.note(torch.zeros(1))
    assert timetable.key is None
    assert timetable.known(torch.zeros(1)) is None


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_for_halves_and_another_step_is(kind: torch.dtype) -> None:
    one = torch.randn(64).to(kind)
    other = (one.float() * (1 + torch.finfo(kind).eps)).to(kind)
    assert differs(one, other, loose=False)
    assert not differs(one, other, loose=True)
    assert differs(one, torch.randn(64).to(kind), loose=True)
    assert not differs(one, one.clone(), loose=False)


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.measuring(torch.device("cpu")):
            sum(range(1000))
    first = watch.seconds()
    assert first > 0
    assert watch.seconds() == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_late_checks() -> None:
    checks, failed = LateChecks(), list[int]()
    one = torch.ones(3, device="cuda")
    checks.expect_equal([(one, one.clone())], lambda: failed.append(1))
    checks.look(wait=True)
    assert not failed
    checks.expect_equal([(one, one), (one, one + 1)], lambda: failed.append(2))
    checks.look(wait=True)
    assert failed == [2]
