"""Orders a recipe's techniques and refuses combinations that cannot work, before anything is loaded or changed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hasten.core.errors import Refused
from hasten.core.recipe import Recipe, short
from hasten.core.target import Target
from hasten.core.technique import Technique


@dataclass(frozen=True)
class Plan:
    """A recipe in the order of application, checked against a target; `refusals` is empty when it can run."""

    target: Target
    techniques: tuple[Technique, ...]
    refusals: tuple[str, ...]

    def check(self) -> Plan:
        """Return itself, or raise Refused with every reason."""
        if self.refusals:
            raise Refused(self.refusals)
        return self

    def explain(self) -> str:
        """The order of application, one technique a line."""
        lines = [f"{i}. {short(t)}  [{t.stage.name.lower()}]" for i, t in enumerate(self.techniques, 1)]
        return "\n".join(lines) or "nothing to apply"


def resolve(recipe: Recipe, target: Target) -> Plan:
    """Sort by stage (ties by name, then by settings) and collect every reason against the combination."""
    ordered = tuple(sorted(recipe, key=lambda item: (item.stage, type(item).__name__, repr(item))))
    places = (item.runs_on(target) for item in ordered)
    if (place := next((place for place in places if place is not None), None)) is not None:
        target = target.running_on(place)
    refusals = [*_conflicts(ordered), *_problems(ordered, target)]
    # What a technique decides can be asked only where it can run.
    refusals += [] if refusals else _sealed(ordered, target)
    return Plan(target, ordered, tuple(dict.fromkeys(refusals)))


def _problems(techniques: tuple[Technique, ...], target: Target) -> Iterator[str]:
    for item in techniques:
        for sentence in item.problems(target):
            yield f"{type(item).__name__}: {sentence}"


def _conflicts(techniques: tuple[Technique, ...]) -> Iterator[str]:
    for one, other in itertools.combinations(techniques, 2):
        if shared := _shared(one, other):
            names = f"{type(one).__name__} and {type(other).__name__}"
            if type(one) is type(other):
                names = f"two {type(one).__name__}"
            yield f"{names} both take {describe_claim(shared)}; keep one of them."


def _sealed(techniques: tuple[Technique, ...], target: Target) -> Iterator[str]:
    """Say who decides inside a call that another one makes a single piece of."""
    for one, other in itertools.permutations(techniques, 2):
        decides = "nothing" if one.seals == "open" else other.decides(target)
        if one.seals != "open" and decides == "borders":
            yield (
                f"{type(other).__name__} moves tensors between devices in the middle of the denoiser's call, which "
                f"{type(one).__name__} makes a single piece; use CompileBlocks, or place the denoiser as a whole."
            )
        elif one.seals == "compiled" and decides == "within":
            yield (
                f"{type(other).__name__} decides in the middle of the denoiser's call, which {type(one).__name__} "
                f"makes one graph; use CompileBlocks, or a cache with a fixed schedule."
            )
        elif one.seals == "recorded" and decides != "nothing":
            yield (
                f"{type(other).__name__} leaves out parts of the denoiser's call, which {type(one).__name__} records "
                f"and repeats as it is; use a cache that leaves out whole calls."
            )


def clashes(added: Iterable[Technique], present: Iterable[Technique]) -> Iterator[str]:
    """Say which techniques take what one of an open session has taken."""
    for one, other in itertools.product(added, tuple(present)):
        if shared := _shared(one, other):
            yield (
                f"{type(one).__name__} takes {describe_claim(shared)}, which {type(other).__name__} of a session that "
                f"is still open has taken; leave that session first."
            )


def _shared(one: Technique, other: Technique) -> str | None:
    return next((a for a in one.claims() for b in other.claims() if overlap(a, b)), None)


def overlap(one: str, other: str) -> bool:
    """Do two claims, `resource` or `resource:glob`, name a common resource?"""
    (kind, _, pattern), (other_kind, _, other_pattern) = one.partition(":"), other.partition(":")
    if kind != other_kind:
        return False
    return _meet(pattern or "*", other_pattern or "*")


@functools.cache
def _meet(one: str, other: str) -> bool:
    """Is there a text that both globs (of `*` and `?`) match?"""
    if not one or not other:
        return not (one + other).strip("*")
    if one[0] == "*":
        return _meet(one[1:], other) or _meet(one, other[1:])
    if other[0] == "*":
        return _meet(other, one)
    return (one[0] == other[0] or "?" in (one[0], other[0])) and _meet(one[1:], other[1:])


CLAIMS = {
    "attention.kernel": "the choice of the attention kernel",
    "attention.projections": "the projections of attention",
    "stack.compute": "the decision which blocks to compute",
    "graph": "the compilation of the blocks",
    "recording": "the recording of the denoiser's calls",
    "layout": "the memory layout of the weights",
    "linear.smooth": "the smoothing of the inputs of the same linear layers",
    "linear.weight": "the weights of the same linear layers",
    "linear.input": "what is done to the inputs of the same linear layers",
    "residency": "the placement of the weights",
    "block.code": "the code of the blocks",
    "modulation": "the weights of adaptive norms",
    "adapters": "the adapters of the layers",
}
"""Resources in words, for refusals; a claim not listed here is shown as written."""


def describe_claim(claim: str) -> str:
    """Say in words what a claim is about."""
    kind, _, pattern = claim.partition(":")
    words = CLAIMS.get(kind, kind)
    return words if pattern in ("", "*") else f"{words} ({pattern})"
