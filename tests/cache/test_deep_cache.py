from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from by_hand import deep_feature, residuals, shallow
from cache_harness import Graphs, Pipe, equal, executed, repeat, sample
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

from hasten.cache.deep_cache import DeepCache
from hasten.cache.engine.deep_feature import DeepFeatureSite, cuts
from hasten.cache.engine.schedules import non_uniform, quadratic_steps
from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload

SIZES = ({"height": 16, "width": 16}, {"height": 13, "width": 10})


@pytest.fixture(scope="module")
def pipe() -> Pipe:
    return Pipe("stable_diffusion")


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize("size", SIZES)
def test_a_reused_step_with_the_same_input_equals_the_full_one(architecture: str, size: dict[str, int]) -> None:
    pipe = Pipe(architecture)
    given = pipe.arguments(batch=2, **size)
    plain = repeat(pipe, 1, given)
    for branch in range(9):
        with accelerate(pipe, DeepCache(interval=3, branch=branch)) as session:
            assert equal(repeat(pipe, 3, given), plain * 3)
            (evidence,) = session.evidence().values()
            assert list(evidence.step_map.values()) == [(True, False, False)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("controlled", [False, True])
def test_a_reused_step_equals_a_shallow_run_by_hand(pipe: Pipe, size: dict[str, int], controlled: bool) -> None:
    first, later = pipe.arguments(1, **size), pipe.arguments(2, **size)
    later["encoder_hidden_states"] = first["encoder_hidden_states"]
    if controlled:
        first, later = first | residuals(pipe, first, 1), later | residuals(pipe, later, 2)
    for branch, cut in enumerate(cuts(Target.of(pipe).denoisers[0])):
        with torch.no_grad():
            expected = shallow(pipe.model, cut, later, deep_feature(pipe.model, cut, first))
        with accelerate(pipe, DeepCache(interval=3, branch=branch)):
            assert torch.equal(repeat(pipe, 2, first, later)[1], expected)


LAYERS = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)


def test_a_reused_step_runs_the_outer_layers_only(pipe: Pipe) -> None:
    given = pipe.arguments()
    with executed(pipe.model, *LAYERS) as everything:
        repeat(pipe, 1, given)
    for branch, expected in (
        (0, ["up_blocks.2.resnets.2", "up_blocks.2.attentions.2"]),
        (4, [*OUTER_DOWN, *OUTER_UP]),
    ):
        with accelerate(pipe, DeepCache(interval=2, branch=branch)), executed(pipe.model, *LAYERS) as names:
            repeat(pipe, 2, given)
        assert names == everything + expected


OUTER_DOWN = [
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    "down_blocks.0.resnets.1",
    "down_blocks.0.attentions.1",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0",
    "down_blocks.1.attentions.0",
]
OUTER_UP = [
    f"up_blocks.{stage}.{name}"
    for stage, names in (
        (1, ("resnets.1", "attentions.1", "resnets.2", "attentions.2", "upsamplers.0")),
        (2, ("resnets.0", "attentions.0", "resnets.1", "attentions.1", "resnets.2", "attentions.2")),
    )
    for name in names
]


def test_three_requests_with_other_prompts_and_step_counts(pipe: Pipe) -> None:
    requests = [(4, pipe.arguments(1)), (7, pipe.arguments(2)), (3, pipe.arguments(3))]
    alone: list[list[torch.Tensor]] = []
    for steps, given in requests:
        with accelerate(pipe, DeepCache()):
            alone.append(sample(pipe, steps, given))
    with accelerate(pipe, DeepCache()) as session:
        for (steps, given), expected in zip(requests, alone, strict=True):
            assert equal(sample(pipe, steps, given), expected)
            (evidence,) = session.evidence().values()
            assert evidence.step_map == {"unet call 1": tuple(i % 3 == 0 for i in range(steps))}
        (evidence,) = session.evidence().values()
    assert (evidence.full_steps, evidence.reused_steps) == (2 + 3 + 1, 2 + 4 + 2)


def test_a_request_after_an_aborted_one_starts_afresh(pipe: Pipe) -> None:
    given = pipe.arguments(1)
    with accelerate(pipe, DeepCache(branch=2)):
        expected = sample(pipe, 5, given)
    with accelerate(pipe, DeepCache(branch=2)):
        sample(pipe, 9, pipe.arguments(2), stop_after=2)
        assert equal(sample(pipe, 5, given), expected)


