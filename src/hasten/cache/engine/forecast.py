"""Forecasts of a denoiser's whole output, made in a quantity that moves smoothly from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hasten.cache.engine.course import SEVERAL, UNKNOWN, Courses
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.history import Snapshot
from hasten.cache.engine.rules import Quantity, Rule, position
from hasten.cache.engine.site import Value
from hasten.cache.engine.values import combine
from hasten.core.clock import Clock, Moment
from hasten.core.noise import Prediction, convert
from hasten.core.target import Denoiser

FORMS: Mapping[Quantity, Prediction] = {"velocity": "flow_prediction", "clean": "sample"}
"""In diffusers' words; the third quantity, the output, is whatever the denoiser predicts."""


def form_of(quantity: Quantity, prediction: Prediction) -> Prediction:
    """The prediction type that is the same as a quantity, for a denoiser of this prediction type."""
    return prediction if quantity == "output" else FORMS[quantity]


class Forecast(Hold):
    """A weighted sum of the latest outputs, converted to the rule's quantity and back with the noise level.

    It is linear in the outputs, so that both halves of a guided batch, or two separate calls, forecast exactly what
    a forecast of the guided output would be. Values are kept in float32, learned variances are forecast as they are.
    """

    smooth = True

    def __init__(self, denoiser: Denoiser, clock: Clock, courses: Courses, snapshots: int) -> None:
        self._spec, self._clock, self._courses = denoiser.spec, clock, courses
        self.snapshots = snapshots
        self._kinds: list[torch.dtype | None] = []

    def obstacle(self, moment: Moment) -> str:
        """Without the noise level nothing can be converted; outputs within a step of Heun's do not go on smoothly."""
        facts = self._clock.facts
        if facts is None or moment.level is None or self._courses.now is None:
            return UNKNOWN
        return SEVERAL if facts.calls_per_step > 1 else ""

    def encode(self, value: Sequence[Any], at: Moment, given: Mapping[str, Any]) -> Value:
        """The output in every quantity that the course's rules want: leaves by quantity."""
        course = self._courses.now
        self._kinds = [leaf.dtype if isinstance(leaf, torch.Tensor) else None for leaf in value]
        if course is None or at.level is None:
            return {}
        wide = [leaf.float() if _floats(leaf) else leaf for leaf in value]
        prediction = self._prediction
        return {
            name: self._turned(wide, at, given, prediction, form_of(name, prediction)) for name in course.quantities
        }

    def guess(self, kept: Sequence[Snapshot], at: Moment, given: Mapping[str, Any]) -> list[Any]:
        """The forecast output: leaves in the denoiser's own form and types."""
        rule = self.rule(kept)
        leaves = self._turned(self.forecast(kept, at), at, given, form_of(rule.quantity, self._prediction), None)
        return [leaf.to(kind) if kind is not None else leaf for leaf, kind in zip(leaves, self._kinds, strict=True)]

    def forecast(self, kept: Sequence[Snapshot], at: Moment) -> list[Any]:
        """The forecast in the rule's quantity."""
        rule = self.rule(kept)
        factors = rule.weights([_place(rule, snapshot.moment) for snapshot in kept], _place(rule, at))
        used = kept[-len(factors) :]
        return list(combine(factors, [snapshot.value[rule.quantity] for snapshot in used]))

    def rule(self, kept: Sequence[Snapshot]) -> Rule:
        """The rule for the steps behind the newest computed one."""
        course = self._courses.now
        return Rule(order=0) if course is None else course.rule(kept[-1].moment.step)

    @property
    def _prediction(self) -> Prediction:
        facts = self._clock.facts
        return "flow_prediction" if facts is None else facts.prediction

    def _turned(
        self, leaves: Sequence[Any], at: Moment, given: Mapping[str, Any], have: Prediction, want: Prediction | None
    ) -> list[Any]:
        """Convert the leaves that belong to a noisy picture; `want` is None for the denoiser's own form."""
        pictures = tree_leaves(given[self._spec.latents])
        level, target = at.level, want or self._prediction
        if level is None or have == target:
            return list(leaves)
        sign = self._spec.sign
        before, after = (1, sign) if want is None else (sign, 1)
        turned = [
            after * convert(before * leaf, picture, level, have, target)
            for leaf, picture in zip(leaves, pictures, strict=False)
        ]
        return [*turned, *leaves[len(turned) :]]


def _place(rule: Rule, moment: Moment) -> float:
    level = moment.level
    if level is None or rule.variable == "index":
        return float(moment.step)
    return position(rule.variable, moment.step, level.alpha, level.sigma)


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
