"""The clock: request, step and branch of every call, whatever scheduler, guidance and interruption."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch import nn

from hasten.cache import FirstBlockCache
from hasten.core.clock import MOST_CALLS, Moment
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from tests.contract.rigs import make
from tests.core.stand_ins import Network, Pipeline, branches_of, requests_of, sized_flux, steps_of, watched

SCHEDULERS: tuple[type[Any], ...] = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    LCMScheduler,
    HeunDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
EARLY = (EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler, FlowMatchEulerDiscreteScheduler)


def euler() -> Pipeline:
    return Pipeline(FlowMatchEulerDiscreteScheduler())


def keys(moments: list[Moment]) -> list[tuple[int, str]]:
    """What a cache remembers results under."""
    return [(moment.request, moment.branch) for moment in moments]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_step_for_each_step_of_the_scheduler(kind: type[Any], steps: int) -> None:
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        for _ in range(2):
            pipeline.request(steps)
    count = len(pipeline.scheduler.timesteps)
    assert steps_of(moments) == [*range(count)] * 2
    assert requests_of(moments) == [0] * count + [1] * count
    assert {moment.steps for moment in moments} == {count}
    assert [moment.first for moment in moments] == ([True] + [False] * (count - 1)) * 2
    assert [moment.last for moment in moments] == ([False] * (count - 1) + [True]) * 2
    assert set(branches_of(moments)) == {"call 1"}


def test_the_steps_of_pndm_with_and_without_its_preliminary_ones() -> None:
    for skipping, count in ((True, 6), (False, 14)):
        pipeline = Pipeline(PNDMScheduler(skip_prk_steps=skipping))
        with watched(pipeline) as moments:
            pipeline.request(5, calls=2)
        assert steps_of(moments) == [step for step in range(count) for _ in range(2)]
        assert moments[-1].last
        assert requests_of(moments) == [0] * 2 * count


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULERS if kind not in (DDIMScheduler, LCMScheduler)])
def test_noise_levels_are_the_schedulers(kind: type[Any]) -> None:
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        pipeline.request(4)
    expected = pipeline.scheduler.sigmas.tolist()[: len(moments)]
    assert [moment.sigma for moment in moments] == expected


def test_without_a_schedulers_own_noise_levels_those_of_the_input_count() -> None:
    pipeline = Pipeline(DDIMScheduler())
    with watched(pipeline) as moments:
        pipeline.request(3)
    remaining = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps].double()
    assert [moment.sigma for moment in moments] == pytest.approx((1 - remaining).sqrt().tolist(), abs=1e-12)


class Own(EulerDiscreteScheduler):
    """A scheduler of which nothing is known, since its steps are its own, and which keeps no sigmas."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        del self.sigmas

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        return (sample - model_output,)

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        return sample


def test_without_noise_levels_there_are_none() -> None:
    pipeline = Pipeline(Own())
    with watched(pipeline) as moments:
        pipeline.request(3)
    assert {(moment.sigma, moment.level) for moment in moments} == {(None, None)}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_two_calls_a_step_are_two_branches(kind: type[Any]) -> None:
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        pipeline.request(3, calls=2)
    count = len(pipeline.scheduler.timesteps)
    assert branches_of(moments) == ["call 1", "call 2"] * count
    assert steps_of(moments) == [step for step in range(count) for _ in range(2)]


def test_a_context_names_the_branch() -> None:
    pipeline = euler()
    with watched(pipeline) as moments:
        pipeline.request(2, contexts=("cond", "uncond"))
        pipeline.request(2, contexts=("uncond", "cond"))
    assert branches_of(moments) == ["cond", "uncond"] * 2 + ["uncond", "cond"] * 2
    assert steps_of(moments) == [0, 0, 1, 1] * 2


def test_several_calls_in_one_context_are_kept_apart() -> None:
    pipeline = euler()
    with watched(pipeline) as moments:
        pipeline.request(2, contexts=("cond", "cond", "uncond"))
    assert branches_of(moments) == ["cond", "cond, call 2", "uncond"] * 2


def test_contexts_nest_and_survive_exceptions() -> None:
    pipeline, given = euler(), (torch.ones(1), torch.tensor(1.0))
    network = pipeline.denoiser
    with watched(pipeline) as moments:
        pipeline.scheduler.set_timesteps(3)
        with network.cache_context("outer"):
            with network.cache_context("inner"):
                network(*given)
            network(*given)
            with pytest.raises(ValueError, match="mid"), network.cache_context("inner"):
                raise ValueError("mid")
            network(*given)
        network(*given)
    assert branches_of(moments) == ["inner", "outer", "outer, call 2", "call 1"]


