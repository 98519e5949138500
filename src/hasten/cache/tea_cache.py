"""TeaCache: predict from the modulated input of the first block how much the output would change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hasten.cache.engine.accumulated import AccumulatedChange
from hasten.cache.engine.change import group_of
from hasten.cache.engine.fronts import front_site, no_front
from hasten.cache.engine.policy import Guarded, Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.site import Site
from hasten.cache.engine.whole import no_whole, whole_site
from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about

if TYPE_CHECKING:
    from hasten.cache.engine.model_data import TeaCacheSet

SEEN = {"declared", "modulated_input", "projected_time_embedding"}
"""What specifications of transformers declare as indicator."""


@dataclass(frozen=True, kw_only=True)
class TeaCache(Cache):
    """Adds up predicted changes of the output, and reuses what all blocks add until the sum reaches the threshold.

    At every step the modulated input of the first block (or what else an architecture declares) is compared with
    that of the step before; a polynomial, fitted for each model, turns its relative change into that of the output.
    On a U-Net what the first layer adds is compared, and the deep feature is reused. Coefficients of published models
    and of the bundled ones come with hasten; `hasten calibrate MODEL --for teacache` measures others.
    """

    syncs: ClassVar[bool] = True
    paper: ClassVar[str] = "TeaCache (CVPR 2025), arXiv:2411.19108"

    threshold: float = field(
        default=0.25,
        metadata=about(
            "predicted relative change of the output, summed up, that computes",
            ge=0.0,
            off=0.0,
            trial=1e6,
            budget="threshold",
        ),
    )
    coefficients: str | tuple[float, ...] = field(
        default="auto",
        metadata=about(
            "polynomial, highest power first; or a model's name, a .json file, auto (by the model)", trial=(1.0, 0.0)
        ),
    )
    first: int | None = field(default=None, metadata=about("first steps that are computed; None: as published", ge=0))
    last: int | None = field(default=None, metadata=about("last steps that are computed; None: as published", ge=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients in ((), ""):
            raise InvalidSetting("TeaCache(coefficients=...): give at least one number, a name, a .json file or auto.")

    def problems(self, target: Target) -> Iterable[str]:
        """Needs an indicator, blocks that can be left out, and coefficients."""
        for denoiser in target.denoisers:
            alone = Target(None, (denoiser,), target.title)
            found = list(no_front(alone, front=1, back=0) if denoiser.spec.unet else no_whole(alone))
            yield from found
            if not found:
                yield from self._lacks(denoiser)

    def _lacks(self, denoiser: Denoiser) -> Iterator[str]:
        if denoiser.spec.unet is None and denoiser.spec.stacks[0].indicator is None:
            yield f"the specification of {denoiser.spec.model_class} declares no indicator; use FirstBlockCache."
            return
        try:
            chosen = self._chosen(denoiser)
        except HastenError as error:
            yield str(error)
            return
        if chosen.indicator not in ({"first_layer"} if denoiser.spec.unet else SEEN):
            fitted = chosen.indicator.replace("_", " ")
            here = "first layer's output" if denoiser.spec.unet else "modulated input"
            yield f"coefficients={self.coefficients!r} were fitted to the {fitted}; here the {here} is compared."

    def site(self, denoiser: Denoiser) -> Site:
        """All blocks; of a U-Net, what lies inside its first layer."""
        return front_site(denoiser, front=1, back=0) if denoiser.spec.unet else whole_site(denoiser)

    def policy(self, denoiser: Denoiser) -> Policy:
        """The indicator's change, through the polynomial, within the compulsory first and last steps."""
        return self.policies(denoiser)()

    def policies(self, denoiser: Denoiser) -> Callable[[], Policy]:
        """The same for each request, with the coefficients looked up once."""
        chosen, group = self._chosen(denoiser), group_of(denoiser.module)
        first = chosen.first if self.first is None else self.first
        last = chosen.last if self.last is None else self.last

        def make() -> Policy:
            inner = AccumulatedChange(self.threshold, looks_at="front", rate=Polynomial(chosen), group=group)
            return Guarded(inner, mask=lambda step, steps: compulsory(step, steps, first, last))

        return make

    def _chosen(self, denoiser: Denoiser) -> TeaCacheSet:
        from hasten.cache.engine.model_data import TEACACHE, Provenance, TeaCacheSet

        if isinstance(self.coefficients, str):
            return TEACACHE.choose(self.coefficients, denoiser)
        indicator = "first_layer" if denoiser.spec.unet else "declared"
        given = Provenance(by="the user")
        return TeaCacheSet(models=(), coefficients=self.coefficients, indicator=indicator, provenance=given)


class Polynomial:
    """A set's polynomial; outside the range it was fitted in, its value at the nearest end."""

    def __init__(self, chosen: TeaCacheSet) -> None:
        self._coefficients, self._range = chosen.coefficients, chosen.range

    def __call__(self, change: float) -> float:
        """The predicted relative change of the output."""
        if self._range is not None and change == change:
            change = min(max(change, self._range[0]), self._range[1])
        total = 0.0
        for coefficient in self._coefficients:
            total = total * change + coefficient
        return total


def compulsory(step: int, steps: int | None, first: float, last: int) -> bool:
    """Is a step among the first or the last ones that are computed? A `first` below 1 is a share of the steps."""
    if steps is None:
        return step < max(first, 1)
    return step < (first if first >= 1 else first * steps) or step >= steps - last
