"""MagCache: the magnitude of what the blocks add falls in the same way for every prompt, so the schedule is fixed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hasten.cache.engine.policy import Fixed, Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.site import Site
from hasten.cache.engine.whole import no_whole, whole_site
from hasten.core.clock import Moment
from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about

if TYPE_CHECKING:
    from hasten.cache.engine.model_data import MagCacheSet, Quantity


@dataclass(frozen=True, kw_only=True)
class MagCache(Cache):
    """Reuses what all blocks add while its magnitude, known for each model and step, has changed little.

    The ratios of magnitudes of successive steps are multiplied along a run of reuse; the distances of the products
    from 1 add up to the error. No activation is looked at, so the schedule is made before the first step and
    reused steps cost nothing beyond an addition; it follows the conditional guidance branch. On a U-Net the deep
    feature is reused. Ratios of published models and of the bundled ones come with hasten; `hasten calibrate MODEL
    --for magcache` measures others. They fit other numbers of steps by the nearest step.
    """

    paper: ClassVar[str] = "MagCache: Fast Video Generation with Magnitude-Aware Cache (NeurIPS 2025), arXiv:2506.09045"

    threshold: float = field(
        default=0.06, metadata=about("error, summed over a run of reuse, that is allowed", ge=0.0, budget="threshold")
    )
    max_consecutive: int = field(default=3, metadata=about("longest run of reused steps (K in the paper)", ge=0, off=0))
    retention: float = field(
        default=0.2, metadata=about("share of the steps, from the first, that is always computed", ge=0.0, le=1.0)
    )
    ratios: str | tuple[float, ...] = field(
        default="auto",
        metadata=about("ratio for each step; or a model's name, a .json file, auto (by the model)", trial=(1.0, 1.0)),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratios in ((), "") or (isinstance(self.ratios, tuple) and not all(r >= 0 for r in self.ratios)):
            raise InvalidSetting(
                "MagCache(ratios=...): give one number of at least 0 for each step, a name, a .json file or auto."
            )

    def problems(self, target: Target) -> Iterable[str]:
        """Needs blocks that can be left out, and ratios measured on what is reused."""
        found = list(no_whole(target))
        yield from found
        if not found:
            for denoiser in target.denoisers:
                yield from self._lacks(denoiser)

    def _lacks(self, denoiser: Denoiser) -> Iterator[str]:
        try:
            chosen = self._chosen(denoiser)
        except HastenError as error:
            yield str(error)
            return
        if chosen.quantity != (here := _quantity(denoiser)):
            measured, here = chosen.quantity.replace("_", " "), here.replace("_", " ")
            yield f"ratios={self.ratios!r} were measured on the {measured}; here the {here} is reused."

    def site(self, denoiser: Denoiser) -> Site:
        """All blocks; of a U-Net, everything but its last layer."""
        return whole_site(denoiser)

    def policy(self, denoiser: Denoiser) -> Policy:
        """The schedule."""
        return self.policies(denoiser)()

    def policies(self, denoiser: Denoiser) -> Callable[[], Policy]:
        """The same for each request; a schedule is made once for each number of steps."""
        chosen = self._chosen(denoiser)
        limits = (self.threshold, self.max_consecutive, self.retention)

        @functools.cache
        def schedule(steps: int) -> tuple[bool, ...]:
            return mag_schedule(chosen.ratios, steps, *limits, always=chosen.computed)

        return lambda: _OfKnownLength(lambda step, steps: steps is None or schedule(steps)[step])

    def _chosen(self, denoiser: Denoiser) -> MagCacheSet:
        from hasten.cache.engine.model_data import MAGCACHE, MagCacheSet, Provenance

        if isinstance(self.ratios, str):
            return MAGCACHE.choose(self.ratios, denoiser)
        given = Provenance(by="the user")
        return MagCacheSet(models=(), ratios=self.ratios, quantity=_quantity(denoiser), provenance=given)

    def in_words(self) -> str:
        """What it follows."""
        return "follows a schedule made from the model's magnitude ratios"


class _OfKnownLength(Fixed):
    """A schedule that needs to know how many steps there are, and computes where nobody tells."""

    _trouble = ""

    @property
    def trouble(self) -> str:
        """Was the number of steps unknown?"""
        return self._trouble

    def decide(self, moment: Moment) -> bool:
        """As scheduled."""
        self._trouble = "" if moment.steps is not None else "the number of steps is unknown without a scheduler"
        return super().decide(moment)


def mag_schedule(
    ratios: Sequence[float],
    steps: int,
    threshold: float,
    max_consecutive: int,
    retention: float,
    *,
    always: Sequence[int] = (),
) -> tuple[bool, ...]:
    """For each of `steps` steps: is it computed? Equations 5 to 7 of MagCache (arXiv:2506.09045).

    `ratios` may be for another number of steps; the nearest stands in. `always` are steps, counted as the ratios
    are, that are never left out. The first `retention * steps` steps, rounded, are computed.
    """
    places = [_nearest(step, steps, len(ratios)) for step in range(steps)]
    computed: list[bool] = []
    product, error, run = 1.0, 0.0, 0
    for step, place in enumerate(places):
        if step < int(retention * steps + 0.5):
            computed.append(True)
            continue
        product, run = product * ratios[place], run + 1
        error += abs(1.0 - product)
        computes = step == 0 or error > threshold or run > max_consecutive or place in always
        computed.append(computes)
        if computes:
            product, error, run = 1.0, 0.0, 0
    return tuple(computed)


def _nearest(step: int, steps: int, known: int) -> int:
    return known - 1 if steps == 1 else round(step * ((known - 1) / (steps - 1)))


def _quantity(denoiser: Denoiser) -> Quantity:
    return "deep_feature" if denoiser.spec.unet else "residual"
