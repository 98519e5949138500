"""One function around `step` of every scheduler that a clock watches, now and later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hasten.core.intercept import Interceptor, intercept

LEADING = ("model_output", "timestep", "sample")
"""The first parameters of a scheduler's `step`."""


class StepLink:
    """Puts `link(call, model_output, timestep, sample, *args, **kwargs)` around `step` of several schedulers.

    It runs for the scheduler that is the current one (`current(scheduler)`); a pipeline may have been given another.
    """

    def __init__(self, link: Interceptor, current: Callable[[object], bool]) -> None:
        self._link, self._current = link, current
        self._undo: list[Callable[[], None]] = []

    def put(self, scheduler: object) -> None:
        """Put the function around the steps of this scheduler."""
        self._undo.append(intercept(scheduler, "step", self._around(scheduler)))

    def take_off(self) -> None:
        """Take the function off all schedulers; what fails stays and can be tried again."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _around(self, scheduler: object) -> Interceptor:
        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            named = LEADING[len(args) :]
            if not self._current(scheduler) or any(name not in kwargs for name in named):
                return call(*args, **kwargs)
            leading = (*args, *(kwargs.pop(name) for name in named))
            return self._link(call, *leading, **kwargs)

        return run
