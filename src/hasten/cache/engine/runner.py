"""The runner: the one place where a cache's decision, site and guess meet around a denoiser's call.

It fails open: a first step, a changed size, setting or adapter, another request, an exception or a sampler that
makes guessing pointless all lead to computing, and are counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hasten.cache.engine.change import sampled
from hasten.cache.engine.course import SEVERAL
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.history import Conditioning, History, Snapshot, kind_of_call
from hasten.cache.engine.output import OutputSite
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.site import Site, Value
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock, Moment
from hasten.core.patch import Patch
from hasten.core.target import Denoiser

Given = Mapping[str, Any]

CHANGED = "size, settings or adapters changed"
NOTHING_KEPT = "nothing was kept"
FIRST = "first step"
MISSED = "the branch was not called at the last computed step"
OTHER_LEADER = "another guidance branch comes first"
OTHER_TEXT = "the text or condition is another one"
NOISE = "the sampler adds noise at each step"


@dataclass
class _Decision:
    """What was decided in a step by its first call, which leads: all guidance branches follow."""

    step: int = -1
    leader: str = ""
    wanted: bool = True
    """Would the policy compute?"""
    obstacle: str = ""
    """Why the leader had to be computed anyway."""

    @property
    def computes(self) -> bool:
        return self.wanted or bool(self.obstacle)


class Runner:
    """Runs one denoiser through a site; one per denoiser and session."""

    def __init__(
        self,
        denoiser: Denoiser,
        site: Site,
        policy: Callable[[], Policy],
        guess: Hold,
        clock: Clock,
        statistics: Statistics,
    ) -> None:
        self._denoiser, self._site, self._make_policy, self._guess = denoiser, site, policy, guess
        self._clock, self._statistics = clock, statistics
        self._parameters = tuple(inspect.signature(denoiser.module.forward).parameters)
        self._policy = policy()
        self._request = -1
        self._histories: dict[str, History] = {}
        self._decision = _Decision()
        self._computed_at = -1
        self._texts: dict[str, Conditioning] = {}

    def install(self, patch: Patch, what: str) -> None:
        """Intercept the denoiser's call, and what the site needs."""
        patch.around(self._denoiser.module, self, what)
        self._site.install(patch)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make one denoiser call, computed or reused."""
        moment = self._clock.now
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        history = self._history_at(moment)
        reason = self._obstacle(moment, history, given)
        try:
            self._prepare(moment, history, given, reason)
            output = self._site.run(call, given, args, kwargs)
            self._conclude(moment, history, given, reason)
        except BaseException:
            history.forget()
            raise
        finally:
            self._site.rest()
        return output

    def _history_at(self, moment: Moment) -> History:
        if moment.request != self._request:
            self._request, self._decision = moment.request, _Decision()
            self._policy = self._make_policy()
            self._histories, self._texts, self._computed_at = {}, {}, -1
        return self._histories.setdefault(moment.branch, History(self._guess.snapshots))

    def _obstacle(self, moment: Moment, history: History, given: Given) -> str:
        """Why this call must be computed whatever the policy says; empty when it need not."""
        varying = (self._denoiser.spec.timestep, *self._site.afresh)
        given_anew = self._given_anew(moment, Conditioning(given, (self._denoiser.spec.latents, *varying)))
        if history.admit(kind_of_call(given, varying, self._denoiser.module)):
            return CHANGED
        if given_anew:
            history.forget()
            return OTHER_TEXT
        if not history.snapshots:
            return FIRST if moment.first else NOTHING_KEPT
        if history.snapshots[-1].moment.step < self._computed_at < moment.step:
            return MISSED
        if moment.step != self._decision.step and moment.branch != self._decision.leader:
            return OTHER_LEADER
        return self._unpredictable(moment, history)

    def _given_anew(self, moment: Moment, text: Conditioning) -> bool:
        """Does this branch come with another text than before? Unnamed branches shift when one is dropped or added."""
        before = self._texts.get(moment.branch)
        others = [other for branch, other in self._texts.items() if branch != moment.branch]
        self._texts[moment.branch] = text
        if before is None or text.same(before):
            return False
        return text.replaces(before) or any(text.same(other) for other in others)

    def _unpredictable(self, moment: Moment, history: History) -> str:
        """Why the sampler makes guesses worthless that take its path to be smooth."""
        if self._clock.noisy and (self._guess.smooth or isinstance(self._site, OutputSite)):
            return NOISE
        if reason := self._guess.obstacle(moment):
            return reason
        levels = [snapshot.moment.level for snapshot in history.snapshots] + [moment.level]
        known = [level for level in levels if level is not None]
        return SEVERAL if self._guess.smooth and len(set(known)) < len(known) else ""

    def _prepare(self, moment: Moment, history: History, given: Given, obstacle: str) -> None:
        """Tell the site what to do, once the policy has decided for this step or has asked to see the front."""
        if moment.step != self._decision.step:
            decided = self._policy.decide(moment)
            if self._policy.looks_at == "input":
                picture = self._picture(given)
                observed = picture is None or self._policy.observe(moment, picture)
                decided = observed if decided is None else decided
            self._decision = _Decision(moment.step, moment.branch, decided is not False, obstacle)
            if self._policy.looks_at == "front":
                self._site.ask(self._judge(moment, history, given, decided))
                return
        if self._decision.computes or obstacle:
            self._site.keep()
        else:
            self._site.reuse(self._guess.guess(history.snapshots, moment, given))

    def _judge(
        self, moment: Moment, history: History, given: Given, decided: bool | None
    ) -> Callable[[torch.Tensor, torch.Tensor | None], Value | None]:
        def judge(after: torch.Tensor, before: torch.Tensor | None) -> Value | None:
            observed = self._policy.observe(moment, sampled(after, before))
            self._decision.wanted = observed if decided is None else decided
            return None if self._decision.computes else self._guess.guess(history.snapshots, moment, given)

        return judge

    def _conclude(self, moment: Moment, history: History, given: Given, reason: str) -> None:
        """Remember what was computed, and tell policy and statistics; the policy hears of each step once."""
        full, kept = not self._site.served, self._site.kept
        earlier = tuple(history.snapshots)
        if full:
            kept = None if kept is None else self._guess.encode(kept, moment, given)
            self._remember(history, moment, kept)
        decides = moment.branch == self._decision.leader
        if decides and full:
            self._computed_at = moment.step
            self._policy.computed(moment, kept, lambda: self._guessed(earlier, moment, given))
        elif decides:
            self._policy.reused(moment)
        reason = self._policy.trouble if self._decision.wanted else reason or self._decision.obstacle
        self._statistics.record(self._denoiser.name, moment, full=full, reason=reason)

    def _remember(self, history: History, moment: Moment, kept: Value | None) -> None:
        if kept is None:
            history.forget()
        else:
            history.add(Snapshot(moment, kept))
        held = sum(each.bytes for each in self._histories.values())
        self._statistics.most_bytes = max(self._statistics.most_bytes, held)
        if moment.last:
            history.forget()  # the memory is wanted for decoding the picture

    def _guessed(self, earlier: tuple[Snapshot, ...], moment: Moment, given: Given) -> Value | None:
        """The guess for a computed step, as it would be remembered; None where there could be none."""
        if not earlier or self._guess.obstacle(moment):
            return None
        return self._guess.encode(self._guess.guess(earlier, moment, given), moment, given)

    def _picture(self, given: Given) -> torch.Tensor | None:
        """The noisy picture of a call, as one batch; None where its layout cannot be told."""
        spec = self._denoiser.spec
        if spec.unpack is not None:
            return spec.unpack(given)
        value = given[spec.latents]
        return value if isinstance(value, torch.Tensor) else torch.stack(tree_leaves(value))