def test_a_context_is_passed_on_to_diffusers() -> None:
    network = Network()
    with watched(Pipeline(DDIMScheduler(), unet=network)), network.cache_context(name="cond"):
        pass
    assert type(network) is Network


def test_a_real_pipeline_with_two_guidance_branches() -> None:
    pipeline = flux_pipeline()
    with watched(pipeline) as moments:
        for steps in (3, 2):
            pipeline(**flux_request(steps), true_cfg_scale=2.0)
    assert branches_of(moments) == ["cond", "uncond"] * 5
    assert steps_of(moments) == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert requests_of(moments) == [0] * 6 + [1] * 4
    assert [moment.last for moment in moments] == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2


def flux_pipeline() -> Any:
    rig = make("flux")
    build: Any = FluxPipeline
    pipeline = build(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=rig.vae, transformer=rig.denoiser,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_request(steps: int) -> dict[str, Any]:
    text, pooled = torch.ones(1, 3, 32), torch.ones(1, 32)
    return {
        "prompt_embeds": text, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": -text,
        "negative_pooled_prompt_embeds": -pooled, "height": 16, "width": 16, "num_inference_steps": steps,
        "output_type": "latent", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip


@pytest.mark.parametrize("kind", EARLY)
def test_image_to_image_counts_from_where_it_begins(kind: type[Any]) -> None:
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        pipeline.request(10, begin=6)
        pipeline.request(3)
    assert steps_of(moments) == [0, 1, 2, 3, 0, 1, 2]
    assert [moment.steps for moment in moments] == [4] * 4 + [3] * 3
    assert [moment.last for moment in moments] == [False] * 3 + [True] + [False] * 2 + [True]
    if hasattr(pipeline.scheduler, "sigmas"):
        pipeline.scheduler.set_timesteps(10)
        assert moments[0].sigma == pipeline.scheduler.sigmas[6].item()


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
@pytest.mark.parametrize("contexts", [(), ("cond", "uncond")])
def test_an_abandoned_request_does_not_reach_into_the_next(stop_at: int, contexts: tuple[str, ...]) -> None:
    pipeline = euler()
    with watched(pipeline) as moments:
        pipeline.request(4, contexts=contexts, stop_at=stop_at)
        before = set(keys(moments))
        moments.clear()
        pipeline.request(4, contexts=contexts)
    assert not before & set(keys(moments))
    assert moments[0].first
    assert moments[-1].last


@pytest.mark.parametrize("stop_at", [None, 0, 1, 2])
@pytest.mark.parametrize("contexts", [(), ("cond", "uncond")])
def test_a_replaced_scheduler_is_followed(stop_at: int | None, contexts: tuple[str, ...]) -> None:
    pipeline = euler()
    first, second = pipeline.scheduler, EulerDiscreteScheduler()
    with watched(pipeline) as moments:
        for scheduler in (first, second, first, second):
            pipeline.scheduler = scheduler
            before = set(keys(moments))
            moments.clear()
            pipeline.request(3, contexts=contexts, stop_at=stop_at)
            assert not before & set(keys(moments))
            moments.clear()
            pipeline.request(3, contexts=contexts)
            assert steps_of(moments)[:: len(contexts) or 1] == [0, 1, 2]
            assert moments[-1].last
    assert type(second) is EulerDiscreteScheduler
    assert type(first) is FlowMatchEulerDiscreteScheduler


def test_the_former_scheduler_no_longer_counts() -> None:
    pipeline, other = euler(), FlowMatchEulerDiscreteScheduler()
    former, pipeline.scheduler = pipeline.scheduler, other
    with watched(pipeline) as moments:
        pipeline.scheduler = former
        pipeline.request(2)
        moments.clear()
        other.set_timesteps(3)
        pipeline.request(2)
        assert steps_of(moments) == [0, 1]


class HandMade:
    """A scheduler of one's own, without the methods that the clock watches."""

    timesteps = torch.tensor([900.0, 600.0, 300.0])


def test_a_scheduler_that_cannot_be_watched_leaves_the_timesteps() -> None:
    pipeline = euler()
    with watched(pipeline) as moments:
        pipeline.request(3, stop_at=2)
        before = set(keys(moments))
        moments.clear()
        pipeline.scheduler = HandMade()
        for timestep in HandMade.timesteps:
            pipeline.denoiser(torch.ones(1), timestep)
    assert steps_of(moments) == [0, 1, 2]
    assert not before & set(keys(moments))
    assert {moment.steps for moment in moments} == {None}
    with watched(pipeline) as moments:
        pipeline.denoiser(torch.ones(1), HandMade.timesteps[0])
    assert steps_of(moments) == [0]


def bare(network: nn.Module, *timesteps: float, calls: int = 1) -> None:
    for timestep in timesteps:
        for _ in range(calls):
            network(torch.ones(1), torch.tensor([timestep]))


@pytest.mark.parametrize("timesteps", [(999.0, 600.0, 200.0), (0.0, 0.4, 0.9)], ids=["falling", "rising"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_bare_denoiser_is_told_by_its_timesteps(timesteps: tuple[float, ...], calls: int) -> None:
    network = Network()
    with watched(network) as moments:
        for _ in range(3):
            bare(network, *timesteps, calls=calls)
    assert steps_of(moments) == [step for step in range(3) for _ in range(calls)] * 3
    assert requests_of(moments) == [request for request in range(3) for _ in range(3 * calls)]
    assert branches_of(moments) == [f"call {call + 1}" for call in range(calls)] * 9


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(2, 6), st.integers(1, 3)), min_size=1, max_size=6))
def test_a_bare_denoiser_in_any_sequence_of_whole_requests(sizes: list[tuple[int, int]]) -> None:
    network, expected = Network(), list[tuple[int, int, str]]()
    with watched(network) as moments:
        for request, (steps, calls) in enumerate(sizes):
            bare(network, *(999.0 * (1 - step / steps) for step in range(steps)), calls=calls)
            expected += [(request, step, f"call {call + 1}") for step in range(steps) for call in range(calls)]
    assert list(zip(requests_of(moments), steps_of(moments), branches_of(moments), strict=True)) == expected


def test_a_bare_denoiser_with_a_plain_number_as_timestep() -> None:
    network = Network()
    with watched(network) as moments:
        for timestep in (5, 3, 1, 5, 3):
            network(torch.ones(1), timestep=timestep)
    assert requests_of(moments) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("context", ["", "cond"])
def test_single_steps_one_after_the_other_never_share(context: str) -> None:
    network = Network()
    with watched(network) as moments:
        for _ in range(11):
            with network.cache_context(context):
                bare(network, 999.0)
    assert len(set(keys(moments))) == 11


def test_single_steps_of_a_pipeline_never_share() -> None:
    pipeline = euler()
    with watched(pipeline) as moments:
        for _ in range(5):
            pipeline.request(1, contexts=("cond", "uncond"))
    assert len(set(keys(moments))) == 10
    assert all(moment.first and moment.last for moment in moments)


def test_a_loop_that_does_not_step_the_scheduler_is_told_by_its_timesteps() -> None:
    pipeline = euler()
    for context in ("", "cond"):
        with watched(pipeline) as moments:
            pipeline.scheduler.set_timesteps(4)
            for timestep in pipeline.scheduler.timesteps:
                with pipeline.denoiser.cache_context(context):
                    pipeline.denoiser(torch.ones(1), timestep)
        assert len(set(keys(moments))) <= 2
        assert steps_of(moments)[1:] == [0, 1, 2]


def test_a_loop_on_another_device_without_steps_is_noticed_in_the_end() -> None:
    pipeline, timestep = euler(), torch.empty(1, device="meta")
    with watched(pipeline) as moments:
        pipeline.scheduler.set_timesteps(4)
        for _ in range(MOST_CALLS):
            pipeline.denoiser(torch.ones(1), timestep)
        pipeline.denoiser(torch.ones(1), torch.tensor(7.0))
    assert len(set(keys(moments))) == MOST_CALLS + 1
    assert requests_of(moments)[-1] == 1


def test_more_calls_than_steps_begin_anew() -> None:
    pipeline = euler()
    with watched(pipeline) as moments:
        pipeline.request(2)
        bare(pipeline.denoiser, 900.0, 500.0)
    assert requests_of(moments) == [0, 0, 1, 1]
    assert steps_of(moments) == [0, 1, 0, 1]


def test_two_denoisers_share_the_steps() -> None:
    pipeline = Pipeline(FlowMatchEulerDiscreteScheduler(), transformer=Network(), transformer_2=Network())
    early, late = pipeline.networks.values()
    with watched(pipeline) as moments:
        pipeline.scheduler.set_timesteps(4)
        sample = torch.ones(1, 4, 4, 4)
        for index, timestep in enumerate(pipeline.scheduler.timesteps):
            output = torch.empty(0)
            for _ in range(2):
                output = (early if index < 2 else late)(sample, timestep)[0]
            sample = pipeline.scheduler.step(output, timestep, sample, return_dict=False)[0]
    assert steps_of(moments) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert branches_of(moments) == ["call 1", "call 2"] * 4
    assert requests_of(moments) == [0] * 8


def test_a_denoiser_without_a_timestep_never_repeats_a_moment() -> None:
    network = nn.Linear(2, 2)
    with watched(network) as moments:
        for _ in range(9):
            network(torch.ones(1, 2))
    assert len(set(keys(moments))) == 9


def test_the_clock_leaves_nothing_behind() -> None:
    pipeline = euler()
    before = [dict(vars(pipeline.scheduler)), dict(vars(pipeline.denoiser))]
    with watched(pipeline):
        assert type(pipeline.scheduler) is not FlowMatchEulerDiscreteScheduler
    assert [vars(pipeline.scheduler), vars(pipeline.denoiser)] == before
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert type(pipeline.denoiser) is Network


@dataclass(frozen=True)
class Request:
    """One request to a pipeline, as the state machine draws them."""

    steps: int
    contexts: tuple[str, ...]
    calls: int
    prompt: int
    stop_at: int | None
    scheduler: int


class Cached:
    """A small FLUX with FirstBlockCache at a threshold that reuses whenever it may."""

    def __init__(self) -> None:
        self.rig = sized_flux(1, 1)
        self.schedulers = (self.rig.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.computed: list[bool] = []
        self.rig.denoiser.get_submodule("single_transformer_blocks.0").register_forward_hook(self._note)
        self.session = accelerate(self.rig, FirstBlockCache(threshold=1e30))

    def _note(self, *_: object) -> None:
        self.computed[-1] = True

    @torch.no_grad()
    def run(self, request: Request) -> list[torch.Tensor]:
        """All outputs of the denoiser in one request."""
        scheduler: Any = self.schedulers[request.scheduler]
        self.rig.scheduler = scheduler
        given = self.rig.spec.example(self.rig.spec.tiny, InputSize(height=4, width=4, text_tokens=2), request.prompt)
        scheduler.set_timesteps(request.steps)
        outputs: list[torch.Tensor] = []
        for timestep in scheduler.timesteps[: request.stop_at]:
            results = [
                self._call(given | {"timestep": timestep[None] / 1000}, branch, context)
                for branch, context in enumerate(request.contexts or ("",) * request.calls)
            ]
            outputs += results
            latents = scheduler.step(results[0], timestep, given["hidden_states"], return_dict=False)[0]
            given = given | {"hidden_states": latents}
        return outputs

    def _call(self, given: dict[str, Any], branch: int, context: str) -> torch.Tensor:
        self.computed.append(False)
        text = given["encoder_hidden_states"] * (-1) ** branch
        with self.rig.denoiser.cache_context(context) if context else nullcontext():  # pyright: ignore
            return self.rig.denoiser(**given | {"encoder_hidden_states": text})[0]


@functools.cache
def alone(request: Request) -> list[torch.Tensor]:
    """The outputs of a request that nothing came before."""
    return Cached().run(request)


REQUESTS = st.builds(
    Request,
    steps=st.integers(1, 4),
    contexts=st.sampled_from([(), ("cond", "uncond"), ("uncond", "cond"), ("cond", "cond")]),
    calls=st.integers(1, 2),
    prompt=st.integers(0, 1),
    stop_at=st.sampled_from([None, None, 0, 1, 2]),
    scheduler=st.integers(0, 1),
)


class AnySequenceOfRequests(RuleBasedStateMachine):
    """No request is affected by those before it, and each branch computes at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = Cached()

    @rule(request=REQUESTS)
    def serve(self, request: Request) -> None:
        self.cached.computed.clear()
        outputs = self.cached.run(request)
        branches = len(request.contexts) or request.calls
        first, later = self.cached.computed[:branches], self.cached.computed[branches:]
        assert all(first)
        assert not any(later)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, alone(request), strict=True))

    def teardown(self) -> None:
        self.cached.session.close()


AnySequenceOfRequests.TestCase.settings = settings(
    max_examples=8, stateful_step_count=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)
test_any_sequence_of_requests = AnySequenceOfRequests.TestCase
