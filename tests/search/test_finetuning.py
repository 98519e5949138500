"""Fine-tuning after quantization, on a bundled model with few and short pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hasten
from hasten.cli import app
from hasten.core.errors import HastenError, Refused, UnknownName
from hasten.core.registry import specs
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.progress import Silent
from hasten.search.finetune import Training, finetune
from hasten.search.finetune.effects import Effects, guided, measure, plain
from hasten.search.finetune.learning import Lessons
from hasten.search.finetune.recover import quantized_layers
from hasten.search.finetune.trajectories import record, subjects

pytestmark = pytest.mark.xdist_group("finetuning")  # set up once, not once in each process

WORK = Workload(prompts=("rocket", "pizza"), steps=2, guidance=3.0)
SHORT = Training(steps=16, pictures=2, batch=2, calls=1, rank=4)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return hasten.load("emoji-dit", device="cpu").pipeline


def test_calls_of_the_plain_model_are_recorded(pipeline: Any) -> None:
    examples = record(pipeline, WORK, 3, 2, Silent())
    assert len(examples) == 4  # two calls of the pipeline, for two pictures and for one, of two steps each
    assert [len(example.output) for example in examples] == [4, 4, 2, 2]  # guidance doubles the batch
    assert [example.call for example in examples] == [0, 1, 0, 1]
    first: Any = examples[0]
    with torch.no_grad():
        again = pipeline.transformer(*first.args, **first.kwargs)[0]
    assert torch.equal(again, first.output)
    assert "_hasten_chains" not in pipeline.transformer.__dict__


def test_the_effect_of_a_call_is_that_of_its_error_alone(pipeline: Any) -> None:
    examples, chosen = record(pipeline, WORK, 2, 2, Silent()), subjects(WORK, 0, 2)
    with hasten.accelerate(pipeline, "WeightOnly(bits=3)") as session:
        places = [site for _, site, _ in quantized_layers(session)]
        found = measure(session.target, places, WORK, examples, chosen)
        with plain(places), torch.no_grad():
            first: Any = examples[0]
            assert torch.equal(pipeline.transformer(*first.args, **first.kwargs)[0], first.output)
        with torch.no_grad():
            rounded = pipeline.transformer(*first.args, **first.kwargs)[0]
    halves = [(one[:2] + 2.0 * (one[:2] - one[2:])) for one in (rounded, first.output)]
    assert found.errors[0] == pytest.approx(float((halves[0] - halves[1]).square().mean()), rel=1e-4)
    assert all(error > 0 for error in found.errors)
    assert all(0 < damage < 1 for damage in found.damages)
    assert "_hasten_chains" not in pipeline.transformer.__dict__


def test_calls_are_drawn_by_what_their_error_does(pipeline: Any) -> None:
    examples, target = record(pipeline, WORK, 3, 1, Silent()), Target.of(pipeline)
    lessons = Lessons(target, examples, Effects((1.0, 1.0), (0.03, 0.01)), 3.0)
    drawn = list(lessons.drawn(600, 2, seed=0))
    assert {len(step) for step in drawn} == {2}
    flat = [example for step in drawn for example in step]
    assert sum(example.call == 0 for example in flat) / len(flat) == pytest.approx(0.75, abs=0.05)
    picture = {id(example): number // WORK.steps for number, example in enumerate(examples)}
    assert {picture[id(example)] for example in flat[:3]} == {0, 1, 2}  # in turn, so that none is left out
    assert Effects((1.0, 1.0), (0.0, 0.0)).chances.tolist() == [0.5, 0.5]


def test_the_error_is_that_of_the_guided_sum() -> None:
    with_text, without = torch.ones(1, 2), torch.zeros(1, 2)
    spec = specs()["dit"]
    assert guided(torch.cat([with_text, without]), spec, 3.0).tolist() == [[3.0, 3.0]]
    assert len(guided(torch.cat([with_text, without]), spec, 1.0)) == 2
    assert len(guided(torch.cat([with_text, without]), spec, None)) == 2


@pytest.mark.parametrize("method", ["lora", "qat"])
def test_it_learns_and_leaves_the_pipeline_as_it_came(pipeline: Any, method: Any, tmp_path: Path) -> None:
    before = {name: weight.detach().clone() for name, weight in pipeline.transformer.named_parameters()}
    learning = {name: weight.requires_grad for name, weight in pipeline.transformer.named_parameters()}
    made = finetune(
        pipeline, "WeightOnly(bits=3)", tmp_path / "tuned.safetensors", method=method, workload=WORK, training=SHORT
    )
    after = dict(pipeline.transformer.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert learning == {name: weight.requires_grad for name, weight in after.items()}
    assert len(made.losses) == SHORT.steps
    assert made.loss_after < 1
    assert made.losses[-1] < 0.8 * made.losses[0]
    assert made.effects is not None
    assert len(made.effects.errors) == WORK.steps
    held: Any = record(pipeline, WORK.replace(prompts=("ghost",)), 1, 1, Silent())[0]

    def difference(recipe: Any) -> float:
        with hasten.accelerate(pipeline, recipe), torch.no_grad():
            return float((pipeline.transformer(*held.args, **held.kwargs)[0] - held.output).square().mean())

    untrained = difference("WeightOnly(bits=3)")
    if method == "qat":
        made.install(pipeline)
    assert difference(made.recipe) < 0.9 * untrained
    with torch.no_grad():
        for name, weight in pipeline.transformer.named_parameters():
            weight.copy_(before[name])


def test_what_cannot_be_trained_is_refused(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    with pytest.raises(Refused, match="quantizes nothing"):
        finetune(pipeline, "FORA()", file)
    with pytest.raises(UnknownName, match="Did you mean lora"):
        finetune(pipeline, "Int8Linear()", file, method="lor")  # pyright: ignore
    with pytest.raises(UnknownName, match="Did you mean adamw"):
        finetune(pipeline, "Int8Linear()", file, training=Training(optimizer="adam"))
    assert not file.exists()


def test_a_loss_that_runs_away_is_an_error(pipeline: Any, tmp_path: Path) -> None:
    training = Training(steps=24, pictures=1, batch=1, rate=1e30)
    with pytest.raises(HastenError, match="smaller learning rate"):
        finetune(pipeline, "Int8Linear()", tmp_path / "x.safetensors", workload=WORK, training=training)
    assert not list(tmp_path.iterdir())
    assert all(torch.isfinite(weight).all() for weight in pipeline.transformer.parameters())


def test_ctrl_c_keeps_what_has_been_learnt(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, real = iter(range(9)), Lessons.loss

    def interrupted(*args: Any) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Lessons, "loss", interrupted)
    made = finetune(pipeline, "WeightOnly()", tmp_path / "x.safetensors", workload=WORK, training=SHORT)
    assert len(made.losses) == 3
    assert made.file.is_file()


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    arguments = ["finetune", "emoji-dit", "-r", "WeightOnly(bits=3)", "-o", str(file), "--steps", "2",
                 "--train", "3", "--pictures", "1", "--visits", "2", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert file.is_file()
    assert "LoRA(adapters=" in result.output
    assert CliRunner().invoke(app, ["finetune", "emoji-dit", "-r", "plain", "-o", str(file)]).exit_code == 2
