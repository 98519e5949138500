"""TeaCache against the published algorithm, and which coefficients it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_harness import Arguments, Pipe, equal, executed, repeat
from torch import nn

from hasten.cache.engine.model_data import TEACACHE
from hasten.cache.engine.statistics import Statistics
from hasten.cache.tea_cache import Polynomial, TeaCache
from hasten.core.errors import InvalidSetting, Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.target import Target
from tests.contract.rigs import make

STRAIGHT = (1.0, 0.0)
FLUX = TEACACHE.shipped["FLUX.1-dev"].coefficients


def drifting(pipe: Pipe, steps: int, speed: float) -> list[Arguments]:
    """Calls whose picture moves, faster and faster, from one to another."""
    start, end = pipe.arguments(0, height=8, width=8), pipe.arguments(1)[pipe.input][:, :16]
    return [start | {pipe.input: start[pipe.input] + step**1.5 * speed * end} for step in range(steps)]


class Published(nn.Module):
    """The published code of FLUX, written down plainly: one module in place of all blocks."""

    def __init__(self, blocks: Sequence[Any], steps: int, threshold: float, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.blocks, self.steps, self.threshold = list(blocks), steps, threshold
        self.rescale = np.poly1d(coefficients)
        self.count, self.sum, self.ran = 0, 0.0, list[bool]()
        self.before: Any = None
        self.residual: Any = None

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, temb: Any, **others: Any) -> Any:
        modulated = self.blocks[0].norm1(hidden_states, emb=temb)[0]
        computes = self.count in (0, self.steps - 1)
        if not computes:
            change = (modulated - self.before).abs().mean() / self.before.abs().mean()
            self.sum += self.rescale(change.item())
            computes = self.sum >= self.threshold
        self.before, self.count = modulated, self.count + 1
        self.ran.append(bool(computes))
        if not computes:
            return encoder_hidden_states, hidden_states + self.residual
        self.sum = 0.0
        text, picture = encoder_hidden_states, hidden_states
        for block in self.blocks:
            text, picture = block(hidden_states=picture, encoder_hidden_states=text, temb=temb, **others)
        self.residual = picture - hidden_states
        return text, picture


@pytest.mark.parametrize(
    ("threshold", "coefficients"),
    [(0.05, STRAIGHT), (0.25, STRAIGHT), (0.6, STRAIGHT), (0.3, FLUX), (0.8, FLUX), (0.05, (-20.0, 3.0, -0.01))],
)
def test_it_is_the_published_algorithm(threshold: float, coefficients: tuple[float, ...]) -> None:
    ours, theirs, steps = Pipe("flux"), Pipe("flux"), 16
    blocks = [*theirs.model.transformer_blocks, *theirs.model.single_transformer_blocks]
    published = Published(blocks, steps, threshold, coefficients)
    theirs.model.transformer_blocks = nn.ModuleList([published])
    theirs.model.single_transformer_blocks = nn.ModuleList()
    technique = TeaCache(threshold=threshold, coefficients=coefficients)
    with torch.no_grad(), accelerate(ours, technique) as session:
        outputs = repeat(ours, steps, *drifting(ours, steps, 0.01))
        ran = next(iter(session.evidence()[technique].step_map.values()))
    with torch.no_grad():
        expected = repeat(theirs, steps, *drifting(theirs, steps, 0.01))
    assert list(ran) == published.ran
    assert 2 <= sum(ran) < steps
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs, expected, strict=True))


def computed(pipe: Pipe, technique: TeaCache, calls: Sequence[Arguments]) -> tuple[bool, ...]:
    with torch.no_grad(), accelerate(pipe, technique) as session:
        repeat(pipe, len(calls), *calls)
        return next(iter(session.evidence()[technique].step_map.values()))


def test_first_and_last_steps_are_computed_as_published_or_as_told() -> None:
    pipe = Pipe("flux")
    still = [pipe.arguments()] * 8
    assert computed(pipe, TeaCache(coefficients=STRAIGHT), still) == (True, *[False] * 6, True)
    told = TeaCache(coefficients=STRAIGHT, first=3, last=2)
    assert computed(pipe, told, still) == (True, True, True, False, False, False, True, True)
    retained = TeaCache(coefficients="Wan2.1-T2V-1.3B", threshold=0.2)
    wan = Pipe("wan")
    calls = [wan.arguments() | {"timestep": torch.full((1,), 900.5)}] * 8
    assert computed(wan, retained, calls) == (True, True, True, True, True, False, False, False)


def test_the_sample_whose_changes_add_up_fastest_decides() -> None:
    pipe, technique = Pipe("flux"), TeaCache(threshold=0.2, coefficients=STRAIGHT)
    fast = drifting(pipe, 10, 0.02)
    still = [fast[0]] * 10
    both = [stacked(a, b) for a, b in zip(still, fast, strict=True)]
    alone = computed(pipe, technique, fast)
    assert computed(pipe, technique, both) == alone
    assert 2 < sum(alone) < 10


def stacked(*parts: Arguments) -> Arguments:
    batched = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
    return {k: torch.cat([part[k] for part in parts]) if k in batched else parts[0][k] for k in parts[0]}


def test_a_threshold_of_zero_is_the_plain_model() -> None:
    """Even where the polynomial predicts a negative change."""
    pipe, off = Pipe("flux"), TeaCache(threshold=0.0, coefficients=(0.0, -1.0))
    calls = drifting(pipe, 4, 0.01)
    with torch.no_grad():
        plain = repeat(pipe, 4, *calls)
        with accelerate(pipe, off):
            assert equal(repeat(pipe, 4, *calls), plain)


def test_nan_computes() -> None:
    pipe = Pipe("flux")
    broken = pipe.arguments()
    broken["hidden_states"][0, 0, 0] = float("nan")
    with (
        torch.no_grad(),
        accelerate(pipe, TeaCache(coefficients=STRAIGHT)) as session,
        executed(pipe.model, type(pipe.model.single_transformer_blocks[-1])) as names,
    ):
        repeat(pipe, 4, broken)
        assert len(names) == 4 * len(pipe.model.single_transformer_blocks)
        assert session.state(session.recipe.techniques[0], Statistics).reused == 0


def test_the_polynomial_is_not_extrapolated_beyond_a_known_range() -> None:
    published = TEACACHE.shipped["FLUX.1-dev"]
    free, bound = Polynomial(published), Polynomial(published.model_copy(update={"range": (0.1, 0.2)}))
    assert free(0.15) == pytest.approx(float(np.polyval(FLUX, 0.15))) == bound(0.15)
    assert bound(5.0) == free(0.2)
    assert bound(0.0) == free(0.1)
    assert np.isnan(bound(float("nan")))


def test_wan_decides_without_regard_to_picture_and_prompt() -> None:
    pipe, technique = Pipe("wan"), TeaCache(threshold=0.5, coefficients=STRAIGHT)
    maps: list[tuple[bool, ...]] = []
    for seed in (0, 1):
        calls = [pipe.arguments(seed) | {"timestep": torch.full((1,), 900.5 - 40 * step)} for step in range(12)]
        maps.append(computed(pipe, technique, calls))
    assert maps[0] == maps[1]
    assert 2 < sum(maps[0]) < 12


def test_on_a_unet_the_first_layer_decides_and_the_deep_feature_is_reused() -> None:
    pipe, technique = Pipe("stable_diffusion"), TeaCache(threshold=0.3, coefficients=STRAIGHT)
    start, end = pipe.arguments(0), pipe.arguments(1)["sample"]
    calls = [start | {"sample": start["sample"] + 0.03 * step**1.5 * end} for step in range(12)]
    with executed(pipe.model, type(pipe.model.mid_block)) as ran:
        found = computed(pipe, technique, calls)
    assert len(ran) == sum(found)
    assert 2 < sum(found) < 12


@pytest.mark.parametrize(
    ("architecture", "coefficients", "sentence"),
    [
        ("flux", "auto", "There are no TeaCache coefficients for this FluxTransformer2DModel; measure them with"),
        ("flux", "CogVideoX-2b", "were fitted to the time embedding; here the modulated input is compared."),
        ("wan", "Wan2.1-T2V-14B-time-embedding", "were fitted to the time embedding; here"),
        ("stable_diffusion", "FLUX.1-dev", "were fitted to the modulated input; here the first layer's output is"),
        ("flux", "emoji-sd", "were fitted to the first layer; here the modulated input is compared."),
        ("flux", "FLUX.1-def", "Did you mean FLUX.1-dev"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(architecture: str, coefficients: str, sentence: str) -> None:
    rig = make(architecture)
    with pytest.raises(Refused) as caught:
        accelerate(rig, TeaCache(coefficients=coefficients))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("model", ["FLUX.1-dev", "Wan2.1-T2V-1.3B"])
def test_published_models_need_no_settings(model: str) -> None:
    assert not list(TeaCache().problems(Target.planned(model)))


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    pipe = Pipe("flux")
    pipe.model.compile(backend="eager")
    (reason,) = TeaCache(coefficients=STRAIGHT).problems(Target.of(pipe))
    assert "compile its blocks instead" in reason


def test_a_file_is_read_once_when_applied(tmp_path: Path) -> None:
    pipe, file = Pipe("flux"), tmp_path / "own.json"
    one = {"models": [], "coefficients": [1.0, 0.0], "provenance": {"by": "a test"}}
    file.write_text(json.dumps({"schema": 1, "kind": "teacache", "sets": {"mine": one}}))
    technique = TeaCache(threshold=9.0, coefficients=str(file))
    with torch.no_grad(), accelerate(pipe, technique) as session:
        file.unlink()
        for _ in range(2):
            repeat(pipe, 4, pipe.arguments())
        assert session.evidence()[technique].reused_steps == 4


def test_no_coefficients_are_an_error() -> None:
    for nothing in ((), ""):
        with pytest.raises(InvalidSetting, match="at least one number"):
            TeaCache(coefficients=nothing)


def test_every_architecture_is_covered() -> None:
    for name in specs():
        assert not list(TeaCache(coefficients=STRAIGHT).problems(Target.of(make(name))))
