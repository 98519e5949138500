"""Step masks against the published tables, and StepMask: a fixed pattern that costs nothing to decide."""

from __future__ import annotations

import ast
import copy
import importlib.util
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from hasten.cache.engine.history import Snapshot
from hasten.cache.engine.masks import PRESETS, computes, mask_for
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.runner import Runner
from hasten.cache.step_mask import StepMask
from hasten.core.clock import Moment
from hasten.core.errors import InvalidSetting, Refused
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from tests.cache.drive import frozen, ran_of
from tests.contract.rigs import make

PUBLISHED = {
    ("slow", 28): "1111111101110011100110010001",
    ("medium", 28): "1111110110001100011000110001",
    ("fast", 28): "1111110100010000100000100001",
    ("ultra", 28): "1111001000001000000100000001",
    ("fast", 9): "111101001",
    ("ultra", 8): "11001001",
    ("medium", 4): "1101",
    ("slow", 6): "111001",
}


def written(mask: tuple[bool, ...] | None) -> str:
    assert mask is not None
    return "".join(str(int(full)) for full in mask)


@pytest.mark.parametrize(("name", "steps"), PUBLISHED)
def test_presets_are_the_published_ones(name: str, steps: int) -> None:
    assert written(mask_for(name, steps)) == PUBLISHED[name, steps]


def test_other_step_counts_are_as_the_published_code_makes_them() -> None:
    """Runs cache-dit's own function, without importing the package, where it is installed."""
    spec = importlib.util.find_spec("cache_dit")
    if spec is None or spec.origin is None:
        pytest.skip("cache-dit is not installed")
    source = Path(spec.origin).parent / "caching" / "cache_interface.py"
    wanted = [n for n in ast.parse(source.read_text("utf-8")).body if getattr(n, "name", "").endswith("steps_mask")]
    names: dict[str, Any] = {"copy": copy, "Optional": Optional, "List": list}
    exec(compile(ast.Module(wanted, []), str(source), "exec"), names)
    for steps in (4, 6, *range(8, 101)):
        for preset in PRESETS:
            theirs = names["steps_mask"](total_steps=steps, mask_policy=preset)
            assert written(mask_for(preset, steps)) == "".join(map(str, theirs)), (preset, steps)


@pytest.mark.parametrize("steps", [*range(8, 61), 100, 250])
def test_presets_cover_every_step_count(steps: int) -> None:
    full = {preset: sum(mask_for(preset, steps) or ()) for preset in PRESETS}
    for preset in PRESETS:
        mask = mask_for(preset, steps)
        assert mask is not None
        assert (len(mask), mask[0], mask[-1]) == (steps, True, True)
    assert full["slow"] > full["medium"] > full["fast"] > full["ultra"]


@pytest.mark.parametrize("steps", [1, 3, 5, 7, None])
def test_without_a_published_mask_everything_is_computed(steps: int | None) -> None:
    assert all(computes("ultra")(step, steps) for step in range(steps or 9))


def test_a_written_mask_computes_beyond_its_end() -> None:
    assert [computes("1001")(step, 6) for step in range(6)] == [True, False, False, True, True, True]


@pytest.mark.parametrize("mask", ["", "12", "fastt", "1 0"])
def test_a_mask_that_is_none_is_refused_with_the_choices(mask: str) -> None:
    with pytest.raises(InvalidSetting, match="such as '1101'"):
        StepMask(mask=mask)


@pytest.mark.parametrize("architecture", ["flux", "dit", "stable_diffusion", "sdxl", "wan"])
def test_it_computes_exactly_the_steps_of_its_mask(architecture: str) -> None:
    rig = make(architecture)
    technique = StepMask(mask="1101001")
    with rig.accelerated(technique) as session:
        rig.run(steps=9)
        assert set(session.evidence()[technique].step_map.values()) == {tuple(c == "1" for c in "110100111")}


