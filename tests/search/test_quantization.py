"""Over a pipeline: statistics of chosen steps, sensitivities that find what matters, and a gate that backs off."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from hasten.core.errors import HastenError
from hasten.core.recipe import Recipe
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.quality import Fidelity
from hasten.models import LoadedModel, load
from hasten.quantize import GGUF, GPTQ, SmoothQuant, WeightOnly
from hasten.quantize.engine.linear_quantizer import Replaced
from hasten.quantize.engine.statistics_file import StatisticsFile
from hasten.search.quantization.calls import record_calls
from hasten.search.quantization.collect import collect, lacks_statistics, spread_steps, watched
from hasten.search.quantization.gate import Gate, Limits, quantizer_of, worst
from hasten.search.quantization.sensitivity import agreement, errors_alone, measure_gains

pytestmark = pytest.mark.xdist_group("gate")  # set up once, not once in each process

WORK = Workload(prompts=("pizza", "rocket"), steps=2, width=128, height=128, guidance=3.0)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("emoji-dit", device="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))


def test_steps_are_spread_evenly() -> None:
    ordered = sorted(spread_steps(28, 8))
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    assert set(gaps) <= {3, 4}
    assert len(gaps) == 7
    assert spread_steps(4, 8) == {0, 1, 2, 3}
    assert min(spread_steps(50, 2)) > 5
    assert max(spread_steps(50, 2)) < 45


def test_statistics_are_of_the_chosen_steps_and_gone_on_from(model: LoadedModel) -> None:
    assert lacks_statistics([Recipe((GPTQ(),))], model.pipeline)
    assert lacks_statistics([Recipe((GGUF(importance="auto"),))], model.pipeline)
    assert not lacks_statistics([Recipe((GGUF(),))], model.pipeline)
    assert not lacks_statistics([Recipe((GPTQ(statistics="synthetic"), WeightOnly()))], model.pipeline)
    first = collect(model, WORK.replace(prompts=("pizza",)), steps=2)
    assert not lacks_statistics([Recipe((SmoothQuant(),))], model.pipeline)
    once = StatisticsFile(first)
    layer = "transformer/transformer_blocks.0.attn1.to_q"
    # Two steps of a guided batch of two, 256 tokens each.
    assert once.statistics.read(layer).count == 2 * 2 * 256
    assert once.statistics.layers["transformer/transformer_blocks.0.attn1.to_k"].input == layer
    collect(model, WORK, steps=2, file=first)
    assert StatisticsFile(first).statistics.read(layer).count == 2 * 2 * 2 * 256
    changed = first.stat().st_mtime_ns
    collect(model, WORK, steps=2, file=first)
    assert first.stat().st_mtime_ns == changed
    assert not any(site.present._forward_pre_hooks for site in watched(Target.of(model.pipeline)))


def test_what_was_interrupted_is_gone_on_from(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.search.quantization import collect as module

    made: list[str] = []

    def render(pipeline: object, workload: Workload, prompt: str, seed: int) -> object:
        if len(made) == 1:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(prompt)
        return real(pipeline, workload, prompt, seed)

    real = module.render
    monkeypatch.setattr(module, "render", render)
    with pytest.raises(KeyboardInterrupt):
        collect(model, WORK, steps=1)
    file = collect(model, WORK, steps=1)
    assert made == ["pizza", "interrupted", "rocket"]
    assert StatisticsFile(file).about["pictures"] == 2


def test_a_file_of_something_else_is_not_overwritten(model: LoadedModel, tmp_path: Path) -> None:
    (file := tmp_path / "precious.safetensors").write_bytes(b"precious")
    with pytest.raises(HastenError, match="no file of statistics"):
        collect(model, WORK, file=file)
    assert file.read_bytes() == b"precious"


def test_recorded_calls_give_the_same_again(model: LoadedModel) -> None:
    calls = record_calls(model.pipeline, WORK, pictures=1, steps=2)
    assert len(calls) == 2
    assert max(call.error() for call in calls) == 0
    weight = model.pipeline.transformer.proj_out_2.weight
    before = weight.data.clone()
    weight.data.zero_()
    assert calls[0].error() > 0.3
    weight.data.copy_(before)


def test_sensitivities_are_measured_and_found(model: LoadedModel) -> None:
    from hasten.quantize import MixedPrecision

    file, found = measure_gains(model, WORK.replace(prompts=("pizza",)))
    assert file.is_file()
    assert all(one.measured > 0 for one in found)
    told = agreement(found)
    assert told["rank_correlation"] > 0.3
    # The last projection is the output itself: an error there is fully seen, and no list says so.
    gains = MixedPrecision().gains(Target.of(model.pipeline))
    assert gains["transformer/proj_out_2"] == pytest.approx(1, rel=0.5)
    assert sorted(gains.values())[len(gains) // 2] < 0.5 * gains["transformer/proj_out_2"]


def test_errors_of_layers_alone_leave_everything_in_place(model: LoadedModel) -> None:
    calls = record_calls(model.pipeline, WORK, pictures=1, steps=1)
    technique = WeightOnly(bits=3, skip=("transformer_blocks.[1-9]*",))
    with accelerate(model.pipeline, technique) as session:
        places = session.state(technique, Replaced).places
        errors = errors_alone(places, calls)
        assert all(site.parent._modules[site.name] is module for site, module in places)
        together = calls[0].error()
    assert all(error > 0 for error in errors.values())
    assert 0.3 < sum(errors.values()) / together < 3
    assert calls[0].error() == 0


def test_the_worst_layers_are_as_few_as_will_do() -> None:
    errors = {"a": 8.0, "b": 1.0, "c": 0.5, "d": 0.5}
    assert worst(errors, 3.0) == {"a"}
    assert worst(errors, 10.0) == {"a", "b"}
    assert worst({**errors, "broken": float("inf")}, 3.0) == {"a", "broken"}
    assert worst(errors, 0.0) == {"a"}


def test_limits_in_words() -> None:
    found = Fidelity(psnr=20.0, ssim=0.9, lpips=0.1)
    assert Limits(psnr=19).missed(found) == ()
    assert Limits(psnr=25, ssim=0.95, lpips=0.05).missed(found) == (
        "PSNR 20.00 dB, below 25 dB",
        "SSIM 0.9000, below 0.95",
        "LPIPS 0.1000, above 0.05",
    )
    assert Limits().missed(Fidelity(psnr=float("nan"), ssim=1, lpips=0))


def test_the_gate_backs_off_until_it_is_passed(model: LoadedModel) -> None:
    gate = Gate(model.pipeline, WORK.replace(prompts=("pizza",)), Limits(psnr=25.0))
    verdict = gate.run(Recipe((WeightOnly(bits=3),)))
    assert verdict.passed
    assert len(verdict.rounds) > 1
    first, last = verdict.rounds[0], verdict.rounds[-1]
    assert first.missed
    assert first.finer
    assert last.fidelity is not None
    assert last.fidelity.psnr >= 25
    assert 3 < first.bits < last.bits < 8.3
    assert quantizer_of(verdict.recipe).finer
    assert verdict.to_dict()["passed"] is True


def test_the_gate_says_so_when_it_cannot_be_passed(model: LoadedModel) -> None:
    gate = Gate(model.pipeline, WORK.replace(prompts=("pizza",)), Limits(psnr=90.0))
    verdict = gate.run(Recipe((WeightOnly(bits=2),)), rounds=1)
    assert not verdict.passed
    assert len(verdict.rounds) == 2
    with pytest.raises(HastenError, match="quantizes no layers"):
        gate.run(Recipe(()))


def test_undefined_numbers_fail_the_gate_and_name_the_layer(model: LoadedModel) -> None:
    layer = model.pipeline.transformer.transformer_blocks[2].ff.net[2]
    gate = Gate(model.pipeline, WORK.replace(prompts=("pizza",)), Limits(psnr=10.0))

    class Breaking(WeightOnly):
        def quantize(self, site):  # pyright: ignore
            module = super().quantize(site)
            if site.layer is layer:
                module._buffers["scale"] = torch.full_like(module.quantized.scale.codes, float("nan"))
            return module

    verdict = gate.run(Recipe((Breaking(bits=8),)))
    assert verdict.rounds[0].missed == ("a picture holds undefined numbers",)
    assert "transformer_blocks.2.ff.net.2" in verdict.rounds[0].left
    assert verdict.passed
