"""What calibration measures, against the same numbers taken by hand, and the files it writes."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten import MagCache, TeaCache, accelerate
from hasten.cache.engine.model_data import MAGCACHE, TEACACHE, Provenance, TeaCacheSet
from hasten.core.errors import HastenError, NotEngaged, Refused
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.rendering import render
from hasten.models import LoadedModel, load
from hasten.search.calibrate_signals import FIRST_SEED, Calibration, calibrate
from hasten.search.fitting import fit, lowest, share, threshold_for
from hasten.search.recording import Recording, Records, StepRecord
from tests.contract.rigs import make


@functools.cache
def model(name: str = "emoji-flux") -> LoadedModel:
    return load(name, device="cpu")


def short(name: str = "emoji-flux", *, steps: int = 5, prompts: int = 2) -> Workload:
    return model(name).workload.replace(steps=steps, prompts=model(name).workload.prompts[:prompts])


def test_ratios_are_those_taken_by_hand() -> None:
    found = calibrate(model(), "magcache", short())
    by_hand: list[list[float]] = []
    for number, prompt in enumerate(short().prompts):
        norms = residual_norms(model().pipeline, prompt, FIRST_SEED + number)
        by_hand.append([float((now / before).mean()) for before, now in itertools.pairwise(norms)])
    ratios: Any = found.numbers
    assert ratios.ratios[0] == 1.0
    assert ratios.ratios[1:] == pytest.approx(np.mean(by_hand, axis=0), abs=2e-5)
    assert ratios.spread[1:] == pytest.approx(np.std(by_hand, axis=0), abs=2e-5)
    assert ratios.quantity == "residual"


def residual_norms(pipe: Any, prompt: str, seed: int) -> list[torch.Tensor]:
    """For each step, the length of what all blocks add to each token of the picture."""
    begin: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    transformer = pipe.transformer
    hooks = [
        transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: begin.append(kwargs["hidden_states"]), with_kwargs=True
        ),
        transformer.single_transformer_blocks[-1].register_forward_hook(
            lambda *call: norms.append((call[2][1] - begin[-1]).norm(dim=-1))
        ),
    ]
    render(pipe, short(), prompt, seed)
    for hook in hooks:
        hook.remove()
    return norms


def test_pairs_are_those_taken_by_hand() -> None:
    pipe, inputs, outputs = model().pipeline, list[torch.Tensor](), list[torch.Tensor]()
    hooks = [
        pipe.transformer.transformer_blocks[0].norm1.register_forward_hook(lambda *call: inputs.append(call[2][0])),
        pipe.transformer.register_forward_hook(lambda *call: outputs.append(call[2][0])),
    ]
    workload = short(prompts=1, steps=8)
    render(pipe, workload, workload.prompts[0], FIRST_SEED)
    for hook in hooks:
        hook.remove()
    expected = fit(list(zip(changes(inputs), changes(outputs), strict=True)))
    numbers: Any = calibrate(model(), "teacache", workload).numbers
    assert numbers.points == 7
    assert numbers.range == pytest.approx((min(changes(inputs)), max(changes(inputs))), rel=1e-4)
    assert np.polyval(numbers.coefficients, 0.06) == pytest.approx(np.polyval(expected[0], 0.06), rel=0.05)


def changes(values: list[torch.Tensor]) -> list[float]:
    return [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(values)]


@pytest.mark.parametrize("name", ["emoji-sd", "emoji-dit"])
def test_other_architectures_are_measured_at_what_their_cache_uses(name: str) -> None:
    ratios: Any = calibrate(model(name), "magcache", short(name, steps=3, prompts=1)).numbers
    pairs: Any = calibrate(model(name), "teacache", short(name, steps=7, prompts=1)).numbers
    assert len(ratios.ratios) == 3
    assert pairs.points == 2 * 6, "both guidance branches of a batch"
    assert ratios.quantity == ("deep_feature" if name == "emoji-sd" else "residual")
    assert pairs.indicator == ("first_layer" if name == "emoji-sd" else "declared")


def test_the_model_is_left_as_it_was() -> None:
    pipe = model().pipeline
    before = type(pipe.transformer), render(pipe, short(), "ghost", 0).tobytes()
    calibrate(model(), "teacache", short())
    assert (type(pipe.transformer), render(pipe, short(), "ghost", 0).tobytes()) == before


def test_a_fit_finds_the_polynomial_and_says_how_well_it_explains() -> None:
    coefficients = (30.0, -20.0, 4.0, 0.5, 0.01)
    x = np.linspace(0.02, 0.4, 60)
    y = np.polyval(coefficients, x)
    found, r_squared = fit(list(zip(x, y, strict=True)))
    assert found == pytest.approx(coefficients, rel=1e-6, abs=1e-8)
    assert r_squared == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(0, y.std(), 60)
    assert fit(list(zip(x, y + noise, strict=True)))[1] == pytest.approx(0.5, abs=0.3)


def numbers(*coefficients: float, **changes: Any) -> TeaCacheSet:
    return TeaCacheSet(models=(), coefficients=coefficients, provenance=Provenance(by="a test"), **changes)


def test_shares_of_thresholds_are_counted() -> None:
    steady = [StepRecord(0), *(StepRecord(step, [0.1, 0.05]) for step in range(1, 20))]
    every_third = share(numbers(1.0, 0.0), [steady], 0.25)
    assert every_third == pytest.approx(8 / 20)  # 0 3 6 9 12 15 18 and the last
    threshold = threshold_for(numbers(1.0, 0.0), [steady], 0.4)
    assert 0.2 < threshold <= 0.2001
    assert share(numbers(1.0, 0.0), [steady], threshold) <= 0.4
    steady[10] = StepRecord(10)  # another expert begins: nothing to compare with
    assert share(numbers(1.0, 0.0), [steady], 0.25) == pytest.approx(8 / 20)  # 0 3 6 9 10 13 16 and the last


def test_the_lowest_prediction_is_looked_for_within_the_range() -> None:
    assert lowest(numbers(1.0, -1.0, range=(0.5, 0.8))) == pytest.approx(-0.5)


def test_the_predicted_share_is_what_a_run_computes(tmp_path: Path) -> None:
    workload = short(steps=16, prompts=2)
    found = calibrate(model(), "teacache", workload)
    file = found.save(tmp_path / "own.json")
    chosen: Any = found.numbers
    threshold = min(map(float, chosen.computed_share))
    technique = TeaCache(coefficients=str(file), threshold=threshold)
    with accelerate(model().pipeline, technique) as session:
        for number, prompt in enumerate(workload.prompts):
            render(model().pipeline, workload, prompt, FIRST_SEED + number)
        full = session.evidence()[technique].full_steps
    assert full is not None
    assert full / 32 == pytest.approx(chosen.computed_share[f"{threshold:.4g}"], abs=0.1)


def test_a_poor_fit_is_admitted() -> None:
    found = calibrate(model(), "teacache", short(steps=10))
    assert found.numbers.r_squared < 0.7  # pyright: ignore
    assert "explains little" in found.warnings[0]


def test_files_keep_other_models_and_replace_their_own(tmp_path: Path) -> None:
    file = tmp_path / "ratios.json"
    for name, steps in (("emoji-flux", 3), ("emoji-dit", 3), ("emoji-flux", 4)):
        calibrate(model(name), "magcache", short(name, steps=steps, prompts=1)).save(file)
    sets = json.loads(file.read_text())["sets"]
    assert list(sets) == ["emoji-flux", "emoji-dit"]
    assert len(sets["emoji-flux"]["ratios"]) == 4
    for name in sets:
        denoiser = Target.of(model(name).pipeline).denoisers[0]
        assert MAGCACHE.choose(str(file), denoiser).provenance.model == name
        assert not list(MagCache(ratios=str(file)).problems(Target.of(model(name).pipeline)))


def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"kind": "plan"}')
    with pytest.raises(HastenError, match="holds no TeaCache coefficients: it was made for plan"):
        Calibration("teacache", "x", numbers(1.0), "").save(file)
    assert file.read_text() == '{"kind": "plan"}'


def test_the_provenance_says_how_it_was_measured(tmp_path: Path) -> None:
    found = calibrate(model("emoji-dit"), "magcache", short("emoji-dit", steps=3, prompts=2))
    origin = found.numbers.provenance
    assert origin.by.startswith("calibrated by hasten ")
    assert (origin.model, origin.steps, origin.guidance, origin.pictures) == ("emoji-dit", 3, 3.0, 2)
    assert origin.scheduler == type(model("emoji-dit").pipeline.scheduler).__name__
    assert origin.date is not None


def test_two_experts_share_the_records_of_a_picture() -> None:
    rig, second = make("flux"), make("flux").denoiser
    rig.components = {"transformer": rig.denoiser, "transformer_2": second, "scheduler": rig.scheduler}
    calls = 0

    def alternate(arguments: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        return (rig.denoiser if calls <= 3 else second)(**arguments, return_dict=False)[0]

    rig.call = alternate
    recording = Recording(purpose="magcache")
    with rig.accelerated(recording) as session:
        rig.run(steps=6)
        (steps,) = session.state(recording, Records).requests.values()
    assert [record.step for record in steps] == list(range(6))
    assert [record.ratio is None for record in steps] == [True, False, False, True, False, False]


def test_too_few_steps_and_foreign_models_are_refused() -> None:
    with pytest.raises(HastenError, match="too few for a polynomial"):
        calibrate(model(), "teacache", short(steps=3, prompts=1))
    with pytest.raises(HastenError, match="at least two steps"):
        calibrate(model(), "magcache", short(steps=1, prompts=1))
    bare = LoadedModel("bare", torch.nn.Linear(1, 1), Workload())
    with pytest.raises(Refused, match="hasten does not know the blocks of Linear"):
        calibrate(bare, "magcache")


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-sd", "emoji-dit"])
def test_shipped_numbers_work_at_once(name: str) -> None:
    for technique in (TeaCache(threshold=0.3), MagCache()):
        with accelerate(model(name).pipeline, technique) as session:
            render(model(name).pipeline, short(name, steps=12), model(name).workload.prompts[0], 0)
            evidence = session.evidence()[technique]
        assert evidence.reused_steps, NotEngaged
    assert TEACACHE.shipped[name].r_squared is not None