@pytest.mark.parametrize("front", [0, 1, 3])
@pytest.mark.parametrize("architecture", ["flux", "dit", "stable_diffusion", "sdxl"])
def test_a_reused_step_with_the_same_input_equals_the_full_one(architecture: str, front: int) -> None:
    rig = make(architecture)
    plain = frozen(rig, 1)[0]
    with rig.accelerated(StepMask(mask="1000", front=front)):
        outputs = frozen(rig, 4)
    assert all(torch.allclose(output, plain, atol=1e-5) for output in outputs)


def test_the_blocks_in_front_and_back_run_and_no_others() -> None:
    rig = make("flux")
    technique = StepMask(mask="10", front=2, back=1)
    with ran_of(rig, "transformer_blocks", "single_transformer_blocks") as ran, rig.accelerated(technique):
        frozen(rig, 2)
    assert ran == [6, 3]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_straight_line_is_forecast_exactly_unless_held(order: int) -> None:
    guess = StepMask(order=order).guess()
    kept = [Snapshot(Moment(0, step, ""), torch.tensor([2.0, -1.0]) * step + 1) for step in (3, 5, 8)]
    value = guess.guess(kept[-guess.snapshots :], Moment(0, 10, ""), {})
    assert torch.allclose(value, torch.tensor([2.0, -1.0]) * (10 if order else 8) + 1)


def test_the_second_order_is_the_published_one() -> None:
    """With window 2 at steps 4, 6, 8: D1 = (y8-y6)/2, D2 = (D1 - (y6-y4)/2)/2, and D0 + D1*k + D2*k^2/2."""
    weights = StepMask(order=2).guess().weights([Moment(0, step, "") for step in (4, 6, 8)], Moment(0, 9, ""))
    values = (1.0, 7.0, 19.0)
    d1, before = (19.0 - 7.0) / 2, (7.0 - 1.0) / 2
    expected = 19.0 + d1 + (d1 - before) / 2 / 2
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(expected)


def test_no_difference_is_taken_at_the_first_two_steps() -> None:
    guess = StepMask(order=2).guess()
    assert guess.weights([Moment(0, 0, ""), Moment(0, 1, "")], Moment(0, 2, "")) == (0.0, 1.0)
    weights = guess.weights([Moment(0, step, "") for step in (0, 1, 2)], Moment(0, 3, ""))
    assert weights == pytest.approx((0.0, -1.0, 2.0))


def test_deciding_does_no_tensor_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, technique = make("dit"), StepMask(mask="10")
    (denoiser,) = Target.of(rig).denoisers
    policy = technique.policy(denoiser)
    assert policy.looks_at == "nothing"
    assert not technique.waits()
    monkeypatch.setattr(Policy, "observe", lambda *_: pytest.fail("looked at a tensor"))
    monkeypatch.setattr(Runner, "_judge", lambda *_, **__: pytest.fail("asked in mid-call"))
    with rig.accelerated(technique):
        rig.run()


def test_the_cost_is_known_beforehand() -> None:
    target = Target.of(make("dit"))
    costs = [StepMask(mask=preset).cost(target, Workload(steps=28)) for preset in ("slow", "ultra")]
    shares = [sum(mask_for(preset, 28) or ()) / 28 for preset in ("slow", "ultra")]
    for cost, share in zip(costs, shares, strict=True):
        assert cost.time_factor is not None
        assert share < cost.time_factor < share + (1 - share) / 2
    first_order = StepMask(order=1).cost(target, Workload(steps=28))
    assert first_order.extra_bytes == 3 * costs[0].extra_bytes > 0, "two values and the forecast made of them"


def test_refusals_name_the_largest_front() -> None:
    with pytest.raises(Refused, match="the largest front that works here is 5"):
        accelerate(make("flux"), StepMask(front=6))
    with pytest.raises(Refused, match="the largest front that works here is 4"):
        accelerate(make("flux"), StepMask(front=6, back=1))
    with pytest.raises(Refused, match="the largest front that works here is 8"):
        accelerate(make("sdxl"), StepMask(front=9))
    with pytest.raises(Refused, match="set back=0"):
        accelerate(make("sdxl"), StepMask(back=1))
