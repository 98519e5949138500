"""The base of quantizers that know what a layer is given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.core.target import Target
from hasten.core.technique import about
from hasten.core.weights import known_hash, weights_hash
from hasten.kernels.modules import Quantized
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site, chosen_components
from hasten.quantize.engine.statistics import InputStatistics
from hasten.quantize.engine.statistics_file import StatisticsFile, usual_file
from hasten.quantize.engine.synthetic import synthetic_statistics
from hasten.quantize.engine.watching import Statistics, key_of

AUTO, SYNTHETIC = "auto", "synthetic"
COMMAND = "run `hasten calibrate MODEL --for statistics` first"


@dataclass(frozen=True, kw_only=True)
class CalibratedQuantizer(LinearQuantizer):
    """Replaces layers by quantized ones that fit their inputs best. A subclass says how layers are solved."""

    statistics: str = field(
        default=AUTO,
        metadata=about(
            "file that `hasten calibrate MODEL --for statistics` made; auto finds the model's own by its weights; "
            "synthetic watches random inputs, for tests",
            trial=SYNTHETIC,
        ),
    )

    @abstractmethod
    def solve(self, together: Sequence[Site], known: InputStatistics) -> list[Quantized]:
        """The quantized layers of one block that share an input with these statistics."""

    @abstractmethod
    def outline(self, site: Site) -> Quantized:
        """A layer with tensors of the same shapes and types as `solve` makes, for a weight on the meta device."""

    def quantize(self, site: Site) -> Quantized:
        """Only the outline, for planning; real layers are solved together."""
        return self.outline(site)

    def quantizer(self, target: Target, patch: Patch) -> Callable[[Site], nn.Module | None]:
        """Solves a group of layers when the first of them is asked for."""
        found = self.takes(target)
        known = Calibrated(self.statistics).known(target, found)
        return Solving(self, known, known.groups(found)).quantize

    def problems(self, target: Target) -> Iterable[str]:
        """Needs statistics of this model's layers."""
        yield from super().problems(target)
        yield from Calibrated(self.statistics).problems(target, self.components)


@dataclass(frozen=True)
class Calibrated:
    """Where a technique's statistics come from: a file, the user's cache ("auto"), or random inputs ("synthetic")."""

    source: str

    def problems(self, target: Target, components: Iterable[str]) -> Iterator[str]:
        """Why there are none for this target."""
        if target.device.type == "meta":
            return
        if self.source == SYNTHETIC:
            yield from _not_synthetic(target, components)
            return
        weights = weights_hash(target.denoisers[0].module)
        try:
            opened = self.opened(weights)
        except HastenError as error:
            yield str(error)
            return
        if self.source != AUTO and opened.weights != weights:
            yield f"{opened.file.name} holds statistics of other weights; {COMMAND}."

    def opened(self, weights: str) -> StatisticsFile:
        """The file of statistics for weights of this hash; raises HastenError where there is none."""
        file = usual_file(weights) if self.source == AUTO else Path(self.source).expanduser()
        if not file.is_file():
            where = "this model has not been calibrated" if self.source == AUTO else f"there is no file {file}"
            raise HastenError(f"{where}; {COMMAND}.")
        return StatisticsFile(file)

    def known(self, target: Target, found: Sequence[Site]) -> Statistics:
        """The statistics of these layers."""
        if self.source == SYNTHETIC:
            return synthetic_statistics(target, found)
        module = target.denoisers[0].module
        # Other techniques of this session may have changed weights since `problems` looked.
        return self.opened(known_hash(module) or weights_hash(module)).statistics


def _not_synthetic(target: Target, components: Iterable[str]) -> Iterator[str]:
    denoisers = {denoiser.name for denoiser in target.denoisers}
    others = [name for name in chosen_components(target, components) if name not in denoisers]
    if others or any(denoiser.spec.name == "unknown" for denoiser in target.denoisers):
        yield f"synthetic statistics exist only for denoisers with a specification; {COMMAND}."


class Solving:
    """Solves groups of layers one after the other, and gives out the results."""

    def __init__(self, technique: CalibratedQuantizer, known: Statistics, groups: list[list[Site]]) -> None:
        self._technique, self._known = technique, known
        self._groups = {key_of(site): group for group in groups for site in group}
        self._solved: dict[str, Quantized] = {}

    @torch.no_grad()
    def quantize(self, site: Site) -> Quantized:
        """The quantized layer for a site."""
        if key_of(site) not in self._solved:
            group = self._groups[key_of(site)]
            solved = self._technique.solve(group, self._known.of(group[0]))
            self._solved |= {key_of(one): module for one, module in zip(group, solved, strict=True)}
        return self._solved.pop(key_of(site))
