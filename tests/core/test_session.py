"""Sessions: half-applied, nested, closed in any order, permanent - and what they say about themselves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from hasten.attention import AttentionBackend
from hasten.cache import FORA, FirstBlockCache
from hasten.cache.engine.statistics import Statistics
from hasten.compilation import ChannelsLast, CompileBlocks
from hasten.core.errors import HastenError, NoEffect, NotEngaged, PatchError, Refused
from hasten.core.patch import Patch
from hasten.core.recipe import Recipe
from hasten.core.session import Session, accelerate, apply_permanently
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload
from tests.contract.rigs import Rig, fingerprint, make, plain_output

CACHE = FirstBlockCache(threshold=10.0)
MATH = AttentionBackend(name="math")
COMPILE = CompileBlocks(backend="eager")
NHWC = ChannelsLast()
NESTED = [*((pair, "flux") for pair in itertools.permutations((CACHE, MATH, NHWC), 2)), ((COMPILE, CACHE), "dit")]


@dataclass(frozen=True, kw_only=True)
class Half(Technique):
    """Changes the denoiser, then fails, does nothing, or succeeds."""

    stage: ClassVar[Stage] = Stage.COMPILE
    then: str = "fail"

    def problems(self, target: Target) -> tuple[str, ...]:
        return ()

    def apply(self, target: Target, patch: Patch) -> None:
        if self.then == "nothing":
            return
        denoiser = target.denoisers[0].module
        patch.set(denoiser, "half", True, "is half changed")
        patch.around(denoiser, lambda call, *a, **k: call(*a, **k), "is watched")
        if self.then == "fail":
            raise RuntimeError("no further")

    def engaged(self, session: Session) -> Evidence:
        return Evidence(summary="always")

    def cost(self, target: Target, workload: Workload) -> Cost:
        return Cost()


@pytest.mark.parametrize(("technique", "error"), [(Half(), RuntimeError), (Half(then="nothing"), NoEffect)])
def test_failing_halfway_undoes_what_was_done(technique: Technique, error: type[Exception]) -> None:
    rig = make("flux")
    before = fingerprint(rig)
    with pytest.raises(error):
        rig.accelerated(CACHE, MATH, technique)
    assert fingerprint(rig) == before
    with rig.accelerated(CACHE):
        rig.run()


def test_a_refused_recipe_changes_nothing() -> None:
    rig = make("flux")
    before = fingerprint(rig)
    with pytest.raises(Refused) as caught:
        rig.accelerated(CACHE, FORA(), CompileBlocks(backend="nonsense"))
    assert len(caught.value.reasons) == 2
    assert fingerprint(rig) == before


@pytest.mark.parametrize("wrong_order", [False, True])
@pytest.mark.parametrize(("pair", "architecture"), NESTED, ids=str)
def test_nested_sessions_close_in_any_order(
    pair: tuple[Technique, Technique], architecture: str, wrong_order: bool
) -> None:
    rig, (outer, inner) = make(architecture), pair
    before = fingerprint(rig)
    first, second = rig.accelerated(outer), rig.accelerated(inner)
    rig.run()
    both = {**first.evidence(), **second.evidence()}
    assert set(both) == {outer, inner}
    closing = (first, second) if wrong_order else (second, first)
    closing[0].close()
    rig.run()
    closing[1].close()
    assert fingerprint(rig)[1:] == before[1:]
    assert torch.equal(rig.run(), plain_output(architecture))


def test_nested_sessions_work_as_one_recipe() -> None:
    one, nested = make("flux"), make("flux")
    with one.accelerated(CACHE, MATH):
        expected = one.run()
    with nested.accelerated(CACHE), nested.accelerated(MATH):
        assert torch.equal(nested.run(), expected)


def test_an_inner_session_cannot_take_what_an_outer_one_has() -> None:
    rig = make("flux")
    with rig.accelerated(CACHE):
        expected = rig.run()
        for rival in (FORA(), FirstBlockCache(threshold=0.5)):
            with pytest.raises(Refused, match=r"which FirstBlockCache of a session that is still open has taken"):
                rig.accelerated(rival)
        assert torch.equal(rig.run(), expected)
    with rig.accelerated(FORA()):
        rig.run()


def test_what_is_permanent_stays_taken() -> None:
    rig = make("flux")
    apply_permanently(rig, CACHE)
    with pytest.raises(Refused, match="still open"):
        rig.accelerated(FORA())
    with make("flux").accelerated(FORA()):
        pass


def test_apply_permanently_is_not_taken_back() -> None:
    rig = make("flux")
    with apply_permanently(rig, Recipe((CACHE, MATH))) as session:
        inside = rig.run()
    assert torch.equal(rig.run(), inside)
    assert not torch.equal(inside, plain_output("flux"))
    assert session.evidence()[CACHE].reused_steps == 6


def test_closing_twice_and_describing_afterwards() -> None:
    rig = make("flux")
    before = fingerprint(rig)
    session = rig.accelerated(CACHE)
    rig.run()
    for _ in range(2):
        session.close()
    assert fingerprint(rig)[1:] == before[1:]
    assert "3 of 4 denoiser calls reused" in session.describe()


def test_describe_says_what_was_changed_where_and_what_it_did() -> None:
    rig = make("dit")
    with rig.accelerated(COMPILE, CACHE, MATH, NHWC) as session:
        before = session.describe().splitlines()
        rig.run()
        text = session.describe()
    assert before[0] == "Rig: 4 techniques applied"
    heads = [line for line in before[1:] if not line.startswith(" ")]
    assert heads == [
        "AttentionBackend(name='math')", "FirstBlockCache(threshold=10.0)", "ChannelsLast()",
        "CompileBlocks(backend='eager')",
    ]  # fmt: skip
    assert sum("not engaged: " in line for line in before) == 4
    assert "transformer.transformer_blocks: blocks are iterated lazily" in text
    assert "vae: convolution weights are laid out as NHWC" in text
    assert "engaged: 3 of 4 denoiser calls reused earlier results" in text
    assert "not engaged" not in text


def test_the_log_of_one_technique() -> None:
    rig = make("flux")
    with rig.accelerated(CACHE, MATH) as session:
        assert next(change.where for change in session.log(MATH)).startswith("transformer.")
        assert {change.what for change in session.log(MATH)} == {"attention is computed by the math kernel"}
        assert session.log(COMPILE) == ()
        assert session.recipe.techniques == (MATH, CACHE)


def test_state_of_a_technique_that_is_not_part_of_the_session() -> None:
    rig = make("flux")
    with rig.accelerated(CACHE) as session:
        assert isinstance(session.state(CACHE, Statistics), Statistics)
        with pytest.raises(HastenError, match="AttentionBackend keeps no Statistics in this session"):
            session.state(MATH, Statistics)
        with pytest.raises(HastenError, match="FirstBlockCache keeps no dict in this session"):
            session.state(CACHE, dict)
        with pytest.raises(NotEngaged, match="saw no denoiser call"):
            session.evidence()


def test_an_exception_in_the_block_passes_and_everything_is_restored() -> None:
    rig = make("flux")
    before = fingerprint(rig)
    with pytest.raises(ZeroDivisionError), rig.accelerated(CACHE, MATH, COMPILE, NHWC):
        raise ZeroDivisionError
    assert fingerprint(rig) == before


def test_a_foreign_change_is_reported_the_rest_restored_and_closing_again_works() -> None:
    rig = make("flux")
    before = fingerprint(rig)
    session = rig.accelerated(CACHE, MATH)
    attention: Any = rig.denoiser.get_submodule("transformer_blocks.0.attn")
    foreign = type("Foreign", (type(attention),), {})
    ours, attention.__class__ = type(attention), foreign
    with pytest.raises(PatchError, match="changed by other code"):
        session.close()
    assert type(rig.denoiser) is before[1][1]
    attention.__class__ = ours
    session.close()
    assert fingerprint(rig)[1:] == before[1:]


def test_text_recipe_and_technique_are_all_accepted() -> None:
    for recipe in ("AttentionBackend(name='math')", Recipe((MATH,)), MATH):
        rig = make("flux")
        with accelerate(rig, recipe) as session:
            assert session.recipe.techniques == (MATH,)


def test_a_bare_denoiser_and_a_ready_target() -> None:
    rig = make("flux")
    plain = rig.run()
    for subject in (rig.denoiser, Target.of(rig)):
        with accelerate(subject, CACHE):
            assert not torch.equal(rig.run(), plain)
        assert torch.equal(rig.run(), plain)


def test_an_empty_recipe_does_nothing() -> None:
    rig: Rig = make("flux")
    before = fingerprint(rig)
    with accelerate(rig, "plain") as session:
        assert fingerprint(rig) == before
        assert session.describe() == "Rig: 0 techniques applied"
