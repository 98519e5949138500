"""Calibration on a bundled model with few steps: the file is complete, honest and usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.planned_cache import PlannedCache
from hasten.core.errors import HastenError
from hasten.core.session import accelerate
from hasten.core.weights import weights_hash
from hasten.measure.rendering import render
from hasten.models import load
from hasten.search.calibrate import calibrate_plan
from hasten.search.plan_runs import psnr
from hasten.search.plan_table import plan_table, solver_answers
from hasten.search.shortlist import budgets

pytestmark = pytest.mark.xdist_group("calibrate")  # set up once, not once in each process

STEPS = 8


class Counting:
    """Progress that counts, and interrupts after so many pictures."""

    def __init__(self, until: int = 10**9) -> None:
        self.pictures, self.until, self.rows = 0, until, list[str]()

    def start(self, rows: int, pictures: int) -> None:
        assert pictures > 0

    def row(self, name: str) -> None:
        self.rows.append(name)

    def advance(self) -> None:
        self.pictures += 1
        if self.pictures == self.until:
            raise KeyboardInterrupt

    def skip(self) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> Any:
    return load("emoji-flux", device="cpu")


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlanFile, Path]:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    workload = model.workload.replace(steps=STEPS, prompts=model.workload.prompts[:2])
    return calibrate_plan(model, workload, file=file), file


def test_the_file_holds_a_plan_for_every_budget_and_measured_ones_for_some(made: tuple[PlanFile, Path]) -> None:
    found, file = made
    assert PlanFile.load(file) == found
    assert {plan.full_steps for plan in found.plans} == set(range(1, STEPS + 1))
    for budget in budgets(STEPS):
        tried = [plan for plan in found.plans if plan.full_steps == budget]
        chosen = next(plan for plan in tried if plan.chosen)
        scores = [plan.measured_psnr for plan in tried]
        assert {plan.origin for plan in tried} == {"dp", "uniform"}
        assert chosen.measured_psnr == max(score for score in scores if score is not None)
    assert found.plain_seconds
    assert found.key.guidance == 3.0
    assert str(budgets(STEPS)[0]) in [str(cell) for cell in plan_table(found).columns[0].cells]


def test_a_solver_that_came_nearer_is_named_with_its_noise_levels(made: tuple[PlanFile, Path]) -> None:
    found, _ = made
    answer = next(answer for answer in found.solvers if answer.measured_psnr is not None)
    better = answer.model_copy(update={"measured_psnr": 99.0})
    worse = answer.model_copy(update={"measured_psnr": 1.0})
    (sentence,) = solver_answers(found.model_copy(update={"solvers": (better,)}))
    assert sentence.startswith(f"{answer.steps} full steps: {answer.steps} steps of DPM-Solver++(2M) come nearer, 99.0")
    assert len(sentence.partition("levels: ")[2].split()) == answer.steps + 1
    assert solver_answers(found.model_copy(update={"solvers": (worse,)})) == []


def test_what_was_measured_comes_out_again(model: Any, made: tuple[PlanFile, Path]) -> None:
    found, file = made
    plan = found.choose(full_steps=4)
    workload = model.workload.replace(steps=STEPS)
    prompt = model.workload.prompts[1]
    plain = [render(model.pipeline, workload, prompt, seed) for seed in (1001, 1002)]
    technique = PlannedCache(plan=str(file), full_steps=4)
    with accelerate(model.pipeline, technique) as session:
        images = [render(model.pipeline, workload, prompt, seed) for seed in (1001, 1002)]
        assert session.evidence()[technique].full_steps == 8
    scores = [psnr(image, reference) for image, reference in zip(images, plain, strict=True)]
    assert sum(scores) / 2 == pytest.approx(plan.measured_psnr, abs=0.02)


def test_an_interruption_leaves_what_is_finished(model: Any, tmp_path: Path) -> None:
    workload = model.workload.replace(steps=4, prompts=model.workload.prompts[:2])
    progress = Counting(until=9)
    with pytest.raises(KeyboardInterrupt):
        calibrate_plan(model, workload, file=tmp_path / "plan.json", progress=progress)
    found = PlanFile.load(tmp_path / "plan.json")
    assert len(found.records) == 1
    assert found.choose(full_steps=2).predicted_db
    assert progress.rows[:2] == ["recording", "disturbing"]


def test_samplers_and_workloads_that_cannot_be_planned(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HastenError, match="two prompts"):
        calibrate_plan(model, model.workload.replace(prompts=("one",)))
    workload = model.workload.replace(steps=2, prompts=model.workload.prompts[:2])
    monkeypatch.setitem(model.pipeline.scheduler._internal_dict, "stochastic_sampling", True)
    with pytest.raises(HastenError, match="adds noise at each step"):
        calibrate_plan(model, workload)


def test_the_weights_are_noted(model: Any, made: tuple[PlanFile, Path]) -> None:
    assert made[0].key.weights_sha256 == weights_hash(model.pipeline.transformer)
