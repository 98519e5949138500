"""AdaCache: its decisions against the published procedure written down plainly, on values and on real runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from cache_harness import Pipe, equal, sample

from hasten.cache import ada_cache
from hasten.cache.ada_cache import AdaCache
from hasten.cache.engine.branches import parts, place_in_the_middle
from hasten.cache.engine.codebook import Codebook, LookedUp, motion, published
from hasten.core.clock import Moment
from hasten.core.errors import InvalidSetting, Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from tests.contract.rigs import make

TRANSFORMERS = [name for name, spec in specs().items() if spec.stacks]
FAST = {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1}


def plainly(values: list[torch.Tensor], codebook: dict[float, int], frames: int = 0) -> list[int]:
    """The published procedure, steps counted from 1: which steps are computed. `values[i]` is what step i+1 gives."""
    steps, computed, rate, motion_before = len(values), list[int](), 1, 1.0
    for step in range(1, steps + 1):
        if not (step in (1, steps - 1, steps) or step == computed[-1] + rate):
            continue
        if computed:
            cached, fresh = values[computed[-1] - 1], values[step - 1]
            change = ((cached - fresh).abs().sum() / cached.abs().sum()).item() / rate
            if frames:
                size = fresh.shape[1] // frames
                later, earlier = fresh[:, size:], fresh[:, :-size]
                moved = ((later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum())).item()
                moved = (moved / 0.385) ** 8 if 4 <= step <= 26 else 1.0
                gradient = 10 * (moved - motion_before) / rate
                motion_before = moved
                change *= moved + abs(gradient)
            rate = next((each for limit, each in codebook.items() if change < limit), list(codebook.values())[-1])
        computed.append(step)
    return computed


def drifting(seed: int, steps: int, frames: int = 4) -> list[torch.Tensor]:
    """Tokens [1, frames*3, 5] that change at an uneven pace."""
    generator = torch.Generator().manual_seed(seed)
    pace = torch.rand(steps, generator=generator) * 0.6
    start, other = torch.randn(2, 1, frames * 3, 5, generator=generator)
    angles = pace.cumsum(0)
    return [angle.cos() * start + angle.sin() * other for angle in angles]


def decided(values: list[torch.Tensor], policy: LookedUp, frames: int = 0) -> list[int]:
    """The steps, counted from 1, that a policy computes."""
    computed: list[int] = []
    for step, value in enumerate(values):
        moment = Moment(0, step, "", len(values))
        computes = policy.decide(moment)
        if policy.looks_at == "input":
            policy.observe(moment, torch.empty(1, 2, frames, 3, 3))
        if computes:
            computed.append(step + 1)
            policy.computed(moment, [None, (value, value)], _nothing)
        else:
            policy.reused(moment)
    return computed


def _nothing() -> None:
    return None


@pytest.mark.parametrize("seed", range(8))
def test_decisions_are_the_published_ones(seed: int) -> None:
    values = drifting(seed, 30)
    ours = decided(values, LookedUp(published("fast"), 1, warm_up=2, cool_down=2))
    assert ours == plainly(values, FAST)
    assert 4 < len(ours) < 30


@pytest.mark.parametrize("seed", range(8))
def test_decisions_with_motion_are_the_published_ones(seed: int) -> None:
    values = drifting(seed, 30)
    policy = LookedUp(published("fast"), 1, warm_up=2, cool_down=2, frames_per_token=1)
    assert decided(values, policy, frames=4) == plainly(values, FAST, frames=4)


def test_motion_makes_a_difference() -> None:
    values = drifting(0, 30)
    assert plainly(values, FAST, frames=4) != plainly(values, FAST)


def test_still_videos_do_not_move() -> None:
    frame = torch.randn(1, 3, 5)
    assert motion(frame.repeat(1, 4, 1), 4) == 0
    assert motion(torch.cat([frame, -frame], 1), 2) == 1


def test_published_codebooks_are_data() -> None:
    assert published("fast").rates == tuple(FAST.items())
    for name in get_args(ada_cache.Name):
        book = published(name)
        assert AdaCache(codebook=book.rates).codebook == book.rates
        assert 0 < book.motion[0] < book.motion[1] < 1
        assert book.rate(0.0) == max(rate for _, rate in book.rates)


def test_a_stretched_codebook_is_for_models_that_change_more() -> None:
    pipe = Pipe("dit")
    full: list[int] = []
    for stretch in (0.01, 1.0, 100.0):
        with accelerate(pipe, AdaCache(codebook=((0.03, 6), (1.0, 2)), stretch=stretch)) as session:
            sample(pipe, 20, pipe.arguments())
            full.append(next(iter(session.evidence().values())).full_steps or 0)
    assert full[2] < full[1] <= full[0]
    assert full[2] == 6, "two at each end, and every sixth between"
    assert published("fast").stretched(2.0).rate(0.15) == published("fast").rate(0.075) == 6


def test_what_is_no_number_computes() -> None:
    assert Codebook(((1.0, 5),)).rate(float("nan")) == 1
    assert Codebook(((1.0, 5),)).rate(float("inf")) == 5


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_the_middle_is_an_attention_of_the_middle_block(architecture: str) -> None:
    denoiser = Target.of(make(architecture)).denoisers[0]
    (module, is_branch) = list(parts(denoiser))[place_in_the_middle(denoiser)]
    blocks: list[Any] = [b for stack in denoiser.spec.stacks for b in denoiser.stack(stack)]
    assert is_branch
    assert module in set(blocks[(len(blocks) - 1) // 2].modules())
    assert "Attention" in type(module).__name__


def test_what_is_compared_is_what_the_middle_puts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen, put_out = Pipe("dit"), list[torch.Tensor](), list[torch.Tensor]()
    computed: Callable[..., None] = LookedUp.computed

    def noting(self: Any, moment: Moment, kept: Any, guessed: Any) -> None:
        seen.append(kept[place_in_the_middle(Target.of(pipe).denoisers[0])])
        computed(self, moment, kept, guessed)

    monkeypatch.setattr(LookedUp, "computed", noting)
    middle = pipe.model.transformer_blocks[(len(pipe.model.transformer_blocks) - 1) // 2]
    middle.attn1.register_forward_hook(lambda *call: put_out.append(call[2]))
    with accelerate(pipe, AdaCache()):
        sample(pipe, 12, pipe.arguments())
    assert 3 < len(seen) < 12
    assert equal(seen, put_out)


def test_a_real_run_reuses_longer_where_less_changes() -> None:
    pipe = Pipe("dit")
    maps: list[tuple[bool, ...]] = []
    for limits in (((1e9, 5),), ((1e-9, 5), (1.0, 2)), ()):
        with accelerate(pipe, AdaCache(codebook=limits)) as session:
            sample(pipe, 10, pipe.arguments())
            (evidence,) = session.evidence().values()
            maps.extend(evidence.step_map.values())
    assert [[step for step, full in enumerate(steps) if full] for steps in maps] == [
        [0, 1, 6, 8, 9],
        [0, 1, 3, 5, 7, 8, 9],
        list(range(10)),
    ]


@torch.no_grad()
def test_frames_of_a_video_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, frames = make("wan"), list[tuple[int, ...]]()

    def noting(tokens: torch.Tensor, count: int) -> torch.Tensor:
        frames.append((tokens.shape[1], count))
        return motion(tokens, count)

    monkeypatch.setattr("hasten.cache.engine.codebook.motion", noting)
    given = rig.spec.example(rig.spec.tiny, InputSize(height=4, width=6, frames=5))
    with rig.accelerated(AdaCache(motion=True)):
        rig.scheduler.set_timesteps(20)
        for timestep in rig.scheduler.timesteps:
            rig.denoiser(**given)
            rig.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    assert set(frames) == {(5 * 2 * 3, 5)}


def test_bad_settings_are_refused_in_words() -> None:
    with pytest.raises(InvalidSetting, match="write pairs such as"):
        AdaCache(codebook=((0.1, 0),))
    with pytest.raises(InvalidSetting, match="the changes must rise"):
        AdaCache(codebook=((0.2, 3), (0.1, 2)))
    with pytest.raises(InvalidSetting, match="fast"):
        AdaCache(codebook="fats")  # pyright: ignore
    with pytest.raises(Refused, match="in which nothing moves; set motion=False"):
        accelerate(Pipe("dit"), AdaCache(motion=True))
