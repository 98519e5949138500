"""What every cache has to beat: fewer steps, with the pipeline's own solver and with better ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

from methods import Method, Setting, exactly, run_shorter

from hasten.measure.solvers import SOLVERS, Solver, other_solver

NAMES = {"dpm++": "fewer steps, DPM++(2M)", "unipc": "fewer steps, UniPC", "ab2": "fewer steps, AB2 in flow time"}
CONVERGED_STEPS = 200

PLAIN = Method("plain", "plain", lambda pipeline, setting: nullcontext(), exactly)


def solve(pipeline: Any, setting: Setting, *, solver: str) -> AbstractContextManager[Any]:
    """Another solver on the noise levels that the scheduler has for so many steps."""
    return other_solver(pipeline, cast(Solver, solver))


def baselines() -> list[Method]:
    """The rows "fewer steps"."""
    same = Method("fewer steps, same solver", "baseline", lambda pipeline, setting: nullcontext(), run_shorter)
    return [same, *(Method(NAMES[name], "baseline", partial(solve, solver=name), run_shorter) for name in SOLVERS)]
