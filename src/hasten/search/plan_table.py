"""A plan file as a table: what each budget that was tried is worth."""

from __future__ import annotations

from rich.table import Table

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Plan, SolverAnswer


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
    solver = _best_solver(plan.full_steps, file)
    return (
        str(plan.full_steps),
        " ".join(map(str, plan.compute)),
        ", ".join(dict.fromkeys(plan.rules)),
        f"{plan.measured_psnr:.1f}",
        f"{max(even):.1f}" if even else "",
        f"{solver.measured_psnr:.1f}" if solver else "",
        f"{plan.measured_seconds:.3g}" if plan.measured_seconds else "",
    )


def solver_answers(file: PlanFile) -> list[str]:
    """A sentence for each number of steps at which another solver came nearer than reuse: solver and noise levels.

    The levels are sigma of a rectified flow (what pipelines take as `sigmas`), otherwise sigma/alpha.
    """
    flow = file.grid.prediction == "flow_prediction"
    sentences: list[str] = []
    for plan in (plan for plan in file.plans if plan.chosen and plan.measured_psnr is not None):
        answer = _best_solver(plan.full_steps, file)
        if answer is not None and (answer.measured_psnr or 0) > (plan.measured_psnr or 0):
            levels = answer.flow_time if flow else answer.noise_to_signal
            sentences.append(
                f"{answer.steps} full steps: {answer.steps} steps of DPM-Solver++(2M) come nearer, "
                f"{answer.measured_psnr:.1f} dB against {plan.measured_psnr:.1f}. "
                f"Noise levels: {' '.join(f'{level:.4g}' for level in levels)}"
            )
    return sentences


def _best_solver(steps: int, file: PlanFile) -> SolverAnswer | None:
    answers = [answer for answer in file.solvers if answer.steps == steps and answer.measured_psnr is not None]
    return max(answers, key=lambda answer: answer.measured_psnr or 0, default=None)
