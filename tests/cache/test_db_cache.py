"""DBCache against the published algorithm, its limits in their order, late decisions, and U-Nets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hasten.cache.db_cache import DBCache
from hasten.cache.engine.change import relative_change
from hasten.cache.first_block import FirstBlockCache
from hasten.core.errors import InvalidSetting, Refused
from hasten.core.session import accelerate
from hasten.core.technique import Technique
from tests.cache.by_hand import residuals
from tests.cache.cache_harness import Graphs, Pipe, equal, repeat, sample
from tests.cache.drive import decisions, drifting, example, frozen, ran_of, request
from tests.contract.rigs import Rig, make

EVEN = [0.0] + [0.05] * 13
ARCHITECTURES = ("flux", "dit", "sd3", "stable_diffusion", "sdxl")


def shallow(**settings: Any) -> DBCache:
    """Without warm-up, with as deep a front as all test models bear."""
    shallowest: dict[str, Any] = {"front": 1, "warm_up": 0}
    return DBCache(**(shallowest | settings))


@pytest.mark.parametrize("threshold", [0.02, 0.08, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_one_block_in_front_it_is_first_block_cache(architecture: str, threshold: float) -> None:
    outputs: list[torch.Tensor] = []
    maps: list[Any] = []
    for technique in (FirstBlockCache(threshold=threshold), shallow(threshold=threshold)):
        rig = make(architecture)
        with rig.accelerated(technique) as session:
            outputs.append(rig.run(steps=8))
            maps.append(session.evidence()[technique].step_map if threshold == 0.3 else None)
    assert torch.equal(*outputs)
    assert maps[0] == maps[1]


class Published:
    """The decisions and streams of the published algorithm, written down plainly for FLUX."""

    def __init__(self, rig: Rig, front: int, back: int, threshold: float, warm_up: int, most: int | None) -> None:
        model: Any = rig.denoiser
        self.blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        self.front, self.back, self.threshold, self.warm_up, self.most = front, back, threshold, warm_up, most
        self.anchor: Any = None
        self.added: Any = None
        self.step, self.run = -1, 0
        self.computed: list[bool] = []

    def __call__(self, hidden_states: Any, encoder_hidden_states: Any, **others: Any) -> Any:
        self.step += 1
        text, picture = self._through(self.blocks[: self.front], encoder_hidden_states, hidden_states, others)
        residual = picture - hidden_states
        reuse = self._reuses(residual)
        self.computed.append(not reuse)
        self.run = self.run + 1 if reuse else 0
        middle = self.blocks[self.front : len(self.blocks) - self.back]
        if reuse:
            text, picture = text + self.added[0], picture + self.added[1]
        else:
            after = self._through(middle, text, picture, others)
            self.anchor, self.added = residual, (after[0] - text, after[1] - picture)
            text, picture = after
        return self._through(self.blocks[len(self.blocks) - self.back :] if self.back else [], text, picture, others)

    def _reuses(self, residual: torch.Tensor) -> bool:
        if self.step < self.warm_up or self.anchor is None:
            return False
        if self.most is not None and self.run >= self.most:
            return False
        return bool((residual - self.anchor).abs().mean() / self.anchor.abs().mean() < self.threshold)

    def _through(self, blocks: Sequence[Any], text: Any, picture: Any, others: Any) -> tuple[Any, Any]:
        for block in blocks:
            text, picture = block(hidden_states=picture, encoder_hidden_states=text, **others)
        return text, picture


class AsBlock(torch.nn.Module):
    """Puts the published algorithm in the place of all blocks."""

    def __init__(self, published: Published) -> None:
        super().__init__()
        self.published = published

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.published(*args, **kwargs)


@pytest.mark.parametrize(("front", "back"), [(1, 0), (1, 2), (3, 1), (4, 1), (2, 0)])
@pytest.mark.parametrize(("warm_up", "most"), [(0, None), (3, None), (0, 1), (4, 2)])
def test_it_is_the_published_algorithm(front: int, back: int, warm_up: int, most: int | None) -> None:
    ours, theirs = make("flux"), make("flux")
    published = Published(theirs, front, back, 0.12, warm_up, most)
    model: Any = theirs.denoiser
    model.transformer_blocks = torch.nn.ModuleList([AsBlock(published)])
    model.single_transformer_blocks = torch.nn.ModuleList()
    technique = DBCache(front=front, back=back, threshold=0.12, warm_up=warm_up, max_consecutive=most)
    with ours.accelerated(technique) as session:
        outputs = request(ours, drifting(ours, EVEN))
        (steps,) = session.evidence()[technique].step_map.values()
    expected = request(theirs, drifting(theirs, EVEN))
    assert list(steps) == published.computed
    assert 0 < sum(steps) < len(steps)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def test_the_blocks_in_front_and_back_always_run() -> None:
    rig = make("flux")
    technique = shallow(front=2, back=1, threshold=10.0)
    with ran_of(rig, "transformer_blocks", "single_transformer_blocks") as ran, rig.accelerated(technique):
        frozen(rig, 3)
    assert ran == [6, 3, 3]


def full_steps(technique: Technique, speeds: Sequence[float] = EVEN, architecture: str = "dit") -> list[int]:
    rig = make(architecture)
    steps = decisions(rig, technique, drifting(rig, speeds))
    return [index for index, full in enumerate(steps) if full]


def test_the_warm_up_and_the_longest_run_are_kept() -> None:
    assert full_steps(shallow(threshold=1e9)) == [0]
    assert full_steps(shallow(threshold=1e9, warm_up=4)) == [0, 1, 2, 3]
    assert full_steps(shallow(threshold=1e9, warm_up=2, max_consecutive=3)) == [0, 1, 5, 9, 13]


def test_a_mask_takes_the_place_of_the_warm_up_and_leaves_the_rest_to_the_threshold() -> None:
    assert full_steps(shallow(threshold=1e9, warm_up=9, step_mask="11000100000000")) == [0, 1, 5]
    dynamic = full_steps(shallow(threshold=0.1, step_mask="11000100000000"))
    assert {0, 1, 5} < set(dynamic)
    assert len(dynamic) < len(EVEN)


def test_a_static_mask_is_followed_whatever_changes() -> None:
    technique = shallow(threshold=1e-6, step_mask="11000100000000", mask_policy="static", max_consecutive=1)
    assert full_steps(technique) == [0, 1, 5]
    assert not technique.waits()


def test_a_preset_computes_the_last_step() -> None:
    assert full_steps(shallow(threshold=1e9, step_mask="ultra")) == [0, 1, 3, 6, 10, 13]


def test_decisions_follow_the_drift() -> None:
    """What matters is the way since the last computed step, not the change of a single step."""
    slow, fast = full_steps(shallow(), [0.0] + [0.02] * 13), full_steps(shallow(), [0.0] + [0.06] * 13)
    assert 1 < len(slow) < len(fast)
    late = full_steps(shallow(), [0.0] * 10 + [1.0] + [0.0] * 3)
    assert late == [0, 10]


def test_the_mean_over_a_batch_reuses_more_than_its_largest() -> None:
    counts: list[int] = []
    for how in ("max", "mean"):
        rig = make("dit")
        calls = drifting(rig, EVEN, batch=2)
        for given in calls:  # the second picture stands still
            given["hidden_states"] = torch.stack([given["hidden_states"][0], calls[0]["hidden_states"][1]])
        counts.append(sum(decisions(rig, shallow(over_batch=how), calls)))
    assert 1 < counts[1] < counts[0]


def test_the_forecast_goes_on_where_holding_stands_still() -> None:
    """Errors against the full model on an even drift, at the same decisions."""
    rig = make("dit")
    calls = drifting(rig, [0.0] + [0.01] * 11)
    plain = request(rig, calls)
    errors: list[float] = []
    for order in (0, 1):
        with rig.accelerated(shallow(threshold=1e9, step_mask="111010101010", mask_policy="static", forecast=order)):
            outputs = request(rig, calls)
        errors.append(sum(float((a - b).square().mean()) for a, b in zip(outputs, plain, strict=True)))
    assert 0 < errors[1] < errors[0] / 4


# Late decisions


@pytest.mark.parametrize("architecture", ["dit", "flux", "stable_diffusion"])
@pytest.mark.parametrize("threshold", [0.05, 0.1])
def test_on_an_even_drift_late_decisions_are_those_that_waiting_gives(architecture: str, threshold: float) -> None:
    """But for the second step, before which nothing is known."""
    late = full_steps(shallow(threshold=threshold, late=True), [0.0] + [0.02] * 19, architecture)
    waiting = full_steps(shallow(threshold=threshold, warm_up=2), [0.0] + [0.02] * 19, architecture)
    assert len(waiting) < 20
    assert abs(len(late) - len(waiting)) <= 1
    assert late[:3] == waiting[:3]


@pytest.mark.parametrize("technique", [FirstBlockCache(late=True), shallow(late=True)])
def test_a_late_decision_knows_nothing_of_its_own_step(technique: Technique) -> None:
    """A jump at step 10 is answered at step 11; who waits answers at once."""
    jump = [0.0] * 10 + [1.0] + [0.0] * 4
    assert 10 in full_steps(FirstBlockCache(), jump)
    assert full_steps(technique, jump) == [0, 1, 11]


def test_late_decisions_never_ask_for_the_number_of_their_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cache.engine import thresholds

    events: list[str] = []

    class Noted(thresholds.Reading):
        def __init__(self, number: torch.Tensor) -> None:
            events.append("sent")
            super().__init__(number)

        def value(self) -> float:
            events.append("read")
            return super().value()

    monkeypatch.setattr(thresholds, "Reading", Noted)
    full_steps(shallow(late=True))
    assert [name for name, _ in itertools.groupby(events[:8])] == ["sent", "read"] * 4
    assert events[-1] == "sent"
    events.clear()
    full_steps(shallow(late=False))
    assert not events, "who decides in the step itself asks at once"


def test_who_waits_says_so() -> None:
    assert FirstBlockCache().waits()
    assert DBCache().waits()
    assert not FirstBlockCache(late=True).waits()
    assert not DBCache(late=True).waits()


# U-Nets


@pytest.mark.parametrize("front", range(1, 9))
@pytest.mark.parametrize("architecture", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize("late", [False, True])
def test_a_unets_reused_step_with_the_same_input_equals_the_full_one(architecture: str, front: int, late: bool) -> None:
    pipe = Pipe(architecture)
    given = pipe.arguments(batch=2)
    plain = repeat(pipe, 1, given)
    with accelerate(pipe, DBCache(front=front, warm_up=0, late=late)) as session:
        assert equal(repeat(pipe, 4, given), plain * 4)
        (evidence,) = session.evidence().values()
        expected = (True, True, False, False) if late else (True, False, False, False)
        assert list(evidence.step_map.values()) == [expected]


@pytest.mark.parametrize("architecture", ["stable_diffusion", "sdxl"])
def test_a_unets_decisions_follow_the_change_of_its_outer_layers(architecture: str) -> None:
    """Computed by hand from what the outer down layers put out, less what entered them where shapes agree."""
    rig = make(architecture)
    calls = drifting(rig, [0.0] + [0.03] * 11)
    steps = decisions(rig, shallow(front=2, threshold=0.1), calls)
    anchor: torch.Tensor | None = None
    for full, given in zip(steps, calls, strict=True):
        residual = _outer(rig, given)
        change = 1.0 if anchor is None else float(relative_change(residual, anchor).max())
        assert full == (change >= 0.1)
        anchor = residual if full else anchor
    assert 1 < sum(steps) < len(steps)


@torch.no_grad()
def _outer(rig: Rig, given: dict[str, Any]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    down: Any = rig.denoiser.down_blocks[0]  # pyright: ignore
    layers = (down.attentions if hasattr(down, "attentions") else down.resnets)[1]
    handles = [
        down.register_forward_pre_hook(lambda _, args, kwargs: seen.append(_first(args, kwargs)), with_kwargs=True),
        layers.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)),
    ]
    rig.call(given)
    for handle in handles:
        handle.remove()
    before, after = seen
    return (after - before).flatten(2).transpose(1, 2)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


@pytest.mark.parametrize("front", [1, 3])
def test_a_controlnets_residuals_are_added_afresh(front: int) -> None:
    """With the same residuals a reused step equals the full one; other residuals change it."""
    pipe = Pipe("stable_diffusion")
    given = pipe.arguments()
    one, other = given | residuals(pipe, given, 1), given | residuals(pipe, given, 2)
    plain = repeat(pipe, 1, one)
    with accelerate(pipe, shallow(front=front, threshold=1e9)) as session:
        outputs = repeat(pipe, 3, one, one, other)
        (evidence,) = session.evidence().values()
    assert list(evidence.step_map.values()) == [(True, False, False)]
    assert equal(outputs[:2], plain * 2)
    assert not torch.equal(outputs[2], plain[0])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("architecture", ["stable_diffusion", "sdxl"])
def test_deciding_inside_a_unet_needs_no_more_graphs(architecture: str, late: bool) -> None:
    torch.compiler.reset()
    pipe, graphs = Pipe(architecture), Graphs()
    graphs.compile_blocks(pipe)
    sample(pipe, 2, pipe.arguments(1))
    plain = graphs.count
    with torch.compiler.set_stance("fail_on_recompile"):
        with accelerate(pipe, shallow(front=4, threshold=10.0, max_consecutive=2, late=late)) as session:
            for seed, steps in enumerate((4, 7, 3)):
                sample(pipe, steps, pipe.arguments(seed))
            assert session.evidence()
        sample(pipe, 2, pipe.arguments(1))
    assert graphs.count == plain


# Refusals


def test_the_published_defaults_are_too_deep_for_a_small_model_and_say_what_works() -> None:
    for architecture, largest in (("flux", 5), ("dit", 3)):
        with pytest.raises(Refused, match=f"front=8 leaves nothing to reuse; the largest front .* is {largest}"):
            accelerate(make(architecture), DBCache())
        with make(architecture).accelerated(DBCache(front=largest)):
            pass
    with pytest.raises(Refused, match="back=4 leaves nothing"):
        accelerate(make("dit"), DBCache(front=1, back=4))
    with pytest.raises(Refused, match="the largest front that works here is 8"):
        accelerate(make("stable_diffusion"), DBCache(front=9))


def test_a_bad_mask_is_refused_where_it_is_written() -> None:
    with pytest.raises(InvalidSetting, match=r"DBCache: step_mask='quick' is no step mask"):
        DBCache(step_mask="quick")


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    rig = make("dit")
    rig.denoiser.compile(backend="eager")
    with pytest.raises(Refused, match="compiled as a whole"):
        accelerate(rig, shallow())


def test_example_arguments_are_what_the_model_takes() -> None:
    rig = make("dit")
    assert rig.call(example(rig)).isfinite().all()
