"""TaylorSeer against the published formulas written out by hand, and everything that must make it compute."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from by_hand import branch_outputs, dit_by_hand, flux_by_hand
from cache_harness import Pipe, equal, repeat, sample
from torch.utils._pytree import tree_map

from hasten.cache.engine.branches import parts
from hasten.cache.engine.statistics import Statistics
from hasten.cache.engine.taylor import Taylor
from hasten.cache.engine.values import size_in_bytes
from hasten.cache.taylor_seer import TaylorSeer
from hasten.core.clock import Moment
from hasten.core.errors import NotEngaged, Refused
from hasten.core.registry import specs
from hasten.core.session import Session, accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from tests.contract.rigs import make

PARTS = {"dit": ("attn1", "ff"), "flux": ("attn", "ff", "ff_context", "proj_out")}
TRANSFORMERS = [name for name, spec in specs().items() if spec.stacks]


def step_map(session: Session) -> tuple[bool, ...]:
    (evidence,) = session.evidence().values()
    (steps,) = evidence.step_map.values()
    return steps


def literal(values: list[float], steps: list[int], at: int, order: int) -> float:
    """The published procedure: factors are renewed at each full step from those of the full step before."""
    factors: list[float] = []
    before = 0
    for value, step in zip(values, steps, strict=True):
        renewed = [value]
        for known in factors[:order]:
            renewed.append((renewed[-1] - known) / (step - before))
        factors, before = renewed, step
    scales = [1.0, 1.0, 1 / 2, 1 / 6]
    return sum(f * (at - before) ** i * scales[i] for i, f in enumerate(factors))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_forecast_is_the_published_series(order: int) -> None:
    steps, values = [0, 1, 2, 6, 10, 13], [3.0, -1.0, 0.5, 2.0, 7.0, -4.0]
    series = Taylor(order, begin=0)
    for count in range(1, len(steps) + 1):
        kept = list(zip(steps, values, strict=True))[:count][-series.snapshots :]
        weights = series.weights([Moment(0, step, "") for step, _ in kept], Moment(0, steps[count - 1] + 3, ""))
        ours = sum(w * value for w, (_, value) in zip(weights, kept, strict=True))
        assert ours == pytest.approx(literal(values[:count], steps[:count], steps[count - 1] + 3, order))


@pytest.mark.parametrize("architecture", ["dit", "flux"])
def test_a_forecast_step_goes_on_along_the_line_of_every_branch(architecture: str) -> None:
    pipe = Pipe(architecture)
    one, two, later = (pipe.arguments(seed) for seed in range(3))
    by_hand: Any = {"dit": dit_by_hand, "flux": flux_by_hand}[architecture]
    with torch.no_grad():
        before, after = (branch_outputs(pipe.model, PARTS[architecture], given) for given in (one, two))
        ahead = {path: tree_map(lambda a, b: 3 * b - 2 * a, before[path], after[path]) for path in after}
        expected = by_hand(pipe.model, later, ahead)
    with accelerate(pipe, TaylorSeer(interval=9, warm_up=2)):
        forecast = repeat(pipe, 4, one, two, later)[3]  # two steps after the second computed one
    torch.testing.assert_close(forecast, expected, atol=1e-5, rtol=1e-4)


def test_whole_outputs_are_forecast_along_a_line() -> None:
    pipe = Pipe("dit")
    one, two = pipe.arguments(1), pipe.arguments(2)
    with torch.no_grad():
        before, after = (pipe.model(**given)[0] for given in (one, two))
    with accelerate(pipe, TaylorSeer(interval=9, warm_up=2, forecast="output")):
        outputs = repeat(pipe, 4, one, two)
    torch.testing.assert_close(outputs[2:], [2 * after - before, 3 * after - 2 * before])


def test_what_all_blocks_add_is_forecast_along_a_line() -> None:
    """Frozen but for the last layers: FLUX's output layers see the stream after the blocks, forecast."""
    pipe = Pipe("flux")
    one, two = pipe.arguments(1), pipe.arguments(2)
    seen: list[torch.Tensor] = []
    pipe.model.norm_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with accelerate(pipe, TaylorSeer(interval=9, warm_up=2, forecast="residual")):
        repeat(pipe, 3, one, two)
    with torch.no_grad():
        entered = [pipe.model.x_embedder(given["hidden_states"]) for given in (one, two)]
    expected = 2 * seen[1] - seen[0] - (entered[1] - entered[0])
    torch.testing.assert_close(seen[2], expected, atol=1e-5, rtol=1e-4)