@pytest.mark.parametrize("failing", ["down_blocks.2.resnets.1", "up_blocks.2.resnets.2"])
def test_an_exception_in_mid_run_leaves_nothing_behind(pipe: Pipe, failing: str) -> None:
    given = pipe.arguments(1)
    plain = sample(pipe, 5, given)
    with accelerate(pipe, DeepCache()) as session:
        expected = sample(pipe, 5, given)
        handle = pipe.model.get_submodule(failing).register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            sample(pipe, 5, given)
        handle.remove()
        assert equal(sample(pipe, 5, given), expected)
        assert session.evidence()
    assert equal(sample(pipe, 5, given), plain)


def fail(*_: object) -> None:
    raise ZeroDivisionError


def test_guidance_branches_do_not_mix(pipe: Pipe) -> None:
    """Frozen inputs: every branch must give its own full result, however they alternate."""
    one, other = pipe.arguments(1), pipe.arguments(2)
    with torch.no_grad():
        expected = [pipe.model(**given).sample for given in (one, other)]
    with accelerate(pipe, DeepCache(interval=2)) as session:
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            with torch.no_grad():
                assert equal([pipe.model(**given).sample for given in (one, other)], expected)
            pipe.scheduler.step(one["sample"], timestep, one["sample"])
        (evidence,) = session.evidence().values()
    assert evidence.step_map == dict.fromkeys(("unet call 1", "unet call 2"), (True, False, True, False))


def test_what_a_feature_does_not_fit_is_computed(pipe: Pipe) -> None:
    given = pipe.arguments(1)
    changed = (pipe.arguments(1, height=24), pipe.arguments(1, batch=2), given | residuals(pipe, given, 4))
    for other in changed:
        with torch.no_grad():
            expected = pipe.model(**other).sample
        with accelerate(pipe, DeepCache(interval=9)) as session:
            outputs = repeat(pipe, 4, given, other, other, given)
            (evidence,) = session.evidence().values()
        assert equal(outputs[1:3], [expected] * 2)
        assert evidence.step_map["unet call 1"] == (True, True, False, True)


@pytest.mark.parametrize("name", ["down_intrablock_additional_residuals", "down_block_additional_residuals"])
def test_a_t2i_adapter_is_always_computed(pipe: Pipe, name: str) -> None:
    given = pipe.arguments(1)
    features = [torch.randn(1, c, s, s) for c, s in ((16, 16), (32, 8), (32, 4))]
    # The U-Net empties the list that it is given.
    adapted = [given | {name: list(features)} for _ in range(3)]
    with accelerate(pipe, DeepCache()) as session, executed(pipe.model, ResnetBlock2D) as names:
        repeat(pipe, 3, *adapted)
        with pytest.raises(NotEngaged, match="never reused"):
            session.evidence()
    assert names.count("mid_block.resnets.0") == 3


def test_freeu_scales_the_kept_feature_once(pipe: Pipe) -> None:
    given = pipe.arguments()
    pipe.model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        plain = repeat(pipe, 1, given)
        for branch in range(9):
            with accelerate(pipe, DeepCache(interval=3, branch=branch)):
                assert equal(repeat(pipe, 3, given), plain * 3)
    finally:
        pipe.model.disable_freeu()


def test_regional_compilation_needs_no_more_graphs() -> None:
    torch.compiler.reset()
    pipe, graphs = Pipe("stable_diffusion"), Graphs()
    graphs.compile_blocks(pipe)
    sample(pipe, 2, pipe.arguments(1))
    plain = graphs.count
    with torch.compiler.set_stance("fail_on_recompile"):
        with accelerate(pipe, DeepCache(branch=4)) as session:
            for seed, steps in enumerate((3, 6, 2)):
                sample(pipe, steps, pipe.arguments(seed))
            assert session.evidence()
        sample(pipe, 2, pipe.arguments(1))
    assert graphs.count == plain


def test_compiling_after_installing_needs_no_more_graphs_either() -> None:
    torch.compiler.reset()
    pipe, graphs = Pipe("stable_diffusion"), Graphs()
    with accelerate(pipe, DeepCache()):
        graphs.compile_blocks(pipe)
        sample(pipe, 1, pipe.arguments(1))
        plain = graphs.count
        with torch.compiler.set_stance("fail_on_recompile"):
            sample(pipe, 4, pipe.arguments(2))
    assert graphs.count == plain


PUBLISHED = {
    (50, 5): [0, 5, 9, 13, 17, 21, 26, 31, 37, 43],
    (28, 3): [0, 4, 7, 10, 12, 15, 16, 19, 22, 25],
    (28, 5): [0, 6, 11, 15, 18, 23],
    (100, 10): [0, 7, 14, 20, 29, 38, 49, 60, 73, 86],
}
"""What the authors' script computes with center 15 and power 1.4, by step count and interval."""


