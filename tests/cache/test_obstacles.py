"""What makes a step compute although the policy would reuse: noticed, computed and counted with its reason."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from hasten.cache.engine import runner
from hasten.cache.engine.statistics import Statistics
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.fora import FORA
from hasten.cache.taylor_seer import TaylorSeer
from hasten.core.errors import NotEngaged
from hasten.core.session import accelerate
from hasten.core.technique import Technique
from tests.cache.service import Request, Service, check
from tests.contract.rigs import Rig, make

LONG = FORA(interval=9)
LINE = TaylorSeer(interval=9, warm_up=2)


def served(technique: Technique, request: Request) -> tuple[dict[str, str], dict[str, int]]:
    """For each guidance branch which steps were computed (C), reused (R) or left out (-), and the reasons."""
    service = Service("flux")
    with accelerate(service, technique) as session:
        service.run(request)
        check(service.calls)
        reasons = dict(session.state(technique, Statistics).reasons)
    maps: dict[str, str] = {}
    steps = 1 + max(call.step for call in service.calls)
    for label in dict.fromkeys(call.label for call in service.calls):
        found = {call.step: "C" if call.full else "R" for call in service.calls if call.label == label}
        maps[label] = "".join(found.get(step, "-") for step in range(steps))
    return maps, reasons


def test_a_branch_that_comes_back_after_a_computed_step_is_computed() -> None:
    """Guidance is off for two steps, in which all others were computed anew."""
    maps, reasons = served(FORA(interval=2), Request(steps=6, guidance="named", unguided=(1, 2)))
    assert maps == {"cond": "CRCRCR", "uncond": "C--CCR"}
    assert reasons == {runner.MISSED: 1}


def test_a_branch_that_missed_nothing_new_is_reused() -> None:
    maps, reasons = served(LONG, Request(steps=5, guidance="named", unguided=(1, 2)))
    assert maps == {"cond": "CRRRR", "uncond": "C--RR"}
    assert not reasons


def test_another_leader_is_computed_and_the_others_with_it() -> None:
    """A decision compares the front with that of the same branch."""
    request = Request(steps=6, guidance="named", uncond_first=True, unguided=(2, 3))
    maps, reasons = served(FirstBlockCache(threshold=1e30), request)
    assert maps == {"uncond": "CR--CR", "cond": "CRCRCR"}
    assert reasons == {runner.OTHER_LEADER: 1, runner.MISSED: 2}


def test_branches_without_names_that_change_places_are_computed() -> None:
    """When guidance ends, the first call of a step is another one than before."""
    request = Request(steps=5, guidance="unnamed", uncond_first=True, unguided=(2, 3, 4))
    maps, reasons = served(LONG, request)
    assert maps == {"uncond": "CR---", "cond": "CRCRR"}
    assert reasons == {runner.OTHER_TEXT: 1}


def test_branches_without_names_that_come_later_are_computed() -> None:
    request = Request(steps=5, guidance="unnamed", uncond_first=True, unguided=(0, 1))
    maps, reasons = served(LONG, request)
    assert maps == {"cond": "CRCRR", "uncond": "--CRR"}
    assert reasons[runner.OTHER_TEXT] == 1


def test_a_text_that_is_made_anew_at_each_step_is_no_other_text() -> None:
    rig = make("flux")
    call: Any = rig.call

    def anew(arguments: dict[str, Any]) -> Any:
        return call(arguments | {"encoder_hidden_states": arguments["encoder_hidden_states"].clone()})

    rig.call = anew
    with rig.accelerated(LONG) as session:
        rig.run(steps=6)
        assert session.evidence()[LONG].reused_steps == 5


@pytest.mark.parametrize("later", [0.5, 0.0])
def test_another_strength_of_an_adapter_is_computed(later: float) -> None:
    maps, reasons = served(LONG, Request(steps=5, lora=1.0, lora_later=(2, later)))
    assert maps == {"cond": "CRCRR"}
    assert reasons == {runner.CHANGED: 1}


@torch.no_grad()
def test_another_strength_of_a_single_layer_is_noticed() -> None:
    service = Service("flux")
    steps = service.steps(Request(steps=5, lora=1.0))
    with accelerate(service, LONG) as session:
        for step, _ in enumerate(steps):
            if step == 1:
                layers: list[Any] = [part for part in service.denoiser.modules() if isinstance(part, BaseTunerLayer)]
                service._adapt = lambda strength: None
                layers[-1].set_scale("style", 0.25)
        assert [call.full for call in service.calls] == [True, False, True, False, False]
        assert session.state(LONG, Statistics).reasons == {runner.CHANGED: 1}


def test_an_adapter_that_is_loaded_in_mid_run_is_noticed() -> None:
    from peft import LoraConfig

    rig, call = make("flux"), 0

    def loading(arguments: dict[str, Any]) -> Any:
        nonlocal call
        if call == 2:
            model: Any = rig.denoiser
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "late")
        call += 1
        return rig.denoiser(**arguments, return_dict=False)[0]

    rig.call = loading
    with rig.accelerated(LONG) as session:
        rig.run(steps=5)
        (steps,) = session.evidence()[LONG].step_map.values()
    assert steps == (True, False, True, False, False)


@pytest.mark.parametrize("forecast", ["branches", "residual", "output"])
def test_a_second_order_sampler_gives_no_line(forecast: Any) -> None:
    """Heun calls twice at each noise level but the first: no line goes through two values at one place."""
    technique = TaylorSeer(interval=9, warm_up=2, forecast=forecast)
    maps, reasons = served(technique, Request(steps=4, scheduler="heun"))
    assert maps == {"cond": "C" * 7}
    assert reasons == {runner.SEVERAL: 5}


def test_a_second_order_sampler_is_held() -> None:
    maps, reasons = served(LONG, Request(steps=4, scheduler="heun"))
    assert maps == {"cond": "CRRRRRR"}
    assert not reasons


def test_a_sampler_that_adds_noise_is_held_inside_the_network_alone() -> None:
    request = Request(steps=4, scheduler="ancestral")
    assert served(LONG, request) == ({"cond": "CRRR"}, {})
    whole = TaylorSeer(interval=9, warm_up=1, order=0, forecast="output")
    for technique in (LINE, whole):
        maps, reasons = served(technique, request)
        assert maps == {"cond": "CCCC"}
        assert reasons == {runner.NOISE: 3 if technique is whole else 2}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_that_the_pipeline_asks_for_is_noticed_after_a_step(eta: float) -> None:
    """DDIM adds none unless its `step` is told to."""
    rig = make("dit")
    rig.scheduler = rig.components["scheduler"] = diffusers.DDIMScheduler()
    with rig.accelerated(LINE) as session:
        rig.scheduler.set_timesteps(5)
        picture = rig.spec.example(rig.spec.tiny)["hidden_states"]
        with torch.no_grad():
            for timestep in rig.scheduler.timesteps:
                given = rig.spec.example(rig.spec.tiny) | {"timestep": timestep.expand(1), "hidden_states": picture}
                output = rig.denoiser(**given)[0][:, : picture.shape[1]]
                picture = rig.scheduler.step(output, timestep, picture, eta=eta, return_dict=False)[0]
        if eta:
            with pytest.raises(NotEngaged, match="3 were computed because the sampler adds noise at each step"):
                session.evidence()
        else:
            assert session.evidence()[LINE].reused_steps == 3


class TwoExperts(Rig):
    """A pipeline with one denoiser for the noisy steps and one for the others, as Wan 2.2 has them."""

    def __init__(self, boundary: int) -> None:
        first, second = make("wan"), make("wan")
        super().__init__(first.spec, first.denoiser, first.vae)
        self.other, self.boundary, self.names = second.denoiser, boundary, ("cond", "uncond")
        self.components |= {"transformer_2": second.denoiser}

    def call(self, arguments: dict[str, Any]) -> Any:
        early = (self.scheduler.step_index or 0) < self.boundary
        expert: Any = self.denoiser if early else self.other
        self.names = self.names[::-1]
        with expert.cache_context(self.names[1]):
            return expert(**arguments, return_dict=False)[0]


def maps_of_experts(technique: Technique, steps: int, boundary: int) -> tuple[dict[str, str], dict[str, int]]:
    rig = TwoExperts(boundary)
    with rig.accelerated(technique) as session:
        for _ in range(2):
            rig.run(steps=steps)
        evidence = session.evidence()[technique]
        reasons = dict(session.state(technique, Statistics).reasons)
    maps = {name: "".join("RC"[full] for full in steps) for name, steps in evidence.step_map.items()}
    assert maps["transformer cond"] == maps["transformer uncond"]
    assert maps["transformer_2 cond"] == maps["transformer_2 uncond"]
    return {name.removesuffix(" cond"): steps for name, steps in maps.items() if name.endswith(" cond")}, reasons


def test_the_second_expert_begins_with_a_computed_step() -> None:
    """FORA's schedule says to reuse at step 5, but the second expert has kept nothing yet."""
    maps, reasons = maps_of_experts(FORA(interval=2), steps=10, boundary=5)
    assert maps == {"transformer": "CRCRC", "transformer_2": "CCRCR"}
    assert reasons == {runner.NOTHING_KEPT: 4}


def test_each_expert_warms_up_for_itself() -> None:
    maps, reasons = maps_of_experts(TaylorSeer(interval=3, warm_up=2), steps=12, boundary=7)
    assert maps == {"transformer": "CCRRCRR", "transformer_2": "CCRRC"}
    assert not reasons


def test_an_expert_that_is_never_reached_does_not_matter() -> None:
    rig, technique = TwoExperts(99), FORA(interval=2)
    with rig.accelerated(technique) as session:
        rig.run(steps=4)
        found = session.evidence()[technique].step_map
    assert found == dict.fromkeys(("transformer cond", "transformer uncond"), (True, False, True, False))
