"""What a row of the benchmark is: a method, how it is brought to a budget of full steps, and how it is applied.

A new row is one entry: a recipe in ours.json, or a `Method` in baselines.py or peers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["plain", "baseline", "peer", "ours"]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """`steps` of the plain pipeline, the number of full steps wanted, and the method's own parameters."""

    steps: int
    budget: int
    values: Values = field(default_factory=dict[str, Any])

    @property
    def run_steps(self) -> int:
        """Steps that the pipeline is asked for."""
        return int(self.values.get("run_steps", self.steps))


class Draw(Protocol):
    """Makes the calibration pictures with a pipeline."""

    def __call__(self, pipeline: Any, steps: int) -> None: ...


@dataclass(frozen=True)
class Search:
    """Bisect `parameter` on the calibration prompts until the mean number of full steps is the budget.

    `ladder`: other parameters, most cautious first; the first that can get as low as the budget is taken.
    """

    parameter: str = "threshold"
    low: float = 1e-4
    high: float = 8.0
    ladder: Sequence[Values] = ({},)


Candidates = Callable[[int], Iterator[tuple[Values, int]]]
"""Of a number of steps, possible parameters with the full steps that each takes; the earlier one wins a tie."""


@dataclass(frozen=True)
class Method:
    """One kind of row. `prepare(pipeline, setting)` applies it to a fresh pipeline while inside."""

    name: str
    kind: Kind
    prepare: Callable[[Any, Setting], AbstractContextManager[Any]]
    tune: Search | Candidates
    models: tuple[str, ...] | None = None
    calibrate: Callable[[Any, int, Draw], Values] | None = None
    """Measures further parameters with uncached runs of a pipeline at a number of steps."""
    detail: str = ""

    def fits(self, model: str) -> bool:
        """Whether the row makes sense for a model at all."""
        return self.models is None or model in self.models


def exactly(steps: int) -> Iterator[tuple[Values, int]]:
    """For methods that take the budget as it is."""
    yield from (({}, count) for count in range(1, steps + 1))


def run_shorter(steps: int) -> Iterator[tuple[Values, int]]:
    """For baselines: as many steps as the budget has."""
    yield from (({"run_steps": count}, count) for count in range(1, steps + 1))


def intervals(steps: int) -> Iterator[tuple[Values, int]]:
    """Every how many steps all is computed, the first step being one of them."""
    yield from (({"interval": interval}, -(-steps // interval)) for interval in range(1, steps + 1))


def nearest(candidates: Candidates, steps: int, budget: int) -> Values:
    """The candidate whose number of full steps is nearest to the budget."""
    return min(candidates(steps), key=lambda pair: abs(pair[1] - budget))[0]
