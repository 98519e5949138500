"""The file that calibration writes and a planned cache reads: recorded outputs, and a plan for every budget."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from hasten.cache.engine.records import Grid, Plan, PlanKey, PlanRecord, SeedRecord, SolverAnswer
from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.invalid import explain

SCHEMA = 1


class PlanFile(PlanRecord):
    """Plans with what they are valid for (`key`) and what they were made from.

    `gains`, one per node or none, say how much of an error at a node arrives in the final sample. `plain_seconds` is
    the measured time of one image without reuse. Of several plans with equally many full steps at most one is `chosen`.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    key: PlanKey
    grid: Grid
    gains: tuple[NonNegativeFloat, ...] = ()
    records: Annotated[tuple[SeedRecord, ...], Field(min_length=1)]
    plans: tuple[Plan, ...] = ()
    solvers: tuple[SolverAnswer, ...] = ()
    plain_seconds: PositiveFloat | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        steps = self.grid.steps
        if self.key.steps != steps:
            raise ValueError(f"key.steps is {self.key.steps}, but grid has {steps} steps")
        if self.gains and len(self.gains) != steps + 1:
            raise ValueError(f"gains needs {steps + 1} numbers, one per node")
        for number, record in enumerate(self.records):
            if record.size != steps + 1:
                raise ValueError(f"records[{number}].factor is for {record.size - 1} steps, but grid has {steps}")
        for number, plan in enumerate(self.plans):
            if plan.compute[-1] >= steps:
                raise ValueError(f"plans[{number}].compute names step {plan.compute[-1]}; grid ends at {steps - 1}")
        chosen = [plan.full_steps for plan in self.plans if plan.chosen]
        if len(chosen) != len(set(chosen)):
            raise ValueError("plans has two chosen plans with equally many full steps")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanFile:
        """Read a plan file; raises HastenError naming the file and the field."""
        file = Path(path)
        data = read_json(file)
        if not isinstance(data, Mapping) or "schema" not in data:
            raise HastenError(f'{file} is no plan file: it has no "schema" entry.')
        version = cast("Mapping[str, object]", data)["schema"]
        if version != SCHEMA:
            raise HastenError(f"{file} has schema {version!r}; this version of hasten reads schema {SCHEMA}.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise HastenError(f"{file}: {explain(error, _records())}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file whole or not at all; equal data give equal bytes."""
        return atomic_write_text(path, json_text(self.model_dump(by_alias=True)))

    def with_plans(self, plans: Iterable[Plan]) -> PlanFile:
        """The same file with `plans` added; one with the same full steps and rules is replaced, as after measuring it.

        Plans are ordered by full steps, the chosen one first.
        """
        merged = {(plan.compute, plan.rules): plan for plan in (*self.plans, *plans)}
        ordered = sorted(merged.values(), key=lambda plan: (plan.full_steps, not plan.chosen))
        return PlanFile.model_validate({**dict(self), "plans": tuple(ordered)})

    def choose(
        self,
        *,
        full_steps: int | None = None,
        speedup: float | None = None,
        min_psnr: float | None = None,
        seconds: float | None = None,
    ) -> Plan:
        """The plan for a budget; exactly one must be given. Raises InvalidSetting naming the nearest valid choice.

        `full_steps`: exactly so many. `speedup`: the most full steps with at least this speed-up: measured where all
        seconds are known, else steps over full steps. `seconds`: the most full steps within so many measured seconds
        per image. `min_psnr`: the fewest full steps with at least this measured PSNR in dB.
        """
        budget = {"full_steps": full_steps, "speedup": speedup, "min_psnr": min_psnr, "seconds": seconds}
        given = {name: value for name, value in budget.items() if value is not None}
        if len(given) != 1:
            raise InvalidSetting(f"Give exactly one of full_steps, speedup, min_psnr and seconds, not {len(given)}.")
        (name, value), plans = next(iter(given.items())), self._usable()
        if name == "full_steps":
            return _exactly(value, plans)
        merits, noun = self._merits(name, plans)
        good = [plan for plan, merit in zip(plans, merits, strict=True) if _meets(name, merit, value)]
        if good:
            return good[0] if name == "min_psnr" else good[-1]
        nearest = min(merits) if name == "seconds" else max(merits)
        raise InvalidSetting(f"No plan has {name}={value:g}; the nearest is {nearest:.4g}{noun}.")

    def _usable(self) -> list[Plan]:
        """One plan for each number of full steps, fewest first: the chosen one, else the first in the file."""
        usable: dict[int, Plan] = {}
        for plan in sorted(self.plans, key=lambda plan: not plan.chosen):
            usable.setdefault(plan.full_steps, plan)
        if not usable:
            raise InvalidSetting("This plan file holds no plans; calibrate again.")
        return [usable[full] for full in sorted(usable)]

    def _merits(self, name: str, plans: list[Plan]) -> tuple[list[float], str]:
        if name == "speedup":
            seconds = [plan.measured_seconds for plan in plans]
            if self.plain_seconds is None or None in seconds:
                return [self.grid.steps / plan.full_steps for plan in plans], " (steps over full steps)"
            return [self.plain_seconds / one for one in seconds if one], " (measured)"
        field = "measured_psnr" if name == "min_psnr" else "measured_seconds"
        found: list[float | None] = [getattr(plan, field) for plan in plans]
        if all(value is None for value in found):
            raise InvalidSetting(f"{name} needs measured plans, and none has {field}; use full_steps or speedup.")
        missing = float("inf") if name == "seconds" else float("-inf")
        return [missing if value is None else value for value in found], " dB" if name == "min_psnr" else " s"


def _meets(name: str, merit: float, value: float) -> bool:
    return merit <= value if name == "seconds" else merit >= value


def _exactly(full_steps: float, plans: list[Plan]) -> Plan:
    nearest = min(plans, key=lambda plan: (abs(plan.full_steps - full_steps), plan.full_steps))
    if nearest.full_steps != full_steps:
        raise InvalidSetting(f"No plan has full_steps={full_steps:g}; the nearest is {nearest.full_steps}.")
    return nearest


def _records() -> tuple[type[BaseModel], ...]:
    """What such a file consists of."""
    return (PlanFile, PlanKey, Grid, SeedRecord, Plan, SolverAnswer)
