"""Answers the calls of time-dependent linears from a table, which is rebuilt when what it depends on changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hasten.core.clock import Clock, Moment
from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.core.target import Denoiser, Target
from hasten.memory.engine.checks import LateChecks, Stopwatch, differs
from hasten.memory.engine.copies import Copies
from hasten.memory.engine.residency import Ledger, Residency
from hasten.memory.engine.table import Condition, Given, Inputs, Slot, Table, by_path, run, timed_linears
from hasten.memory.engine.timetable import ScheduleKey, Timetable
from hasten.memory.engine.weights import Unit, all_tensors

TABLES = 2
"""Tables kept for one schedule: separate guidance calls may come with different pooled texts."""


class Counts:
    """What has been counted over all denoisers of a session."""

    def __init__(self) -> None:
        self.tables = self.late_rows = self.steps = 0
        self.table_bytes = 0
        self.watch = Stopwatch()


class Modulation:
    """The table of one denoiser."""

    def __init__(self, denoiser: Denoiser, target: Target, clock: Clock, copies: Copies, counts: Counts) -> None:
        self.denoiser, self._target, self._clock, self._counts = denoiser, target, clock, counts
        self._parameters = tuple(inspect.signature(denoiser.module.forward).parameters)
        self.ledger = Ledger()
        self._residency = Residency(copies, self.ledger, ahead=1, forecast=lambda unit: True)
        self.slots = [Slot(p, m, Unit(p, all_tensors(m))) for p, m in timed_linears(denoiser).items()]
        self._timetable = Timetable(clock)
        self._checks = LateChecks()
        self._schedule: tuple[ScheduleKey | None, int] = (None, -1)
        self._tables: list[Table] = []
        self._places: dict[int, Inputs] = {}
        self._computing = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All weights of the linears."""
        return [weight.tensor for slot in self.slots for weight in slot.unit.weights]

    def install(self, patch: Patch) -> None:
        """Intercept the denoiser and its linears."""
        for slot in self.slots:
            patch.around(slot.module, self._answering(slot), "is answered from a table", innermost=True)
        patch.around(self.denoiser.module, self, "looks up the modulation of each step")

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make one call of the denoiser with the row of its step at hand."""
        given = Given(dict(zip(self._parameters, args, strict=False)) | kwargs)
        self._checks.look()
        self._present(self._row(given, self._clock.now))
        try:
            return call(*args, **kwargs)
        finally:
            for slot in self.slots:
                slot.value = None
            self._residency.finish()

    def verify(self) -> None:
        """Raise if any step of the runs so far was given another row than its own; waits for the GPU."""
        self._checks.look(wait=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _present(self, row: Inputs) -> None:
        """Hand out a row in tensors that stay where they are: a recorded call finds each step's row there."""
        size = next(iter(row.values())).shape[0] if row else 0
        places = self._places.setdefault(size, {})
        if _forms(places) != _forms(row):
            places.clear()
            places.update({path: torch.empty_like(value) for path, value in row.items()})
        if row:
            torch._foreach_copy_(list(places.values()), [row[path] for path in places])
        for slot in self.slots:
            slot.value = places.get(slot.path)

    def _answering(self, slot: Slot) -> Callable[..., Any]:
        def answer(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if slot.value is not None:
                return slot.value
            if self._computing or torch.compiler.is_compiling():
                return call(*args, **kwargs)
            self._residency.enter(slot.unit)
            try:
                return call(*args, **kwargs)
            finally:
                self._residency.leave(slot.unit)

        return answer

    @torch.no_grad()
    def _row(self, given: Given, moment: Moment) -> Inputs:
        """Outputs of all linears for this call."""
        actual = self._inputs(given)
        stamp = given[self.denoiser.spec.timestep]
        if not isinstance(stamp, torch.Tensor) or moment.steps is None:
            return self._computed(actual)
        known = self._timetable.known(stamp)
        table = self._table(given, moment, actual, stamp, known)
        if known is None:
            self._timetable.note(stamp)
        self._counts.steps += 1
        part = slice(0, None) if table is None else self._half(table, actual)
        if table is None or not self._agrees(table, moment, actual, part, certain=known is not None):
            self._counts.late_rows += 1
            if table is not None:
                table.wrong = True
            if known is not None:
                self._timetable.forget()
            return self._computed(actual)
        return {path: output[moment.step][part] for path, output in table.outputs.items()}

    def _inputs(self, given: Given) -> Inputs:
        assert self.denoiser.spec.time_inputs is not None
        return by_path(self.denoiser.spec.time_inputs(self.denoiser.module, given), self._paths)

    @property
    def _paths(self) -> list[str]:
        return [slot.path for slot in self.slots]

    def _table(
        self, given: Given, moment: Moment, actual: Inputs, stamp: torch.Tensor, known: list[torch.Tensor] | None
    ) -> Table | None:
        """The table that this call is to be answered from, built where there is none yet."""
        spec, key = self.denoiser.spec, self._timetable.key
        begins = (key, -1 if key is not None else moment.request) != self._schedule
        if begins:
            self._schedule, self._tables = (key, -1 if key is not None else moment.request), []
        condition, size = Condition(given, (spec.latents, spec.timestep)), next(iter(actual.values())).shape[0]
        # Once it is known what all steps are given, nothing is expected of a table that was made from a wrong guess.
        usable = [one for one in self._tables if moment.step < one.steps and (known is None or not one.wrong)]
        found = self._same(usable, size, condition) or self._like(usable, moment, size, condition)
        if found is None:
            stamps = known or self._timetable.inferred(self._timesteps(), stamp)
            return self._build(given, condition, stamps, moment.branch)
        found.branch = moment.branch
        self._tables = [*(table for table in self._tables if table is not found), found]
        return found

    def _same(self, tables: list[Table], size: int, condition: Condition) -> Table | None:
        """The table that was made for these very tensors."""
        return next((table for table in tables if table.batch() == size and table.condition.same(condition)), None)

    def _like(self, tables: list[Table], moment: Moment, size: int, condition: Condition) -> Table | None:
        """A table that was made for other tensors; the latest of the same guidance branch is looked at first."""
        latest = {id(table): number for number, table in enumerate(tables)}
        for table in sorted(tables, key=lambda one: (one.branch == moment.branch, latest[id(one)]), reverse=True):
            if moment.first:
                # The one wait of a request, much shorter than bringing the weights in again.
                if table.batch() == size and table.condition.equal(condition):
                    table.condition = condition
                    return table
            # Half of a guided batch, or equal values in new tensors; the comparison of inputs tells.
            elif table.batch() in (size, 2 * size):
                return table
        return None

    def _timesteps(self) -> torch.Tensor:
        scheduler = getattr(self._target.pipeline, "scheduler", None) or self._target.scheduler
        found = getattr(scheduler, "timesteps", None)
        return found if isinstance(found, torch.Tensor) else torch.empty(0)

    def _build(self, given: Given, condition: Condition, stamps: list[torch.Tensor], branch: str) -> Table:
        name = self.denoiser.spec.timestep
        self._computing = True
        try:
            with self._counts.watch.measuring(self._residency.copies.device):
                table = Table([self._inputs(given.replaced(name, stamp)) for stamp in stamps], condition, branch)
                table.compute(self.slots, self._residency)
        finally:
            self._computing = False
        self._tables = [*self._tables[1 - TABLES :], table]
        self._counts.tables += 1
        self._counts.table_bytes = max(self._counts.table_bytes, sum(table.bytes for table in self._tables))
        return table

    def _half(self, table: Table, actual: Inputs) -> slice:
        size = next(iter(actual.values())).shape[0]
        if table.batch() == size:
            return slice(0, None)
        return slice(0, size) if self.denoiser.spec.conditional == "first" else slice(size, None)

    def _agrees(self, table: Table, moment: Moment, actual: Inputs, part: slice, *, certain: bool) -> bool:
        """Is the row the one for this call's own inputs? On a GPU, with a known schedule, the answer comes later."""
        pairs = [(value, table.inputs[path][moment.step][part]) for path, value in _different(actual)]
        # Another size of batch is multiplied by another kernel, which rounds differently.
        loose = table.batch() != len(pairs[0][0])
        if any(one.shape != other.shape for one, other in pairs):
            return False
        if certain and pairs[0][0].device.type == "cuda":
            self._checks.expect_equal(pairs, self._mistaken, loose=loose)
            return True
        return not bool(torch.stack([differs(one, other, loose=loose) for one, other in pairs]).any())

    def _mistaken(self) -> None:
        self._timetable.forget()
        self._tables = []
        raise HastenError(
            "The denoiser was called with other timesteps, guidance or pooled text than those the modulation table was "
            "made for, so the present picture is wrong; make it again, the table will be rebuilt."
        )

    def _computed(self, actual: Inputs) -> Inputs:
        self._computing = True
        try:
            return {
                slot.path: run(slot, actual[slot.path], self._residency) for slot in self.slots if slot.path in actual
            }
        finally:
            self._computing = False


def _forms(row: Inputs) -> dict[str, object]:
    return {path: (value.shape, value.dtype, value.device) for path, value in row.items()}


def _different(inputs: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Each different tensor once: many linears share one input."""
    seen: set[int] = set()
    for path, value in inputs.items():
        if id(value) not in seen:
            seen.add(id(value))
            yield path, value
