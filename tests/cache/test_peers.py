"""At the same decisions, the same results as the implementations that diffusers brings itself."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import hasten
from hasten.cache.engine.policy import Fixed, Policy
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.taylor_seer import TaylorSeer
from hasten.core.session import accelerate
from hasten.core.target import Denoiser
from tests.contract.rigs import Rig, make

diffusers: Any = pytest.importorskip("diffusers")
WHOLE_BRANCHES = [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"]
"""The branches of FLUX, as patterns for diffusers; by default it takes the attention alone."""


@contextmanager
def of_diffusers(denoiser: Any, config: Any) -> Generator[None]:
    """Diffusers' own cache, as long as the context lasts."""
    denoiser.enable_cache(config)
    try:
        yield
    finally:
        denoiser.disable_cache()


def named(rig: Rig) -> Rig:
    """Calls in a named context, which diffusers' caches need."""
    call: Callable[[dict[str, Any]], Any] = rig.call

    def in_context(arguments: dict[str, Any]) -> Any:
        with rig.denoiser.cache_context("cond"):  # pyright: ignore
            return call(arguments)

    rig.call = in_context
    return rig


@contextmanager
def steps_that_ran(module: Any, rig: Rig) -> Generator[list[int]]:
    """The steps in which a module of the denoiser computed."""
    ran: list[int] = []
    handle = module.register_forward_hook(lambda *_: ran.append(rig.scheduler.step_index or 0))
    yield ran
    handle.remove()


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.5])
def test_first_block_cache_is_that_of_diffusers(threshold: float) -> None:
    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("this diffusers has no First Block Cache")
    rig = named(make("flux"))
    last: Any = rig.denoiser.get_submodule("single_transformer_blocks.2.attn")
    config = diffusers.FirstBlockCacheConfig(threshold=threshold)
    with of_diffusers(rig.denoiser, config), steps_that_ran(last, rig) as theirs:
        expected = rig.run(steps=20)
    with accelerate(rig, FirstBlockCache(threshold=threshold)), steps_that_ran(last, rig) as ours:
        result = rig.run(steps=20)
    assert ours == theirs
    assert 1 < len(ours) < 20
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


class AsInDiffusers(TaylorSeer):
    """TaylorSeer with the schedule of diffusers, whose first stretch of forecasts is a single step."""

    def policy(self, denoiser: Denoiser) -> Policy:
        return Fixed(lambda step, steps: step < self.warm_up or (step - self.warm_up - 1) % self.interval == 0)


@pytest.mark.parametrize(("interval", "order"), [(5, 1), (2, 1), (4, 2), (3, 0)])
def test_taylor_seer_is_that_of_diffusers(interval: int, order: int) -> None:
    """A bundled model; the series is the same, the order in which it is summed is not."""
    if not hasattr(diffusers, "TaylorSeerCacheConfig"):
        pytest.skip("this diffusers has no TaylorSeer")
    pipe: Any = hasten.load("emoji-flux").pipeline
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=WHOLE_BRANCHES,
    )
    with of_diffusers(pipe.transformer, config):
        expected = latents(pipe)
    plain = latents(pipe)
    technique = AsInDiffusers(interval=interval, order=order)
    with accelerate(pipe, technique) as session:
        result = latents(pipe)
        (steps,) = session.evidence()[technique].step_map.values()
    assert steps == tuple(step < 3 or (step - 4) % interval == 0 for step in range(14))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert (result - plain).abs().max() > 100 * (result - expected).abs().max()


def test_ours_and_diffusers_schedules_agree_at_an_interval_of_two() -> None:
    theirs, ours = (kind(interval=2).policy(None) for kind in (AsInDiffusers, TaylorSeer))  # pyright: ignore
    computed = [[policy.decide(hasten_moment(step)) for step in range(20)] for policy in (theirs, ours)]
    assert computed[0] == computed[1]


def hasten_moment(step: int) -> Any:
    from hasten.core.clock import Moment

    return Moment(0, step, "", 20)


def latents(pipe: Any) -> torch.Tensor:
    """What the model makes of a prompt before decoding."""
    return pipe(
        "a red heart",
        num_inference_steps=14,
        height=64,
        width=64,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
