"""Evaluates what depends on the timestep alone once for all steps, and takes those weights off the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.core.away import take_away
from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.memory.engine.copies import copies_to
from hasten.memory.engine.modulation import Counts, Modulation
from hasten.memory.engine.moving import pinned_bytes, special_weights
from hasten.memory.engine.sizes import in_words
from hasten.memory.engine.storage import Storage
from hasten.memory.engine.table import timed_linears
from hasten.memory.engine.weights import all_tensors, size_of


@dataclass(frozen=True, kw_only=True)
class ModulationTable(Technique):
    """Answers the linears of adaptive norms from a table over all steps of the schedule; their weights leave the GPU.

    In FLUX.1 these linears are 27 % of the parameters (6.5 GB in bfloat16), and in each step they multiply a single
    row. Their inputs depend on timestep, guidance and pooled text (or class) alone, so that one product a linear,
    for all steps at once, is enough; only rounding differs. The table is rebuilt when the values of schedule, guidance
    or pooled text change, for which the weights come by once, one after the other: that is the cost of each prompt.
    To see whether they have changed, the first step of a request waits for the GPU; the others do not.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.09748"

    pinned: str = field(
        default="auto",
        metadata=about("page-locked host memory to take at most, such as '8GB'; auto is half of the machine's memory"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pinned_bytes(self.pinned)

    def claims(self) -> tuple[str, ...]:
        """The linears of adaptive norms."""
        return ("modulation",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a schedule that can be observed, and a specification that says what depends on it."""
        if target.scheduler is None and target.device.type != "meta":
            yield "the steps to come are known from a pipeline's scheduler, and a bare denoiser has none."
        for denoiser in target.denoisers:
            if denoiser.spec.time_inputs is None:
                yield f"hasten does not know which linears of {denoiser.spec.model_class} depend on the timestep alone."
            tensors = [tensor for module in timed_linears(denoiser).values() for tensor in all_tensors(module)]
            yield from special_weights(denoiser.name, tensors)

    def apply(self, target: Target, patch: Patch) -> None:
        """Send the weights home and answer the calls of the linears."""
        copies, counts, clock = copies_to(target.device), Counts(), patch.clock
        storage = Storage(pinned_bytes(self.pinned) if target.device.type == "cuda" else 0, None)
        tables = [Modulation(denoiser, target, clock, copies, counts) for denoiser in target.denoisers]
        patch.keep(_Tables(counts, tables))
        for table in tables:
            back = _Back(storage, take_away(table.denoiser.module, table.tensors))
            patch.undo(table.denoiser.module, "time-dependent linears are kept in host memory", back)
            storage.store([slot.unit for slot in table.slots])
            table.install(patch)

    def engaged(self, session: Session) -> Evidence:
        """Calls were answered from the table, each from the row of its own inputs."""
        kept = session.state(self, _Tables)
        for table in kept.tables:
            table.verify()
        counts = kept.counts
        if counts.steps == counts.late_rows:
            raise NotEngaged("no step was answered from a table.")
        units = [slot.unit for table in kept.tables for slot in table.slots]
        return Evidence(
            summary=f"{counts.steps - counts.late_rows} of {counts.steps} denoiser calls took the outputs of "
            f"{len(units)} linears from a table; {in_words(sum(unit.bytes for unit in units))} of weights stay off the "
            f"device, for a table of {in_words(counts.table_bytes)}; {counts.tables} tables built in "
            f"{counts.watch.seconds() / counts.tables:.3f} s each"
        )

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory: the weights of the linears, less one output a step."""
        sizes = {d.name: sum(size_of(module) for module in timed_linears(d).values()) for d in target.denoisers}
        modules = [module for denoiser in target.denoisers for module in timed_linears(denoiser).values()]
        rows = sum(int(getattr(module, "out_features", 0)) for module in modules)
        return Cost(
            extra_bytes=2 * rows * workload.steps * workload.batch,
            held={d.name: size_of(d.module) - sizes[d.name] for d in target.denoisers},
            brought=sizes,
        )


@dataclass
class _Tables:
    """The run-time state: a table for each denoiser, and what they count together."""

    counts: Counts
    tables: list[Modulation]


class _Back:
    """Gives the weights back, and lets others move them again."""

    def __init__(self, storage: Storage, end: Callable[[], None]) -> None:
        self._storage, self._end = storage, end

    def __call__(self) -> None:
        """Safe to call again after a failure."""
        self._storage.close()
        self._end()
