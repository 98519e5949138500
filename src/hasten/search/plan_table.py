"""A plan file as a table: what each budget that was tried is worth."""

from __future__ import annotations

from rich.table import Table

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Plan


def plan_table(file: PlanFile) -> Table:
    """One row for each number of full steps that was tried: the chosen plan, the best uniform one, DPM-Solver++(2M)."""
    likeness = "to the plain picture" if file.key.goal == "reproduce" else "to the converged picture"
    table = Table(title=f"{file.key.model}, {file.grid.steps} steps: PSNR {likeness}")
    for name in ("full steps", "computed", "rules", "PSNR dB", "best even dB", "2M dB", "seconds"):
        table.add_column(name, justify="left" if name in ("computed", "rules") else "right")
    for plan in file.plans:
        if plan.chosen and plan.measured_psnr is not None:
            table.add_row(*_cells(plan, file))
    return table


def _cells(plan: Plan, file: PlanFile) -> tuple[str, ...]:
    even = [
        other.measured_psnr
        for other in file.plans
        if other.full_steps == plan.full_steps and other.origin == "uniform" and other.measured_psnr is not None
    ]
    solvers = [
        answer.measured_psnr
        for answer in file.solvers
        if answer.steps == plan.full_steps and answer.measured_psnr is not None
    ]
    return (
        str(plan.full_steps),
        " ".join(map(str, plan.compute)),
        ", ".join(dict.fromkeys(plan.rules)),
        f"{plan.measured_psnr:.1f}",
        f"{max(even):.1f}" if even else "",
        f"{max(solvers):.1f}" if solvers else "",
        f"{plan.measured_seconds:.3g}" if plan.measured_seconds else "",
    )
