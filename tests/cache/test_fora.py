from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from by_hand import branch_outputs, dit_by_hand, flux_by_hand
from cache_harness import Graphs, Pipe, equal, executed, repeat, sample
from torch import nn

from hasten.cache.engine.branches import BranchSite
from hasten.cache.fora import FORA
from hasten.core.errors import NotEngaged, Refused
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload

ARCHITECTURES = ("dit", "flux")
PARTS = {"dit": ("attn1", "ff"), "flux": ("attn", "ff", "ff_context", "proj_out", "proj_mlp")}


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pipe(request: pytest.FixtureRequest) -> Pipe:
    return Pipe(request.param)


def test_a_reused_step_with_the_same_input_equals_the_full_one(pipe: Pipe) -> None:
    given = pipe.arguments(batch=2)
    plain = repeat(pipe, 1, given)
    with accelerate(pipe, FORA(interval=3)) as session:
        assert equal(repeat(pipe, 5, given), plain * 5)
        (evidence,) = session.evidence().values()
    assert evidence.step_map == {"transformer call 1": (True, False, False, True, False)}


def test_a_reused_step_gates_known_outputs_afresh(pipe: Pipe) -> None:
    first, later = pipe.arguments(1), pipe.arguments(2)
    later["timestep"] = later["timestep"] * 3 // 4 if pipe.spec.name == "dit" else later["timestep"] * 0.75
    by_hand = dit_by_hand if pipe.spec.name == "dit" else flux_by_hand
    with torch.no_grad():
        expected = by_hand(pipe.model, later, branch_outputs(pipe.model, PARTS[pipe.spec.name], first))
        fresh = pipe.model(**later)[0]
    with accelerate(pipe, FORA()):
        reused = repeat(pipe, 2, first, later)[1]
    assert torch.equal(reused, expected)
    assert not torch.equal(reused, fresh)


def test_a_reused_step_runs_no_linear_layer_of_a_branch(pipe: Pipe) -> None:
    given = pipe.arguments()
    with accelerate(pipe, FORA()), executed(pipe.model, nn.Linear) as names:
        repeat(pipe, 1, given)
        full = list(names)
        names.clear()
        repeat(pipe, 2, given)
    reused = names[len(full) :]
    left_out = [name for name in full if set(name.split(".")[2:]) & set(PARTS[pipe.spec.name])]
    assert len(left_out) >= 4 * len(pipe.model.transformer_blocks)
    assert sorted(reused + left_out) == sorted(full)


def test_three_requests_with_other_prompts_and_step_counts(pipe: Pipe) -> None:
    requests = [(4, pipe.arguments(1)), (7, pipe.arguments(2)), (3, pipe.arguments(3))]
    alone: list[list[torch.Tensor]] = []
    for steps, given in requests:
        with accelerate(pipe, FORA(interval=3)):
            alone.append(sample(pipe, steps, given))
    with accelerate(pipe, FORA(interval=3)) as session:
        for (steps, given), expected in zip(requests, alone, strict=True):
            assert equal(sample(pipe, steps, given), expected)
            (evidence,) = session.evidence().values()
            assert evidence.step_map == {"transformer call 1": tuple(i % 3 == 0 for i in range(steps))}
        (evidence,) = session.evidence().values()
    assert (evidence.full_steps, evidence.reused_steps) == (2 + 3 + 1, 2 + 4 + 2)


def test_a_request_after_an_aborted_one_starts_afresh(pipe: Pipe) -> None:
    given = pipe.arguments(1)
    with accelerate(pipe, FORA()):
        expected = sample(pipe, 5, given)
    with accelerate(pipe, FORA()):
        sample(pipe, 9, pipe.arguments(2), stop_after=1)
        assert equal(sample(pipe, 5, given), expected)


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_mid_run_leaves_nothing_behind(pipe: Pipe, failing: int) -> None:
    """A computed and a reused step are interrupted half-way."""
    given = pipe.arguments(1)
    plain = sample(pipe, 5, given)
    with accelerate(pipe, FORA()) as session:
        expected = sample(pipe, 5, given)
        calls = iter(range(99))
        norm = pipe.model.transformer_blocks[2].norm1
        handle = norm.register_forward_hook(lambda *_: 1 / (next(calls) != failing) and None)
        with pytest.raises(ZeroDivisionError):
            sample(pipe, 5, given)
        handle.remove()
        assert equal(sample(pipe, 5, given), expected)
        assert session.evidence()
    assert equal(sample(pipe, 5, given), plain)


def test_a_step_after_an_interrupted_complete_one_computes(pipe: Pipe) -> None:
    """Within one request: neither what the interrupted step has kept so far is used, nor what it was to replace."""
    given, later = pipe.arguments(1), pipe.arguments(2)
    with torch.no_grad():
        expected = pipe.model(**later)[0]
    with accelerate(pipe, FORA()) as session, torch.no_grad():
        repeat(pipe, 9, given, stop_after=2)
        handle = pipe.model.transformer_blocks[2].norm1.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipe.model(**given)
        handle.remove()
        picture = torch.zeros(1, 4, 4, 4)
        pipe.scheduler.step(picture, pipe.scheduler.timesteps[2], picture)
        assert torch.equal(pipe.model(**later)[0], expected)
        (evidence,) = session.evidence().values()
    assert evidence.step_map["transformer call 1"] == (True, False, True)


