"""SeaCache against diffusers' own, the filter, and schedulers and layouts it has to understand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cache_harness import Pipe, executed, sample
from diffusers.hooks.sea_cache import SeaCacheConfig, _apply_sea_filter

from hasten.cache.engine.linear import Linear
from hasten.cache.engine.spectrum import filtered
from hasten.cache.sea_cache import SeaCache
from hasten.core.clock import Moment
from hasten.core.errors import NotEngaged
from hasten.core.noise import NoiseLevel
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from tests.contract.rigs import make


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (1, 3, 15, 12), (1, 4, 5, 8, 10)])
@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.2, 0.0])
def test_the_filter_is_that_of_diffusers(shape: tuple[int, ...], sigma: float) -> None:
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = filtered(picture, NoiseLevel(1 - sigma, sigma))
    for one, given in zip(ours, picture, strict=True):
        video = given if given.dim() == 4 else given[:, None]
        theirs = _apply_sea_filter(video.movedim(0, -1), sigma, 3.0).movedim(-1, 0)
        torch.testing.assert_close(one, theirs.reshape(one.shape), atol=2e-5, rtol=1e-4)


def test_the_filter_looks_at_the_ratio_of_picture_to_noise_alone() -> None:
    """Of a variance-preserving scheduler, the rescaled input is that of a rectified flow."""
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    flow = filtered(picture, NoiseLevel(0.6, 0.4))
    torch.testing.assert_close(filtered(picture * 1.3, NoiseLevel(0.6 * 1.3, 0.4 * 1.3)), flow)


def test_early_only_coarse_structure_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 32, 32, generator=generator)
    rough = [float(filtered(noise, NoiseLevel(1 - s, s)).diff(dim=-1).abs().mean()) for s in (0.99, 0.6, 0.1)]
    assert rough[0] < rough[1] < rough[2]


class Diffusers:
    """A tiny Wan with diffusers' SeaCache, driven as its pipeline does."""

    def __init__(self, **settings: Any) -> None:
        self.pipe = Pipe("wan")
        self.pipe.scheduler = flow_scheduler()
        self.pipe.model.enable_cache(SeaCacheConfig(**settings))

    @torch.no_grad()
    def sample(self, steps: int, given: dict[str, Any]) -> list[torch.Tensor]:
        pipe, outputs = self.pipe, list[torch.Tensor]()
        pipe.scheduler.set_timesteps(steps)
        picture = given["hidden_states"]
        for step, (timestep, sigma) in enumerate(zip(pipe.scheduler.timesteps, pipe.scheduler.sigmas, strict=False)):
            context: dict[str, Any] = {"step_index": step, "sigma": float(sigma), "num_inference_steps": steps}
            with pipe.model.cache_context("cond", **context):
                outputs.append(pipe.model(**given | {"hidden_states": picture, "timestep": timestep.expand(1)})[0])
            picture = pipe.scheduler.step(outputs[-1], timestep, picture, return_dict=False)[0]
        return outputs


def flow_scheduler() -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


@torch.no_grad()
def ours(technique: SeaCache, steps: int, given: dict[str, Any]) -> tuple[list[torch.Tensor], tuple[bool, ...]]:
    pipe = Pipe("wan")
    pipe.scheduler = pipe.components["scheduler"] = flow_scheduler()
    outputs: list[torch.Tensor] = []
    with accelerate(pipe, technique) as session:
        pipe.scheduler.set_timesteps(steps)
        picture = given["hidden_states"]
        for timestep in pipe.scheduler.timesteps:
            outputs.append(pipe.model(**given | {"hidden_states": picture, "timestep": timestep.expand(1)})[0])
            picture = pipe.scheduler.step(outputs[-1], timestep, picture, return_dict=False)[0]
        return outputs, next(iter(session.evidence()[technique].step_map.values()))


