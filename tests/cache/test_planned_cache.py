"""Plans: found, chosen by budget, made anew for other samplers, guarded, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.plan_store import shipped
from hasten.cache.engine.records import PlanKey
from hasten.cache.planned_cache import PlannedCache, guidance_of
from hasten.cache.planning.planner import Planner
from hasten.cache.planning.recording import Recorder
from hasten.cache.planning.replan import standing_plans
from hasten.core.clock import Clock
from hasten.core.errors import InvalidSetting, Refused, UnknownName
from hasten.core.patch import Patch
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.weights import weights_hash
from hasten.search.plan_runs import Watched
from tests.cache.fields import noise, pipeline_of, sampled
from tests.core.stand_ins import Pipeline

STEPS = 12


def bent(timestep: float, sample: torch.Tensor) -> torch.Tensor:
    """Straight but for a bend in the middle."""
    return noise(1) + torch.tanh(torch.tensor((timestep - 600) / 60)) * noise(2)


def pipeline(scheduler: Any = None) -> Pipeline:
    return pipeline_of(scheduler or FlowMatchEulerDiscreteScheduler(), bent)


def watched(made: Pipeline, steps: int = STEPS) -> Watched:
    run, clock = Watched(), Clock()
    target = Target.of(made)
    patch = Patch(target.names(), lambda: clock)
    clock.install(target, patch)
    clock.around_step(run.link(clock), patch)
    sampled(made, steps)
    patch.close()
    return run


def plan_file(made: Pipeline, folder: Path, **key: Any) -> str:
    run = watched(made)
    recorder = Recorder(run.grid, run.points[0].state)
    for point in run.points:
        recorder.add(point.velocity)
    assert run.final is not None
    assert recorder.discrepancy(run.final) < 1e-5
    records = (recorder.record(seed=0),)
    values: dict[str, Any] = {
        "model": "bent",
        "weights_sha256": weights_hash(made.denoiser),
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "steps": STEPS,
        "width": 32,
        "height": 32,
    }
    file = PlanFile(key=PlanKey(**(values | key)), grid=run.grid, records=records)
    file = file.with_plans(standing_plans(Planner.of(run.grid, records)))
    return str(file.save(folder / "plan.json"))


def made_with(made: Pipeline, technique: PlannedCache, steps: int = STEPS) -> tuple[torch.Tensor, list[float], str]:
    field: Any = made.denoiser
    with accelerate(made, technique) as session:
        field.calls.clear()
        result = sampled(made, steps)
        return result, list(field.calls), session.evidence()[technique].summary


def test_a_plan_computes_the_budget_and_where_the_output_bends(tmp_path: Path) -> None:
    made = pipeline()
    plain = sampled(made, STEPS)
    result, calls, summary = made_with(made, PlannedCache(plan=plan_file(made, tmp_path), full_steps=6))
    assert len(calls) == 6
    assert any(450 < timestep < 750 for timestep in calls[1:-1])
    assert "6 of 12 full steps" in summary
    even, _, _ = _even(made, 6)
    assert float((result - plain).norm()) < float((even - plain).norm())


def _even(made: Pipeline, full_steps: int) -> tuple[torch.Tensor, int, str]:
    from hasten.cache.output_forecast import OutputForecast

    with accelerate(made, OutputForecast(full_steps=full_steps, order=0, correct=False, bend=1.0)):
        return sampled(made, STEPS), full_steps, ""


def test_budgets_choose_plans(tmp_path: Path) -> None:
    made = pipeline()
    plan = plan_file(made, tmp_path)
    for technique, expected in (
        (PlannedCache(plan=plan), 6),
        (PlannedCache(plan=plan, speedup=3.0), 4),
        (PlannedCache(plan=plan, full_steps=12), 12),
    ):
        field: Any = made.denoiser
        with accelerate(made, technique):
            field.calls.clear()
            sampled(made, STEPS)
            assert len(field.calls) == expected
    with pytest.raises(InvalidSetting, match="one budget, not full_steps and speedup"):
        PlannedCache(full_steps=3, speedup=2.0)
    with pytest.raises(Refused, match="none has measured_psnr"):
        accelerate(made, PlannedCache(plan=plan, min_psnr=30.0))


@pytest.mark.parametrize("steps", [8, 12, 20])
def test_other_step_counts_and_schedulers_are_planned_anew(tmp_path: Path, steps: int) -> None:
    plan = plan_file(pipeline(), tmp_path)
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.5),
    ):
        made = pipeline(scheduler)
        _, calls, summary = made_with(made, PlannedCache(plan=plan), steps)
        assert len(calls) == steps // 2
        assert "planned anew" in summary
        assert f"of {steps} full steps" in summary


def test_the_guard_only_adds_steps(tmp_path: Path) -> None:
    made = pipeline()
    plan = plan_file(made, tmp_path)
    _, planned, _ = made_with(made, PlannedCache(plan=plan, full_steps=4))
    _, loose, _ = made_with(made, PlannedCache(plan=plan, full_steps=4, guard=100.0))
    _, tight, _ = made_with(made, PlannedCache(plan=plan, full_steps=4, guard=1e-6))
    assert loose == planned
    assert set(planned) < set(tight)


def test_other_weights_are_refused_with_the_command_that_makes_a_plan(tmp_path: Path) -> None:
    plan = plan_file(pipeline(), tmp_path, weights_sha256="0" * 64)
    with pytest.raises(Refused, match=r"other weights \(bent\).*hasten calibrate MODEL --for plan --steps 12"):
        accelerate(pipeline(), PlannedCache(plan=plan))
    _, calls, summary = made_with(pipeline(), PlannedCache(plan=plan, on_mismatch="warn"))
    assert len(calls) == 6
    assert "the weights are not those of bent" in summary


def test_other_guidance_is_refused_before_the_first_step(tmp_path: Path) -> None:
    made = pipeline()
    plan = plan_file(made, tmp_path, guidance=3.0)
    setting: Any = made
    setting._guidance_scale = 7.5
    field: Any = made.denoiser
    with accelerate(made, PlannedCache(plan=plan)):
        field.calls.clear()
        with pytest.raises(Refused, match=r"guidance is 7.5, calibrated with 3"):
            sampled(made, STEPS)
        assert not field.calls
        setting._guidance_scale = 3.0
        sampled(made, STEPS)
    assert guidance_of(made) == 3.0


def test_what_runs_underneath_belongs_to_the_plan(tmp_path: Path) -> None:
    made = pipeline()
    plan = plan_file(made, tmp_path, recipe="Float8Linear()")
    with accelerate(made, PlannedCache(plan=plan)), pytest.raises(Refused, match="calibrated with Float8Linear"):
        sampled(made, STEPS)


def test_names_and_missing_plans(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no plan for this model .*hasten calibrate MODEL --for plan"):
        accelerate(pipeline(), PlannedCache())
    with pytest.raises(Refused, match="There is no plan called 'emoji-flx-28'"):
        accelerate(pipeline(), PlannedCache(plan="emoji-flx-28"))
    with pytest.raises(Refused, match="There is no file"):
        accelerate(pipeline(), PlannedCache(plan=str(tmp_path / "none.json")))
    assert issubclass(UnknownName, Exception)


def test_bundled_models_have_plans_of_their_own_weights() -> None:
    from hasten.models import load

    assert {name.rpartition("-")[0] for name in shipped()} == {"emoji-dit", "emoji-flux", "emoji-sd"}
    for name, file in shipped().items():
        model, _, steps = name.rpartition("-")
        found = PlanFile.load(file)
        denoiser = Target.of(load(model, device="cpu").pipeline).denoisers[0].module
        assert found.key.weights_sha256 == weights_hash(denoiser)
        assert found.key.steps == int(steps)
        assert any(plan.chosen and plan.measured_psnr for plan in found.plans)


def test_the_hash_of_weights_is_the_same_in_bfloat16_and_changes_with_them() -> None:
    made = torch.nn.Linear(40, 30)
    before = weights_hash(made)
    assert weights_hash(made) == before
    assert weights_hash(torch.nn.Linear(40, 30)) != before
    copy = torch.nn.Linear(40, 30)
    copy.load_state_dict(made.state_dict())
    assert weights_hash(copy.bfloat16()) == before
    with torch.no_grad():
        made.weight.add_(1)
    assert weights_hash(made) != before