def test_a_u_net_forecasts_its_deep_feature() -> None:
    pipe = Pipe("stable_diffusion")
    with accelerate(pipe, TaylorSeer(interval=3, warm_up=2, forecast="residual")) as session:
        line = sample(pipe, 6, pipe.arguments(1))
        assert step_map(session) == (True, True, False, False, True, False)
    with accelerate(pipe, TaylorSeer(interval=3, warm_up=2, order=0, forecast="residual")):
        held = sample(pipe, 6, pipe.arguments(1))
    assert not equal(line, held)


@pytest.mark.parametrize(
    ("interval", "warm_up", "computed"),
    [(6, 3, (0, 1, 2, 8, 14)), (5, 1, (0, 5, 10, 15)), (4, 2, (0, 1, 5, 9, 13)), (1, 3, tuple(range(16)))],
)
def test_the_schedule_is_the_published_one(interval: int, warm_up: int, computed: tuple[int, ...]) -> None:
    pipe = Pipe("dit")
    with accelerate(pipe, TaylorSeer(interval=interval, warm_up=warm_up)) as session:
        repeat(pipe, 16, pipe.arguments())
        assert step_map(session) == tuple(step in computed for step in range(16))


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_no_branch_runs_in_a_forecast_step(architecture: str) -> None:
    """Also where attention is called attn1 and attn2: a pattern of names that finds nothing would forecast nothing."""
    rig, ran = make(architecture), list[str]()
    intercepted = list(parts(Target.of(rig).denoisers[0]))
    for module, _ in intercepted:
        module.register_forward_hook(lambda module, *_: ran.append(type(module).__name__))
    with rig.accelerated(TaylorSeer(interval=2, warm_up=1)) as session:
        rig.run(steps=4)
        (evidence,) = session.evidence().values()
    blocks = sum(len(rig.denoiser.get_submodule(stack.path)) for stack in rig.spec.stacks)  # pyright: ignore
    assert len(intercepted) >= 2 * blocks or architecture == "flux"
    assert evidence.full_steps == evidence.reused_steps
    assert len(ran) == (evidence.full_steps or 0) * len(intercepted)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_memory_is_stated_beforehand_and_measured(order: int) -> None:
    pipe = Pipe("flux")
    technique = TaylorSeer(interval=3, warm_up=3, order=order)
    stated = technique.cost(Target.of(pipe), Workload(width=128, height=128, max_sequence_length=8)).extra_bytes
    with accelerate(pipe, technique) as session:
        repeat(pipe, 8, pipe.arguments())
        held = session.state(technique, Statistics).most_bytes
        assert f"held {held / 2**20:.3g} MiB" in session.evidence()[technique].summary
    assert held * (order + 2 if order else 1) == stated * (order + 1), "a forecast is one value more for the moment"


def test_values_are_kept_as_they_are_not_as_differences() -> None:
    series = Taylor(2)
    value = [torch.ones(2, dtype=torch.bfloat16)]
    assert series.encode(value, Moment(0, 0, ""), {}) is value
    assert series.snapshots * size_in_bytes(value) == 3 * 4


def test_a_sampler_that_adds_noise_is_refused() -> None:
    pipe = Pipe("dit")
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()  # pyright: ignore
    pipe.components["scheduler"] = pipe.scheduler
    with pytest.raises(Refused, match="EulerAncestralDiscreteScheduler adds noise at each step"):
        accelerate(pipe, TaylorSeer())
    with accelerate(pipe, TaylorSeer(order=0)) as session:
        repeat(pipe, 8, pipe.arguments())
        assert False in step_map(session)


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(Refused, match='forecast="residual" forecasts its deep feature'):
        accelerate(Pipe("stable_diffusion"), TaylorSeer())


def test_a_sampler_that_turns_out_to_add_noise_is_computed_and_counted() -> None:
    pipe = Pipe("dit")
    technique = TaylorSeer(interval=2, warm_up=1)
    with accelerate(pipe, technique) as session:
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()  # pyright: ignore
        sample(pipe, 6, pipe.arguments())
        with pytest.raises(NotEngaged, match="3 were computed because the sampler adds noise at each step"):
            session.evidence()
