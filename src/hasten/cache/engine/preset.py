"""The base of all caches: a technique that only says which site, policy and guess it combines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from hasten.cache.engine.guess import Hold
from hasten.cache.engine.output import OutputSite
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.runner import Runner
from hasten.cache.engine.site import Site
from hasten.cache.engine.statistics import Statistics
from hasten.cache.engine.values import size_in_bytes
from hasten.cache.engine.work import example_call, flops, stand_in
from hasten.core.clock import Clock
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Decision, Evidence, Stage, Technique
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Cache(Technique):
    """A preset over the engine. A subclass says `problems`, `site`, `policy` and, unless it holds values, `guess`."""

    stage: ClassVar[Stage] = Stage.CACHE
    lossy: ClassVar[bool] = True

    def site(self, denoiser: Denoiser) -> Site:
        """What is reused."""
        raise NotImplementedError

    def policy(self, denoiser: Denoiser) -> Policy:
        """When it is computed; made anew for each request."""
        raise NotImplementedError

    def policies(self, denoiser: Denoiser) -> Callable[[], Policy]:
        """Makes the policy of each request. What must be looked up for a model is looked up once, here."""
        return lambda: self.policy(denoiser)

    def guess(self) -> Hold:
        """How it is guessed."""
        return Hold()

    def in_words(self) -> str:
        """What the denoiser does now, for the log."""
        return "decides per step what is computed"

    def claims(self) -> tuple[str, ...]:
        """Decides which parts of the denoiser are computed."""
        return ("stack.compute:*",)

    def decides(self, target: Target) -> Decision:
        """Nothing where whole calls are left out; within the call where the first blocks tell."""
        if all(isinstance(self.site(denoiser), OutputSite) for denoiser in target.denoisers):
            return "nothing"
        looks = {self.policies(denoiser)().looks_at for denoiser in target.denoisers}
        return "within" if "front" in looks else "beforehand"

    def problems(self, target: Target) -> Iterable[str]:
        """What the site needs."""
        raise NotImplementedError

    def apply(self, target: Target, patch: Patch) -> None:
        """Put a runner around every denoiser."""
        statistics = patch.keep(Statistics())
        for denoiser in target.denoisers:
            self.install(denoiser, target, patch, statistics)

    def install(self, denoiser: Denoiser, target: Target, patch: Patch, statistics: Statistics) -> None:
        """Put a runner around one denoiser."""
        policies, site = self.policies(denoiser), self.site(denoiser)
        runner = Runner(denoiser, site, policies, self.guess(), patch.clock, statistics)
        runner.install(patch, self.in_words())

    def engaged(self, session: Session) -> Evidence:
        """Some denoiser calls really used kept values."""
        return session.state(self, Statistics).evidence(type(self).__name__, may_never_reuse=self == self.inert())

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Time is the mean share of operations where the schedule is known; memory is what is kept a branch.

        A guess from several values is one more of them, while it is used.
        """
        denoiser = stand_in(target.denoisers[0])
        arguments, site = example_call(denoiser, target, workload), self.site(denoiser)
        site.install(Patch({}, Clock))
        site.keep()
        full = flops(denoiser, arguments, site)
        kept = site.kept
        site.rest()
        site.reuse(kept)
        rest = flops(denoiser, arguments, site) / full
        share = self.policy(denoiser).share(workload.steps)
        snapshots = self.guess().snapshots
        values = snapshots * (2 if denoiser.spec.guidance == "separate" else 1) + (snapshots > 1)
        return Cost(
            time_factor=None if share is None else share + (1 - share) * rest,
            extra_bytes=values * size_in_bytes(kept),
            basis="measured" if share is None else "formula",
        )
