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
from hasten.core.workload import Workload
from hasten.measure.progress import Silent
from hasten.search.finetune import finetune
from hasten.search.finetune.recover import Training
from hasten.search.finetune.trajectories import record

pytestmark = pytest.mark.xdist_group("finetuning")  # set up once, not once in each process

WORK = Workload(prompts=("rocket", "pizza"), steps=2)
SHORT = Training(steps=16, pictures=2, batch=2, rank=4)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return hasten.load("emoji-dit", device="cpu").pipeline


def test_calls_of_the_plain_model_are_recorded(pipeline: Any) -> None:
    examples = record(pipeline, WORK, 3, 2, Silent())
    assert len(examples) == 4  # two calls of the pipeline, for two pictures and for one, of two steps each
    assert [len(example.output) for example in examples] == [4, 4, 2, 2]  # guidance doubles the batch
    first: Any = examples[0]
    with torch.no_grad():
        again = pipeline.transformer(*first.args, **first.kwargs)[0]
    assert torch.equal(again, first.output)
    assert "_hasten_chains" not in pipeline.transformer.__dict__


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
    assert made.losses[-1] < 0.7 * made.losses[0]
    held: Any = record(pipeline, WORK.replace(prompts=("ghost",)), 1, 1, Silent())[0]

    def difference(recipe: Any) -> float:
        with hasten.accelerate(pipeline, recipe), torch.no_grad():
            return float((pipeline.transformer(*held.args, **held.kwargs)[0] - held.output).square().mean())

    untrained = difference("WeightOnly(bits=3)")
    if method == "qat":
        made.install(pipeline)
    assert difference(made.recipe) < 0.8 * untrained
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
    from hasten.search.finetune import recover

    count, real = iter(range(9)), recover._loss  # pyright: ignore[reportPrivateUsage]

    def interrupted(*args: Any) -> torch.Tensor:
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(recover, "_loss", interrupted)
    made = finetune(pipeline, "WeightOnly()", tmp_path / "x.safetensors", workload=WORK, training=SHORT)
    assert len(made.losses) == 3
    assert made.file.is_file()


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    arguments = ["finetune", "emoji-dit", "-r", "WeightOnly(bits=3)", "-o", str(file), "--steps", "2", "--train", "3",
                 "--pictures", "1", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert file.is_file()
    assert "LoRA(adapters=" in result.output
    assert CliRunner().invoke(app, ["finetune", "emoji-dit", "-r", "plain", "-o", str(file)]).exit_code == 2
