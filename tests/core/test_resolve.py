"""Plans: one order however a recipe is written, and every obstacle named before anything is loaded or changed."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from hasten.attention import AttentionBackend
from hasten.cache import FORA, DeepCache, FirstBlockCache
from hasten.compilation import ChannelsLast, CompileBlocks
from hasten.core.errors import HastenError, Refused
from hasten.core.recipe import Recipe
from hasten.core.resolve import clashes, describe_claim, overlap, resolve
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.technique import Stage, Technique, about
from tests.contract.rigs import make

COMPILE = CompileBlocks(backend="eager")
PARTS: tuple[Technique, ...] = (COMPILE, AttentionBackend(name="math"), FirstBlockCache(), ChannelsLast())


@dataclass(frozen=True, kw_only=True)
class Quantized(Technique):
    """Takes the weights of the linears that a glob names."""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    only: str = field(default="*", metadata=about("which linears"))

    def claims(self) -> tuple[str, ...]:
        return (f"linear.weight:{self.only}",)

    def problems(self, target: Target) -> tuple[str, ...]:
        return ()


@pytest.fixture(scope="module")
def flux() -> Target:
    return Target.of(make("flux"))


def test_the_order_of_writing_does_not_matter(flux: Target) -> None:
    plans = {resolve(Recipe(order), flux).techniques for order in itertools.permutations(PARTS)}
    assert len(plans) == 1
    stages = [technique.stage for technique in plans.pop()]
    assert stages == sorted(stages)


def test_equal_stages_have_a_fixed_order(flux: Target) -> None:
    parts = (Quantized(only="b"), Quantized(only="a"), FORA(), FirstBlockCache())
    plans = {resolve(Recipe(order), flux).techniques for order in itertools.permutations(parts)}
    assert plans == {(Quantized(only="a"), Quantized(only="b"), FORA(), FirstBlockCache())}


def test_a_conflict_names_both(flux: Target) -> None:
    (refusal,) = resolve(Recipe((FORA(), FirstBlockCache())), flux).refusals
    assert refusal == "FORA and FirstBlockCache both take the decision which blocks to compute; keep one of them."


def test_the_same_technique_twice_is_a_conflict_whatever_its_settings(flux: Target) -> None:
    for twice in ((COMPILE, COMPILE), (COMPILE, CompileBlocks(backend="eager", fullgraph=False))):
        (refusal,) = resolve(Recipe(twice), flux).refusals
        assert refusal.startswith("two CompileBlocks both take the compilation of the blocks")


def test_every_reason_is_given_at_once(flux: Target) -> None:
    recipe = Recipe((FORA(), FirstBlockCache(), CompileBlocks(backend="nonsense"), AttentionBackend(name="cudnn")))
    with pytest.raises(Refused) as caught:
        resolve(recipe, flux).check()
    assert len(caught.value.reasons) == 3
    text = str(caught.value)
    assert text.startswith("This recipe cannot run here:\n  - ")
    for part in ("FORA and FirstBlockCache", "CompileBlocks: there is no", "AttentionBackend: the cudnn kernel"):
        assert part in text


def test_a_single_reason_is_a_single_sentence(flux: Target) -> None:
    with pytest.raises(Refused) as caught:
        resolve(Recipe((DeepCache(),)), flux).check()
    assert str(caught.value).startswith("DeepCache: FluxTransformer2DModel is no U-Net; FirstBlockCache is")


def test_resolving_changes_nothing_and_is_repeatable(flux: Target) -> None:
    recipe = Recipe(PARTS)
    assert resolve(recipe, flux).check().explain() == resolve(recipe, flux).explain()
    assert type(flux.denoisers[0].module).__module__.startswith("diffusers.")


def test_a_plan_explains_its_order(flux: Target) -> None:
    assert resolve(Recipe(PARTS), flux).explain().splitlines() == [
        "1. AttentionBackend(name='math')  [structure]",
        "2. FirstBlockCache()  [cache]",
        "3. ChannelsLast()  [layout]",
        "4. CompileBlocks(backend='eager')  [compile]",
    ]
    assert resolve(Recipe(), flux).explain() == "nothing to apply"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("graph", "graph", True),
        ("graph", "layout", False),
        ("graph", "graph:anything", True),
        ("stack.compute:*", "stack.compute:transformer_blocks", True),
        ("stack.compute:a", "stack.compute:b", False),
        ("linear.weight:blocks.*.attn.*", "linear.weight:*.ff.*", True),
        ("linear.weight:blocks.*.attn", "linear.weight:*.ff", False),
        ("linear.weight:a.*", "linear.weight:*.b", True),
        ("linear.weight:blocks.?.x", "linear.weight:blocks.1.*", True),
        ("linear.weight:blocks.?", "linear.weight:blocks.12", False),
        ("linear.weight:", "linear.weight:x", True),
    ],
)
def test_claims_overlap_when_some_name_fits_both(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) is overlap(other, one) is expected


def test_overlapping_globs_are_refused(flux: Target) -> None:
    (refusal,) = resolve(Recipe((Quantized(only="single*"), Quantized(only="*.proj_out"))), flux).refusals
    assert refusal.startswith("two Quantized both take the weights of the same linear layers (")
    assert not resolve(Recipe((Quantized(only="single*"), Quantized(only="transformer*"))), flux).refusals


def test_claims_in_words() -> None:
    assert describe_claim("attention.kernel") == "the choice of the attention kernel"
    assert describe_claim("linear.weight:a*") == "the weights of the same linear layers (a*)"
    assert describe_claim("unheard.of") == "unheard.of"


def test_clashes_with_an_open_session() -> None:
    (sentence,) = clashes((FORA(), COMPILE), (FirstBlockCache(), ChannelsLast()))
    assert sentence.startswith("FORA takes the decision which blocks to compute, which FirstBlockCache of a session")


def test_a_planned_model_is_refused_before_anything_is_loaded() -> None:
    began = time.perf_counter()
    target = Target.planned("flux.1-DEV")
    assert target.device.type == "meta"
    assert sum(p.numel() for p in target.denoisers[0].module.parameters()) > 11e9
    (refusal,) = resolve(Recipe((DeepCache(),)), target).refusals
    assert refusal == "DeepCache: FluxTransformer2DModel is no U-Net; FirstBlockCache is the cache for transformers."
    assert not resolve(Recipe((FirstBlockCache(), FORA())), target).refusals[1:]
    assert time.perf_counter() - began < 30


def test_a_planned_model_cannot_be_accelerated() -> None:
    with pytest.raises(HastenError, match=r"FLUX.1-schnell has no weights \(meta device\): it can be planned, not run"):
        accelerate(Target.planned("FLUX.1-schnell"), FirstBlockCache())