@pytest.mark.parametrize(("steps", "interval"), PUBLISHED)
def test_the_non_uniform_schedule_is_the_published_one(steps: int, interval: int) -> None:
    found = quadratic_steps(steps, -(-steps // interval), 15, 1.4)
    assert found is not None
    assert sorted(found) == PUBLISHED[steps, interval]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 15, 20, 50])
@pytest.mark.parametrize("interval", [2, 3, 9])
def test_a_non_uniform_schedule_has_as_many_complete_steps(steps: int, interval: int) -> None:
    computes = non_uniform(interval, 15, 1.4)
    assert computes(0, steps)
    assert sum(computes(step, steps) for step in range(steps)) == -(-steps // interval)
    assert [computes(step, None) for step in range(9)] == [step % interval == 0 for step in range(9)]


def test_a_non_uniform_request_follows_its_schedule(pipe: Pipe) -> None:
    technique = DeepCache(interval=3, schedule="non_uniform", center=4)
    with accelerate(pipe, technique) as session:
        sample(pipe, 12, pipe.arguments())
        (evidence,) = session.evidence().values()
    (steps,) = evidence.step_map.values()
    expected = quadratic_steps(12, 4, 4, 1.4)
    assert {step for step, full in enumerate(steps) if full} == expected != {0, 3, 6, 9}


def test_interval_one_changes_nothing_and_keeps_nothing(pipe: Pipe) -> None:
    given = pipe.arguments()
    plain = sample(pipe, 3, given)
    with accelerate(pipe, DeepCache(interval=1)) as session:
        assert equal(sample(pipe, 3, given), plain)
        (evidence,) = session.evidence().values()
    assert (evidence.full_steps, evidence.reused_steps) == (3, 0)


def test_leaving_gives_back_the_model_and_others_are_untouched(pipe: Pipe) -> None:
    other, given = Pipe("stable_diffusion", seed=1), pipe.arguments()
    plain, foreign = sample(pipe, 4, given), sample(other, 4, given)
    classes = [type(part) for part in pipe.model.modules()]
    with accelerate(pipe, DeepCache(branch=4)):
        assert not equal(sample(pipe, 4, given), plain)
        assert equal(sample(other, 4, given), foreign)
        assert list(pipe.model.state_dict()) == list(other.model.state_dict())
    assert [type(part) for part in pipe.model.modules()] == classes
    assert equal(sample(pipe, 4, given), plain)


def test_a_shallow_run_that_does_not_happen_is_noticed(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepFeatureSite, "_install_up", lambda *_: None)
    with accelerate(pipe, DeepCache()) as session:
        sample(pipe, 4, pipe.arguments())
        with pytest.raises(NotEngaged, match="never reused"):
            session.evidence()


def test_before_a_run_there_is_no_evidence(pipe: Pipe) -> None:
    with accelerate(pipe, DeepCache()) as session, pytest.raises(NotEngaged, match="no denoiser call"):
        session.evidence()


def test_refusals_name_the_way_out(pipe: Pipe) -> None:
    with pytest.raises(Refused, match="no branch 9; choose one from 0 to 8"):
        accelerate(pipe, DeepCache(branch=9))
    with pytest.raises(Refused, match="is no U-Net"):
        accelerate(Pipe("dit"), DeepCache())
    with pytest.raises(InvalidSetting, match="at least 1"):
        DeepCache(interval=0)
    foreign = Pipe("stable_diffusion")
    kind = type(foreign.model.up_blocks[0])
    foreign.model.up_blocks[0].__class__ = type("HomemadeBlock", (kind,), {})
    with pytest.raises(Refused, match="HomemadeBlock are not supported"):
        accelerate(foreign, DeepCache())
    uneven = Pipe("stable_diffusion")
    del uneven.model.up_blocks[1].resnets[0]
    with pytest.raises(Refused, match="one layer more"):
        accelerate(uneven, DeepCache())


def test_the_predicted_cost_follows_the_branch(pipe: Pipe) -> None:
    target, workload = Target.of(pipe), Workload(width=128, height=64)
    costs = {branch: DeepCache(branch=branch).cost(target, workload) for branch in (0, 4, 8)}
    shallow, middle, deep = (cost.time_factor or 0 for cost in costs.values())
    assert 1 / 3 < shallow < 0.5 < middle < 0.9 < deep < 1
    given = pipe.arguments(batch=2, width=16, height=8)
    for branch, cost in costs.items():
        assert cost.extra_bytes == deep_feature(pipe.model, cuts(target.denoisers[0])[branch], given).numel() * 4


def test_without_reuse_the_predicted_time_stays(pipe: Pipe) -> None:
    assert DeepCache(interval=1).cost(Target.of(pipe), Workload()).time_factor == 1