def test_guidance_branches_do_not_mix(pipe: Pipe) -> None:
    """Frozen inputs: every branch must give its own full result, however they alternate."""
    one, other = pipe.arguments(1), pipe.arguments(2, text_tokens=5)
    with torch.no_grad():
        expected = [pipe.model(**given)[0] for given in (one, other)]
    with accelerate(pipe, FORA()) as session, torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        picture = torch.zeros(1, 4, 4, 4)
        for timestep in pipe.scheduler.timesteps:
            assert equal([pipe.model(**given)[0] for given in (one, other)], expected)
            pipe.scheduler.step(picture, timestep, picture)
        (evidence,) = session.evidence().values()
    reused = (True, False, True, False)
    assert evidence.step_map == dict.fromkeys(("transformer call 1", "transformer call 2"), reused)


def test_what_the_outputs_do_not_fit_is_computed(pipe: Pipe) -> None:
    given, other = pipe.arguments(1), pipe.arguments(1, batch=2)
    with torch.no_grad():
        expected = pipe.model(**other)[0]
    with accelerate(pipe, FORA(interval=9)) as session:
        outputs = repeat(pipe, 4, given, other, other, given)
        (evidence,) = session.evidence().values()
    assert equal(outputs[1:3], [expected] * 2)
    assert evidence.step_map["transformer call 1"] == (True, True, False, True)


def test_interval_one_changes_nothing(pipe: Pipe) -> None:
    given = pipe.arguments()
    plain = sample(pipe, 3, given)
    with accelerate(pipe, FORA(interval=1)) as session:
        assert equal(sample(pipe, 3, given), plain)
        (evidence,) = session.evidence().values()
    assert (evidence.full_steps, evidence.reused_steps) == (3, 0)


def test_leaving_gives_back_the_model_and_others_are_untouched(pipe: Pipe) -> None:
    other, given = Pipe(pipe.spec.name, seed=1), pipe.arguments()
    plain, foreign = sample(pipe, 4, given), sample(other, 4, given)
    classes = [type(part) for part in pipe.model.modules()]
    with accelerate(pipe, FORA()):
        assert not equal(sample(pipe, 4, given), plain)
        assert equal(sample(other, 4, given), foreign)
        assert list(pipe.model.state_dict()) == list(other.model.state_dict())
    assert [type(part) for part in pipe.model.modules()] == classes
    assert equal(sample(pipe, 4, given), plain)


@pytest.mark.parametrize(("architecture", "patch_first"), [("dit", True), ("flux", False)])
def test_regional_compilation_needs_at_most_twice_the_graphs(architecture: str, patch_first: bool) -> None:
    plain = graphs_of_plain(architecture)
    torch.compiler.reset()
    pipe, graphs = Pipe(architecture), Graphs()
    given = pipe.arguments(1), pipe.arguments(2)
    with accelerate(pipe, FORA()):
        expected = sample(pipe, 3, *given)
    if not patch_first:
        graphs.compile_blocks(pipe)
    with accelerate(pipe, FORA()) as session:
        if patch_first:
            graphs.compile_blocks(pipe)
        assert equal(sample(pipe, 3, *given), expected)
        assert plain < (count := graphs.count) <= 2 * plain
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed, steps in enumerate((4, 2, 3)):
                sample(pipe, steps, pipe.arguments(seed), pipe.arguments(seed + 5))
        assert graphs.count == count
        assert session.evidence()


def graphs_of_plain(architecture: str) -> int:
    torch.compiler.reset()
    pipe, graphs = Pipe(architecture), Graphs()
    graphs.compile_blocks(pipe)
    sample(pipe, 3, pipe.arguments(1))
    return graphs.count


def test_reuse_that_does_not_happen_is_noticed(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BranchSite, "install", lambda *_: None)
    with accelerate(pipe, FORA()) as session:
        sample(pipe, 4, pipe.arguments())
        with pytest.raises(NotEngaged, match="never reused"):
            session.evidence()


def test_a_branch_that_runs_twice_in_a_call_is_not_reused() -> None:
    pipe = Pipe("dit")
    given = pipe.arguments()
    with accelerate(pipe, FORA()) as session:
        for block in pipe.model.transformer_blocks:
            block.set_chunk_feed_forward(32, 1)
        with torch.no_grad():
            expected = pipe.model(**given)[0]
        assert equal(repeat(pipe, 4, given), [expected] * 4)
        with pytest.raises(NotEngaged, match="never reused"):
            session.evidence()
    with pytest.raises(Refused, match="in chunks"):
        accelerate(pipe, FORA())


def test_refusals_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="DeepCache and FirstBlockCache are caches for U-Nets"):
        accelerate(Pipe("stable_diffusion"), FORA())
    with pytest.raises(Refused, match="does not know the blocks of Linear"):
        accelerate(nn.Linear(2, 2), FORA())
    pipe = Pipe("dit")
    for stack in pipe.spec.stacks:
        monkeypatch.setitem(stack.__dict__, "branches", ())
    with pytest.raises(Refused, match="names no branches"):
        accelerate(pipe, FORA())


def test_the_predicted_cost_is_counted(pipe: Pipe) -> None:
    technique, workload = FORA(interval=4), Workload(width=128, height=128, max_sequence_length=8)
    cost = technique.cost(Target.of(pipe), workload)
    batch = 2 if pipe.spec.guidance == "batched" else 1
    known = branch_outputs(pipe.model, PARTS[pipe.spec.name], pipe.arguments(batch=batch))
    kept = [value for path, value in known.items() if not needless(path)]
    assert cost.extra_bytes == sum(4 * part.numel() for value in kept for part in as_tuple(value))
    assert cost.time_factor is not None
    assert 0.25 < cost.time_factor < 0.35


def needless(path: str) -> bool:
    """A sub-module that only feeds a single-stream block's branch."""
    return path.startswith("single_") and path.rpartition(".")[2] in ("attn", "proj_mlp")


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
