"""A session: a recipe applied to a pipeline, and the only thing that holds state. Leaving it restores everything."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from hasten.core.clock import Clock
from hasten.core.errors import HastenError, NoEffect, NotEngaged, Refused
from hasten.core.patch import Change, Patch, summarize
from hasten.core.recipe import Recipe, as_recipe, short
from hasten.core.resolve import Plan, clashes, resolve
from hasten.core.target import Target
from hasten.core.technique import Evidence, Technique

T = TypeVar("T")

_APPLIED: WeakKeyDictionary[nn.Module, list[tuple[Technique, ...]]] = WeakKeyDictionary()
"""What open sessions have applied to each denoiser, so that a second session cannot take the same resource."""


class Session:
    """Applied techniques, their ledgers and the clock. Create it with `accelerate`; use it in a `with` block."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.target = plan, plan.target
        self._names = self.target.names()
        self._clock: Clock | None = None
        self._clock_patch = Patch(self._names, self._get_clock)
        self._patches: list[tuple[Technique, Patch]] = []
        try:
            self._register()
            for technique in plan.techniques:
                self._apply(technique)
        except BaseException:
            self.close()
            raise

    @property
    def recipe(self) -> Recipe:
        """The applied techniques, in order of application."""
        return Recipe(self.plan.techniques)

    @property
    def clock(self) -> Clock:
        """The session's clock, installed on first use."""
        return self._get_clock()

    def state(self, technique: Technique, kind: type[T]) -> T:
        """The run-time state of the given type that a technique of this session kept."""
        for applied, patch in self._patches:
            if applied is technique:
                for state in patch.states:
                    if isinstance(state, kind):
                        return state
        raise HastenError(f"{type(technique).__name__} keeps no {kind.__name__} in this session.")

    def log(self, technique: Technique) -> tuple[Change, ...]:
        """What a technique changed."""
        return tuple(change for applied, patch in self._patches if applied is technique for change in patch.log)

    def evidence(self) -> dict[Technique, Evidence]:
        """The evidence of every technique; raises NotEngaged for one that took no part in the runs so far."""
        return {technique: technique.engaged(self) for technique, _ in self._patches}

    def describe(self) -> str:
        """What was changed and where, and what shows that it works."""
        count = len(self._patches)
        lines = [f"{self.target.title}: {count} technique{'' if count == 1 else 's'} applied"]
        for technique, patch in self._patches:
            lines.append(f"{short(technique)}")
            lines += [f"    {line}" for line in summarize(patch.log)]
            lines.append(f"    {self._in_words(technique)}")
        return "\n".join(lines)

    def close(self) -> None:
        """Take everything back, in reverse order of application."""
        with ExitStack() as undoing:
            for patch in (self._clock_patch, *(patch for _, patch in self._patches)):
                undoing.callback(patch.close)

    def keep_forever(self) -> None:
        """Make the changes permanent: `close` then does nothing."""
        for patch in (*(patch for _, patch in self._patches), self._clock_patch):
            patch.absorb()

    def _register(self) -> None:
        for denoiser in self.target.denoisers:
            applied = _APPLIED.setdefault(denoiser.module, [])
            applied.append(self.plan.techniques)
            release = partial(applied.remove, self.plan.techniques)
            self._clock_patch.undo(denoiser.module, "taken by a session", release)

    def _apply(self, technique: Technique) -> None:
        patch = Patch(self._names, self._get_clock)
        self._patches.append((technique, patch))
        technique.apply(self.target, patch)
        if not patch.log:
            raise NoEffect(f"{short(technique)} changed nothing in {self.target.title}.")

    def _get_clock(self) -> Clock:
        if self._clock is None:
            self._clock = Clock()
            self._clock.install(self.target, self._clock_patch)
        return self._clock

    def _in_words(self, technique: Technique) -> str:
        try:
            return f"engaged: {technique.engaged(self).summary}"
        except NotEngaged as error:
            return f"not engaged: {error}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def applied_to(denoiser: nn.Module) -> tuple[Technique, ...]:
    """The techniques of the open sessions on a denoiser, also of one that is just being opened."""
    return tuple(item for techniques in _APPLIED.get(denoiser, ()) for item in techniques)


def accelerate(subject: object, recipe: Recipe | Technique | str) -> Session:
    """Apply a recipe to a diffusers pipeline or a bare denoiser, reversibly.

    Use it as `with hasten.accelerate(pipe, recipe) as session:`; leaving the block gives back the very pipeline
    that went in. Raises Refused with plain sentences when the combination cannot run, also together with a session
    that is still open, and for settings that cannot be taken back, before changing anything.
    """
    return _open(subject, as_recipe(recipe), for_good=False)


def _open(subject: object, recipe: Recipe, *, for_good: bool) -> Session:
    target = subject if isinstance(subject, Target) else Target.of(subject)
    if target.device.type == "meta":
        raise HastenError(f"{target.title} has no weights (meta device): it can be planned, not run.")
    plan = resolve(recipe, target).check()
    if not for_good and (given_up := [short(item) for item in plan.techniques if item.irreversible()]):
        raise Refused([f"{item} cannot be taken back; use hasten.apply_permanently for it." for item in given_up])
    present = [item for d in target.denoisers for applied in _APPLIED.get(d.module, ()) for item in applied]
    if taken := tuple(dict.fromkeys(clashes(plan.techniques, present))):
        raise Refused(taken)
    return Session(plan)


def apply_permanently(subject: object, recipe: Recipe | Technique | str) -> Session:
    """Apply a recipe for good: nothing is taken back, also not by leaving a `with` block."""
    session = _open(subject, as_recipe(recipe), for_good=True)
    session.keep_forever()
    return session