@pytest.mark.parametrize(("threshold", "most"), [(0.1, 2), (0.25, 2), (0.6, 0)])
@pytest.mark.parametrize("order", [0, 1])
def test_it_is_what_diffusers_does(threshold: float, most: int, order: int) -> None:
    spec = specs()["wan"]
    given = spec.example(spec.tiny, InputSize(height=16, width=16, frames=3))
    theirs = Diffusers(threshold=threshold, max_consecutive_cached=most, residual_order=order)
    expected = theirs.sample(20, given)
    technique = SeaCache(threshold=threshold, max_consecutive=most, order=order)
    outputs, ran = ours(technique, 20, given)
    assert 3 <= sum(ran) < 20
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_larger_threshold_reuses_more_within_the_limits() -> None:
    spec = specs()["wan"]
    given = spec.example(spec.tiny)
    maps = [ours(SeaCache(threshold=t, first=2, last=3), 20, given)[1] for t in (0.05, 0.2, 0.5, 1e6)]
    counts = [sum(ran) for ran in maps]
    assert counts == sorted(counts, reverse=True)
    assert all(ran[:2] == (True, True) and ran[-3:] == (True,) * 3 for ran in maps)
    assert longest(maps[-1]) == 2
    assert longest(ours(SeaCache(threshold=1e6, max_consecutive=0), 20, given)[1]) == 18


def longest(ran: Sequence[bool]) -> int:
    return max(len(run) for run in "".join("X" if one else "." for one in ran).split("X"))


def test_the_line_runs_through_the_two_latest_values_over_the_real_distance() -> None:
    at = [Moment(0, step, "") for step in (3, 6, 8)]
    assert Linear().weights(at[:1], at[1]) == (1.0,)
    assert Linear().weights(at[:2], at[2]) == pytest.approx((-2 / 3, 5 / 3))
    assert Linear().snapshots == 2


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_packed_tokens_are_laid_out_as_the_pipelines_packed_them(name: str) -> None:
    from diffusers import FluxPipeline, QwenImagePipeline

    spec = specs()[name]
    pack: Any = (FluxPipeline if name == "flux" else QwenImagePipeline)._pack_latents
    picture = torch.randn(2, 4, 12, 20)
    given = spec.example(spec.tiny, InputSize(batch=2, height=12, width=20))
    given["hidden_states"] = pack(picture, 2, 4, 12, 20)
    assert spec.unpack is not None
    unpacked = spec.unpack(given)
    assert unpacked is not None
    assert torch.equal(unpacked, picture)


def test_tokens_of_reference_pictures_are_left_out() -> None:
    spec = specs()["flux"]
    given = spec.example(spec.tiny, InputSize(height=12, width=20))
    reference = given["img_ids"] + torch.tensor([1.0, 0.0, 0.0])
    both = given | {
        "img_ids": torch.cat([given["img_ids"], reference]),
        "hidden_states": torch.cat([given["hidden_states"], given["hidden_states"] + 1], dim=1),
    }
    assert spec.unpack is not None
    alone, found = spec.unpack(given), spec.unpack(both)
    assert alone is not None
    assert found is not None
    assert torch.equal(found, alone)
    assert spec.unpack(given | {"hidden_states": given["hidden_states"][:, :7]}) is None


def test_an_unknown_scheduler_computes_and_says_why() -> None:
    class Own(type(Pipe("stable_diffusion").scheduler)):  # pyright: ignore
        """A scheduler that nobody knows."""

        def __init__(self) -> None:
            super().__init__()
            self.register_to_config(prediction_type="mine")

    pipe, technique = Pipe("stable_diffusion"), SeaCache()
    pipe.scheduler = pipe.components["scheduler"] = Own()
    pipe.scheduler.step = lambda *args, **_: (args[2],)
    with torch.no_grad(), accelerate(pipe, technique) as session:
        pipe.scheduler.set_timesteps(5)
        for timestep in pipe.scheduler.timesteps:
            pipe.model(**pipe.arguments() | {"timestep": timestep})
        with pytest.raises(NotEngaged):
            session.evidence()


def test_a_variance_preserving_scheduler_works_on_a_unet() -> None:
    rig = make("stable_diffusion")
    with executed(rig.denoiser, type(rig.denoiser.mid_block)) as ran, rig.accelerated(SeaCache(threshold=1e6)):  # pyright: ignore
        rig.run(steps=8)
    assert len(ran) == 4  # X..X..XX


def test_both_guidance_branches_follow_one_decision() -> None:
    pipe, technique = Pipe("flux"), SeaCache(threshold=0.3)
    with accelerate(pipe, technique) as session:
        sample(pipe, 10, pipe.arguments(0), pipe.arguments(1))
        maps = session.evidence()[technique].step_map
    assert len(maps) == 2
    assert len(set(maps.values())) == 1
