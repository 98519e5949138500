"""Running, timing and rows: what is recorded is what happened."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from PIL import Image

from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.core.recipe import Recipe, as_recipe
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure import compare as compare_module
from hasten.measure import runner
from hasten.measure.compare import compare
from hasten.measure.defaults import default_recipes
from hasten.measure.environment import environment
from hasten.measure.instruments import PeakMemory, Stopwatch
from hasten.measure.rendering import arguments, class_id, render
from hasten.measure.rows import finished_row
from hasten.measure.runner import Run, run_recipe
from hasten.models import LoadedModel, bundled, load


@pytest.fixture(scope="module")
def dit() -> LoadedModel:
    return load("emoji-dit")


def workload(model: LoadedModel, **changes: Any) -> Workload:
    return model.workload.replace(**{"prompts": model.workload.prompts[:1], "steps": 3} | changes)


def test_a_run_records_every_picture(dit: LoadedModel) -> None:
    run, ticks = Run(Recipe(), workload(dit, seeds=(0, 1))), list[int]()
    run_recipe(dit.pipeline, run, runs=2, advance=lambda: ticks.append(1))
    assert (len(run.images), len(run.seconds), len(ticks)) == (2, 4, 5)
    assert run.images[0].tobytes() != run.images[1].tobytes()
    assert all(seconds > 0 for seconds in run.seconds)


def test_the_warm_up_picture_is_not_counted_among_the_steps(dit: LoadedModel) -> None:
    run = Run(as_recipe("FORA(interval=2)"), workload(dit, seeds=(0, 1), steps=4))
    run_recipe(dit.pipeline, run)
    calls = 2 * 4
    assert (run.evidence[0].full_steps, run.evidence[0].reused_steps) == (calls // 2, calls // 2)


def test_an_interrupted_run_keeps_its_evidence_but_no_means(dit: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(pipeline: Any, *rest: Any) -> Any:
        if len(run.images) == 1:
            raise KeyboardInterrupt
        return render(pipeline, *rest)

    monkeypatch.setattr(runner, "render", stop)
    run = Run(as_recipe("FORA(interval=2)"), workload(dit, seeds=(0, 1)))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(dit.pipeline, run)
    row = finished_row("x", run, "recipe", (), run, None, interrupted=True)
    assert "reused" in row.engaged[0]
    assert row.changes
    assert (row.peak_memory_bytes or 0) > 10_000_000
    assert (row.steps, row.step_map, row.phases) == (None, None, None)


def test_the_same_seed_gives_the_same_picture(dit: LoadedModel) -> None:
    first, second = Run(Recipe(), workload(dit)), Run(Recipe(), workload(dit))
    run_recipe(dit.pipeline, first)
    run_recipe(dit.pipeline, second)
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_phases_and_memory_are_measured() -> None:
    model = load("emoji-sd")
    target, watch, memory = (
        Target.of(model.pipeline),
        Stopwatch(Target.of(model.pipeline)),
        PeakMemory(torch.device("cpu")),
    )
    with watch.running(), memory.watching():
        compare_module.run_recipe(model.pipeline, Run(Recipe(), workload(model)))
        held = torch.ones(40_000_000)
        time.sleep(0.05)
    assert all(seconds > 0 for seconds in watch.seconds().values())
    assert memory.bytes > held.numel() * 4
    assert type(target.denoisers[0].module).__name__ == "UNet2DConditionModel"
    assert "_hasten_chains" not in target.denoisers[0].module.__dict__


def test_a_technique_that_does_nothing_makes_a_failed_row(dit: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore(self: Patch, obj: object, *args: object, **kwargs: object) -> None:
        self._record(obj, "sabotaged")

    monkeypatch.setattr(Patch, "around", ignore)
    result = compare(dit.pipeline, ["FORA()"], workload(dit))
    assert [row.status for row in result.rows] == ["ok", "failed"]
    assert "did not engage" in (result.rows[1].reason or "")


def test_a_recipe_that_breaks_does_not_stop_the_others(dit: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cache.fora import FORA

    def explode(self: FORA, target: Target, patch: Patch) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr(FORA, "apply", explode)
    result = compare(dit.pipeline, ["FORA()", "AttentionBackend()"], workload(dit))
    assert [row.status for row in result.rows][:3] == ["ok", "failed", "ok"]
    assert "out of something" in (result.rows[1].reason or "")


def image(value: int) -> Image.Image:
    return Image.new("RGB", (128, 128), (value, value, value))


def recorded(seconds: list[float], first: float, value: int, *techniques: Any) -> Run:
    run = Run(Recipe(tuple(techniques)), Workload(prompts=("a",), seeds=tuple(range(len(seconds))), steps=10))
    run.seconds, run.first_image_seconds, run.apply_seconds = seconds, first, 0.5
    run.images = [image(value)] * len(seconds)
    return run


def test_setup_and_break_even_are_computed_from_the_times() -> None:
    from hasten.compilation import CompileBlocks

    plain = recorded([2.0, 2.0, 2.2], 2.0, 100)
    row = finished_row("x", recorded([1.0, 1.0, 1.2], 5.0, 100, CompileBlocks()), "recipe", (), plain, None)
    assert row.speedup == 2
    assert row.setup_seconds == 4.5
    assert row.pays_off_after_images == 5
    assert row.fidelity is not None
    assert row.fidelity.identical
    slower = finished_row("x", recorded([3.0], 3.0, 100, CompileBlocks()), "recipe", (), plain, None)
    assert slower.pays_off_after_images is None


def test_fidelity_is_against_the_baseline() -> None:
    row = finished_row("x", recorded([1.0], 1.0, 110), "recipe", (), recorded([1.0], 1.0, 100), None)
    assert row.fidelity is not None
    assert row.fidelity.psnr is not None
    assert math.isclose(row.fidelity.psnr, 20 * math.log10(25.5), rel_tol=1e-4)


def test_arguments_are_those_the_pipeline_takes(dit: LoadedModel) -> None:
    name = dit.workload.prompts[0]
    call = arguments(dit.pipeline, workload(dit, guidance=3.0, max_sequence_length=7), name, 5)
    assert call["class_labels"] == [class_id(dit.pipeline, name.upper())]
    assert call["guidance_scale"] == 3.0
    assert call["num_inference_steps"] == 3
    assert call["generator"].initial_seed() == 5
    assert "max_sequence_length" not in call
    assert "width" not in call


def test_an_empty_workload_is_refused(dit: LoadedModel) -> None:
    with pytest.raises(HastenError, match="at least one prompt"):
        compare(dit.pipeline, [], Workload())


@pytest.mark.parametrize("name", list(bundled()))
def test_every_bundled_model_has_a_ladder_that_applies(name: str) -> None:
    ladder = default_recipes(load(name))
    assert len(ladder) >= 3
    assert any(technique.lossy for _, recipe in ladder for technique in recipe)


def test_names_that_shorten_alike_keep_their_pictures_apart(dit: LoadedModel, tmp_path: Any) -> None:
    result = compare(
        dit.pipeline, ["FORA(interval=2)", "FORA(interval= 2)"], workload(dit), out=tmp_path, fewer_steps=False
    )
    assert len({path for row in result.rows for path in row.images}) == 3


def test_the_environment_says_what_memory_means() -> None:
    facts = environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert "resident" in str(facts["peak_memory"])


def test_a_machine_that_changes_speed_is_noticed(dit: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    real, runs = compare_module.run_recipe, list[Run]()

    def slow_at_first(pipeline: Any, run: Run, **options: Any) -> None:
        real(pipeline, run, **options)
        runs.append(run)
        run.seconds = [9.0 if len(runs) == 1 else 1.0 for _ in run.seconds]

    monkeypatch.setattr(compare_module, "run_recipe", slow_at_first)
    result = compare(dit.pipeline, [], workload(dit))
    assert "took 9 s a picture at first and 1 s at the end" in result.warnings[0]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(result.table())
    assert "not reliable" in " ".join(captured.get().split())
    assert "not reliable" in result.to_html()
