"""First Block Cache against the published algorithm, and everything that must make it compute."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from hasten.cache.engine.change import relative_change
from hasten.cache.engine.statistics import Statistics
from hasten.cache.first_block import FirstBlockCache
from hasten.core.errors import NotEngaged
from hasten.core.registry import specs
from hasten.core.session import Session, accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from hasten.core.workload import Workload
from tests.contract.rigs import Rig, make

ALWAYS = FirstBlockCache(threshold=1e30)
Arguments = dict[str, Any]


class Runner:
    """A small FLUX that is called with given pictures at the steps of a real scheduler."""

    def __init__(self, **layers: int) -> None:
        spec = specs()["flux"]
        self.rig = Rig(spec, spec.build({**spec.tiny, **layers}), nn.Identity())
        self.given = spec.example(spec.tiny, InputSize(height=8, width=8, text_tokens=4))
        self.other = spec.example(spec.tiny, InputSize(height=8, width=8, text_tokens=4), seed=1)
        self.model: Any = self.rig.denoiser

    def drifting(self, steps: int, speed: float = 0.05) -> list[Arguments]:
        """Pictures that move from one to another at an even speed."""
        start, end = self.given["hidden_states"], self.other["hidden_states"]
        return [self.given | {"hidden_states": start + step * speed * end} for step in range(steps)]

    @torch.no_grad()
    def request(self, calls: Sequence[Arguments | Sequence[Arguments]], contexts: tuple[str, ...] = ("",)) -> list[Any]:
        """One request; at each step one call, or one for each context."""
        self.rig.scheduler.set_timesteps(len(calls))
        outputs: list[Any] = []
        for step, timestep in zip(calls, self.rig.scheduler.timesteps, strict=True):
            for context, given in zip(contexts, [step] if isinstance(step, dict) else step, strict=True):
                with self.model.cache_context(context) if context else nullcontext():
                    outputs.append(self.model(**given)[0])
            self.rig.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        return outputs


@contextmanager
def recorded(runner: Runner, technique: FirstBlockCache = ALWAYS) -> Generator[tuple[Session, list[bool]]]:
    """Apply the technique; yields for each call whether the blocks after the first ran."""
    ran: list[bool] = []
    lists = (runner.model.transformer_blocks, runner.model.single_transformer_blocks)
    blocks: list[Any] = [block for blocks in lists for block in blocks]
    handles = [
        blocks[0].register_forward_hook(lambda *_: ran.append(False)),
        blocks[-1].register_forward_hook(lambda *_: ran.__setitem__(-1, True)),
    ]
    with accelerate(runner.rig, technique) as session:
        yield session, ran
    for handle in handles:
        handle.remove()


class Published(nn.Module):
    """The published algorithm, written down plainly: one module in place of all blocks."""

    def __init__(self, blocks: Sequence[Any], threshold: float) -> None:
        super().__init__()
        self.blocks, self.threshold, self.ran = list(blocks), threshold, list[bool]()
        self.first: Any = None
        self.added: Any = None

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, **others: Any) -> Any:
        text, picture = self.blocks[0](hidden_states, encoder_hidden_states, **others)
        residual = picture - hidden_states
        if self.first is not None:
            change = (residual - self.first).abs().mean() / self.first.abs().mean()
            if change < self.threshold:
                self.ran.append(False)
                return text + self.added[0], picture + self.added[1]
        self.ran.append(True)
        self.first, head = residual, (text, picture)
        for block in self.blocks[1:]:
            text, picture = block(hidden_states=picture, encoder_hidden_states=text, **others)
        self.added = (text - head[0], picture - head[1])
        return text, picture


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.08, 0.2, 10.0])
def test_it_is_the_published_algorithm(threshold: float) -> None:
    ours, theirs = Runner(), Runner()
    blocks = [*theirs.model.transformer_blocks, *theirs.model.single_transformer_blocks]
    published = Published(blocks, threshold)
    theirs.model.transformer_blocks = nn.ModuleList([published])
    theirs.model.single_transformer_blocks = nn.ModuleList()
    with recorded(ours, FirstBlockCache(threshold=threshold)) as (_, ran):
        outputs = ours.request(ours.drifting(12))
    expected = theirs.request(theirs.drifting(12))
    assert ran == published.ran
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    if 0.0 < threshold < 10.0:
        assert 0 < sum(ran) < 12


def test_a_larger_threshold_reuses_more() -> None:
    runner = Runner()
    counts: list[int] = []
    for threshold in (0.0, 0.01, 0.03, 0.08, 0.2, 0.6, 1e30):
        with recorded(runner, FirstBlockCache(threshold=threshold)) as (_, ran):
            runner.request(runner.drifting(12))
        counts.append(sum(ran))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (12, 1)
    assert len(set(counts)) >= 4


def stacked(*parts: Arguments) -> Arguments:
    """One batch of several calls."""
    batched = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
    return {k: torch.cat([part[k] for part in parts]) if k in batched else parts[0][k] for k in parts[0]}


def test_the_sample_that_changes_most_decides_for_its_batch() -> None:
    runner = Runner()
    still, moving = [runner.given] * 8, runner.drifting(8)
    both = [stacked(a, b) for a, b in zip(still, moving, strict=True)]
    text = both[0]["encoder_hidden_states"]
    patterns: list[list[bool]] = []
    for calls in (still, moving, [given | {"encoder_hidden_states": text} for given in both]):
        with recorded(runner, FirstBlockCache(threshold=0.08)) as (_, ran):
            runner.request(calls)
        patterns.append(list(ran))
    assert patterns[0] == [True] + [False] * 7
    assert patterns[2] == patterns[1] != patterns[0]


def test_relative_change_is_per_sample() -> None:
    anchor = torch.tensor([[1.0, -1.0], [2.0, 2.0], [0.0, 0.0]])
    change = relative_change(anchor + torch.tensor([[0.5], [0.5], [1.0]]), anchor)
    assert torch.allclose(change[:2], torch.tensor([0.5, 0.25]))
    assert change[2] > 1e9
    assert relative_change(anchor.bfloat16(), anchor.bfloat16()).dtype == torch.float32


def test_the_branch_that_comes_first_decides_for_its_step() -> None:
    runner, technique = Runner(), FirstBlockCache(threshold=0.08)
    slow, fast = runner.drifting(8, 0.02), runner.drifting(8, 0.2)
    alone: list[list[bool]] = []
    for calls in (slow, fast):
        with recorded(runner, technique) as (_, ran):
            runner.request(calls)
        alone.append(list(ran))
    assert alone[0] != alone[1]
    for contexts in (("cond", "uncond"), ("", "")):
        for leading, pair in zip(alone, ((slow, fast), (fast, slow)), strict=True):
            with recorded(runner, technique) as (session, ran):
                runner.request(list(zip(*pair, strict=True)), contexts)
            assert [ran[::2], ran[1::2]] == [leading, leading]
            assert list(session.evidence()[technique].step_map.values()) == [tuple(leading)] * 2


def test_each_branch_reuses_its_own_residual() -> None:
    runner = Runner()
    still = {"cond": [runner.given] * 3, "uncond": [runner.other] * 3}
    with torch.no_grad():
        expected = {name: runner.model(**calls[0])[0] for name, calls in still.items()}
    with recorded(runner) as (_, ran):
        outputs = runner.request(list(zip(*still.values(), strict=True)), tuple(still))
    assert ran == [True, True, False, False, False, False]
    for index, name in enumerate(still):
        torch.testing.assert_close(outputs[4 + index], expected[name], atol=1e-5, rtol=1e-5)


def shorter_text(given: Arguments) -> Arguments:
    return given | {"encoder_hidden_states": given["encoder_hidden_states"][:, :2], "txt_ids": given["txt_ids"][:2]}


def smaller_picture(given: Arguments) -> Arguments:
    return given | {"hidden_states": given["hidden_states"][:, :8], "img_ids": given["img_ids"][:8]}


def batch_of_two(given: Arguments) -> Arguments:
    return stacked(given, given)


@pytest.mark.parametrize("change", [shorter_text, smaller_picture, batch_of_two])
def test_a_change_of_shape_computes(change: Callable[[Arguments], Arguments]) -> None:
    runner = Runner()
    other = change(runner.given)
    with torch.no_grad():
        expected = runner.model(**other)[0]
    with recorded(runner) as (_, ran):
        outputs = runner.request([runner.given, runner.given, other, other, runner.given])
        assert ran == [True, False, True, False, True]
        assert torch.equal(outputs[2], expected)
        ran.clear()
        assert torch.equal(runner.request([other, runner.given])[0], expected)
        assert ran == [True, True]


def test_a_request_never_uses_another_ones_results() -> None:
    runner = Runner()
    with torch.no_grad():
        expected = runner.model(**runner.other)[0]
    with recorded(runner) as (_, ran):
        for _ in range(3):
            runner.request([runner.given] * 2)
            assert torch.equal(runner.request([runner.other])[0], expected)
    assert ran == [True, False, True] * 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_residual_computes(poison: float) -> None:
    runner = Runner()
    broken = runner.given | {"hidden_states": runner.given["hidden_states"].clone()}
    broken["hidden_states"][0, 0, 0] = poison
    with recorded(runner) as (_, ran):
        runner.request([broken] * 3)
        assert ran == [True] * 3
        ran.clear()
        outputs = runner.request([runner.given, broken, runner.given, runner.given])
        assert ran == [True, True, True, False]
        assert outputs[2].isfinite().all()


def test_a_failure_between_head_and_tail_leaves_nothing_to_reuse() -> None:
    runner = Runner()
    last = runner.model.single_transformer_blocks[-1]

    def fail(*_: object) -> None:
        raise InterruptedError

    with recorded(runner, FirstBlockCache(threshold=0.05)) as (_, ran), torch.no_grad():
        runner.rig.scheduler.set_timesteps(4)
        sample = torch.zeros(1)
        runner.model(**runner.given)
        sample = runner.rig.scheduler.step(sample, runner.rig.scheduler.timesteps[0], sample)[0]
        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            runner.model(**runner.other)
        handle.remove()
        runner.rig.scheduler.step(sample, runner.rig.scheduler.timesteps[1], sample)
        runner.model(**runner.other)
    assert ran == [True, False, True]


@pytest.mark.parametrize(
    "layers", [{"num_layers": 0}, {"num_single_layers": 0}, {"num_layers": 1, "num_single_layers": 1}]
)
def test_lists_of_any_length(layers: dict[str, int]) -> None:
    runner = Runner(**layers)
    with torch.no_grad():
        expected = runner.model(**runner.given)[0]
    with recorded(runner) as (session, _):
        outputs = runner.request([runner.given] * 3)
        assert session.evidence()[ALWAYS].reused_steps == 2
    assert all(torch.allclose(output, expected, atol=1e-6) for output in outputs)


def test_a_model_of_one_block_is_refused() -> None:
    runner = Runner(num_layers=1, num_single_layers=0)
    (reason,) = ALWAYS.problems(Target.of(runner.rig))
    assert reason == "FluxTransformer2DModel has only 1 block, so nothing is left to reuse."


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    runner = Runner()
    runner.model.compile(backend="eager")
    (reason,) = ALWAYS.problems(Target.of(runner.rig))
    assert reason == "FluxTransformer2DModel is compiled as a whole; compile its blocks instead (CompileBlocks)."


def test_evidence_counts_calls_and_maps_the_last_request() -> None:
    runner, technique = Runner(), FirstBlockCache(threshold=1e-9)
    with recorded(runner, technique) as (session, _):
        with pytest.raises(NotEngaged, match="saw no denoiser call"):
            session.evidence()
        runner.request(runner.drifting(3))
        with pytest.raises(NotEngaged, match="never reused anything in 3 .*raise its threshold"):
            session.evidence()
    with recorded(runner) as (session, _):
        runner.request([runner.given] * 3)
        runner.request([runner.given] * 2)
        evidence = session.evidence()[ALWAYS]
        assert (evidence.full_steps, evidence.reused_steps) == (2, 3)
        assert evidence.step_map == {"transformer call 1": (True, False)}
        assert session.state(ALWAYS, Statistics).reused == 3


def test_a_threshold_of_zero_is_the_plain_model() -> None:
    runner, off = Runner(), FirstBlockCache(threshold=0.0)
    plain = runner.request([runner.given] * 3)
    with recorded(runner, off) as (session, ran):
        assert all(torch.equal(a, b) for a, b in zip(runner.request([runner.given] * 3), plain, strict=True))
        assert ran == [True] * 3
        assert session.evidence()[off].reused_steps == 0


def test_two_denoisers_keep_their_own_results() -> None:
    one, two = Runner(), Runner()
    pipeline = one.rig
    pipeline.components = {"transformer": one.model, "transformer_2": two.model, "scheduler": pipeline.scheduler}
    with torch.no_grad(), accelerate(pipeline, ALWAYS) as session:
        pipeline.scheduler.set_timesteps(4)
        sample = torch.zeros(1)
        for index, timestep in enumerate(pipeline.scheduler.timesteps):
            (one if index < 2 else two).model(**one.given)
            sample = pipeline.scheduler.step(sample, timestep, sample)[0]
        assert session.evidence()[ALWAYS].step_map == {
            "transformer call 1": (True, False),
            "transformer_2 call 1": (True, False),
        }


def test_the_cost_needs_a_measurement() -> None:
    assert ALWAYS.cost(Target.of(Runner().rig), Workload()).basis == "measured"


@pytest.mark.parametrize("architecture", [name for name, spec in specs().items() if spec.stacks])
def test_reusing_with_the_same_input_gives_the_same_output(architecture: str) -> None:
    rig = make(architecture)
    given = rig.spec.example(rig.spec.tiny)
    blocks: list[Any] = [block for _, block in Target.of(rig).denoisers[0].of_class(rig.spec.stacks[-1].block)]
    ran: list[bool] = []
    blocks[-1].register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad(), rig.accelerated(ALWAYS):
        rig.scheduler.set_timesteps(2)
        computed = rig.denoiser(**given, return_dict=False)[0]
        rig.scheduler.step(torch.zeros(1), rig.scheduler.timesteps[0], torch.zeros(1))
        reused = rig.denoiser(**given, return_dict=False)[0]
    assert len(ran) == 1
    assert type(reused) is type(computed)
    torch.testing.assert_close(reused, computed, atol=1e-5, rtol=1e-5)
