from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cache_harness import Arguments, Graphs, Pipe, equal, executed, repeat, sample
from torch import nn

from hasten.cache.fora import FORA, BranchReuse
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


def branch_outputs(model: Any, names: tuple[str, ...], given: Arguments) -> dict[str, Any]:
    """What each branch puts out in a complete call, by path."""
    found: dict[str, Any] = {}
    handles = [
        part.register_forward_hook(lambda *call, path=path: found.setdefault(path, call[2]))
        for path, part in model.named_modules()
        if path.count(".") == 2 and path.rpartition(".")[2] in names
    ]
    model(**given)
    for handle in handles:
        handle.remove()
    return found


def dit_by_hand(model: Any, given: Arguments, known: dict[str, Any]) -> torch.Tensor:
    """DiT with fresh gates, and everything before the gates as known."""
    hidden = model.pos_embed(given["hidden_states"])
    time, label = given["timestep"], given["class_labels"]
    for i, block in enumerate(model.transformer_blocks):
        _, gate_attention, _, _, gate_mlp = block.norm1(hidden, time, label, hidden_dtype=hidden.dtype)
        hidden = gate_attention.unsqueeze(1) * known[f"transformer_blocks.{i}.attn1"] + hidden
        hidden = gate_mlp.unsqueeze(1) * known[f"transformer_blocks.{i}.ff"] + hidden
    emb = model.transformer_blocks[0].norm1.emb(time, label, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(emb)).chunk(2, dim=1)
    hidden = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
    side, patch = int(hidden.shape[1] ** 0.5), model.patch_size
    hidden = hidden.reshape(-1, side, side, patch, patch, model.out_channels).permute(0, 5, 1, 3, 2, 4)
    return hidden.reshape(-1, model.out_channels, side * patch, side * patch)


def flux_by_hand(model: Any, given: Arguments, known: dict[str, Any]) -> torch.Tensor:
    """FLUX with fresh gates, and everything before the gates as known."""
    hidden, text = model.x_embedder(given["hidden_states"]), model.context_embedder(given["encoder_hidden_states"])
    emb = model.time_text_embed(given["timestep"] * 1000, given["guidance"] * 1000, given["pooled_projections"])
    for i, block in enumerate(model.transformer_blocks):
        at = f"transformer_blocks.{i}"
        _, gate, _, _, gate_mlp = block.norm1(hidden, emb=emb)
        _, text_gate, _, _, text_gate_mlp = block.norm1_context(text, emb=emb)
        image, context = known[f"{at}.attn"]
        hidden = hidden + gate.unsqueeze(1) * image
        hidden = hidden + gate_mlp.unsqueeze(1) * known[f"{at}.ff"]
        text = text + text_gate.unsqueeze(1) * context
        text = text + text_gate_mlp.unsqueeze(1) * known[f"{at}.ff_context"]
    tokens = text.shape[1]
    joined = torch.cat([text, hidden], dim=1)
    for i, block in enumerate(model.single_transformer_blocks):
        _, gate = block.norm(joined, emb=emb)
        joined = joined + gate.unsqueeze(1) * known[f"single_transformer_blocks.{i}.proj_out"]
    return model.proj_out(model.norm_out(joined[:, tokens:], emb))


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


def test_a_step_after_an_interrupted_one_computes(pipe: Pipe) -> None:
    """Within one request: what an interrupted complete step has kept so far is not used."""
    given = pipe.arguments(1)
    with torch.no_grad():
        expected = pipe.model(**given)[0]
    with accelerate(pipe, FORA()) as session, torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        norm = pipe.model.transformer_blocks[2].norm1
        handle = norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipe.model(**given)
        handle.remove()
        picture = torch.zeros(1, 4, 4, 4)
        pipe.scheduler.step(picture, pipe.scheduler.timesteps[0], picture)
        assert torch.equal(pipe.model(**given)[0], expected)
        with pytest.raises(NotEngaged):
            session.evidence()


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_regional_compilation_needs_at_most_twice_the_graphs(architecture: str) -> None:
    counts: dict[str, int] = {}
    for order in ("plain", "patch first", "compile first"):
        torch.compiler.reset()
        pipe, graphs = Pipe(architecture), Graphs()
        if order == "compile first":
            graphs.compile_blocks(pipe)
        session = None if order == "plain" else accelerate(pipe, FORA())
        if order != "compile first":
            graphs.compile_blocks(pipe)
        sample(pipe, 3, pipe.arguments(1))
        counts[order] = graphs.count
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed, steps in enumerate((4, 2, 3)):
                sample(pipe, steps, pipe.arguments(seed), pipe.arguments(seed + 5))
        assert graphs.count == counts[order]
        if session is not None:
            assert session.evidence()
            session.close()
    assert counts["plain"] < counts["patch first"] == counts["compile first"] <= 2 * counts["plain"]


def test_compiled_blocks_give_the_same_pictures() -> None:
    pipe, other = Pipe("flux"), Pipe("flux")
    given = pipe.arguments(1), pipe.arguments(2)
    Graphs().compile_blocks(other)
    with accelerate(pipe, FORA(interval=3)), accelerate(other, FORA(interval=3)):
        assert equal(sample(pipe, 5, *given), sample(other, 5, *given))


def test_reuse_that_does_not_happen_is_noticed(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BranchReuse, "install", lambda *_: None)
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
    with pytest.raises(Refused, match="chunked"):
        accelerate(pipe, FORA())


def test_refusals_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="DeepCache is the cache for U-Nets"):
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
