"""MixedPrecision: each layer gets as many bits as its error is worth, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.target import Target
from hasten.core.technique import about
from hasten.core.weights import known_hash, weights_hash
from hasten.kernels.modules import Quantized
from hasten.kernels.rounding import as_matrix, fitting_group, quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.calibrated import AUTO, Calibrated, CalibratedQuantizer
from hasten.quantize.engine.error import relative_error
from hasten.quantize.engine.gains_file import load_gains, usual_gains
from hasten.quantize.engine.gptq import gptq
from hasten.quantize.engine.grids import SCALES, grid_of, in_codes
from hasten.quantize.engine.knapsack import Choice, choose
from hasten.quantize.engine.preparation import Preparation
from hasten.quantize.engine.sites import Site, sites
from hasten.quantize.engine.statistics import InputStatistics
from hasten.quantize.engine.watching import Statistics, key_of

__all__ = ["MixedPrecision"]

BITS = (2, 3, 4, 5, 6, 7, 8)
KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(CalibratedQuantizer):
    """Keeps weights in 2 to 8 bits, or as they are, layer by layer, so that the network errs least within a budget.

    The error of a layer is computed from the second moments of its inputs, tr(D H D^T) / tr(W H W^T), and weighed by
    how much it disturbs the output of the network, where `hasten calibrate MODEL --for precision` has measured that.
    No layer is known by its name, and layers outside of the blocks are weighed like all others.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1911.03852"
    convolutions: ClassVar[bool] = True

    bits: float = field(default=5.0, metadata=about("bits of a code in the mean over all weights", ge=2.0, le=16.0))
    memory: str | None = field(
        default=None, metadata=about("instead: what all these weights may take, such as 6GB or 800MiB")
    )
    group: int = field(
        default=64, metadata=about("inputs that share a scale (the greatest common divisor with the layer's)", ge=8)
    )
    rounding: Literal["gptq", "nearest"] = field(
        default="gptq", metadata=about("how weights are rounded", trial="nearest")
    )
    alike: bool = field(
        default=True,
        metadata=about("blocks of a kind get the same bits in the same places, so that one compiled graph serves all"),
    )
    plan: str = field(
        default=AUTO, metadata=about("file of measured sensitivities; auto: the model's own, if there are any")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None:
            bytes_of(self.memory)

    def takes(self, target: Target) -> list[Site]:
        """All linears and 1 x 1 convolutions, also those outside of blocks."""
        return sites(target, self.components, self.skip, self.convolutions, everywhere=True)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs statistics, and the plan that is named."""
        yield from super().problems(target)
        if target.device.type != "meta" and self.plan != AUTO:
            try:
                load_gains(Path(self.plan).expanduser(), weights_hash(target.denoisers[0].module))
            except HastenError as error:
                yield str(error)

    def quantizer(self, target: Target, patch: Patch) -> Callable[[Site], nn.Module | None]:
        """Decide for all layers, then quantize them one by one; None for those that stay."""
        found = self.takes(target)
        known = Calibrated(self.statistics).known(target, found)
        chosen = self.chosen(found, known, self.gains(target), places_alike(target, found) if self.alike else {})
        return lambda site: self._quantized(site, known.of(site), chosen[key_of(site)])

    def gains(self, target: Target) -> dict[str, float]:
        """How much each layer's error matters, by `component/path`; empty where nothing was measured."""
        module = target.denoisers[0].module
        weights = known_hash(module) or weights_hash(module)
        file = usual_gains(weights) if self.plan == AUTO else Path(self.plan).expanduser()
        return load_gains(file, weights) if self.plan != AUTO or file.is_file() else {}

    def chosen(
        self, found: Sequence[Site], known: Statistics, gains: dict[str, float], alike: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """What each layer gets: a number of bits, or "kept". Layers with the same name in `alike` get the same."""
        usual = sorted(gains.values())[len(gains) // 2] if gains else 1.0
        together: dict[str, list[list[Choice]]] = {}
        names = {key_of(site): (alike or {}).get(key_of(site), key_of(site)) for site in found}
        for site in found:
            choices = self._choices(site, known.of(site), gains.get(key_of(site), usual))
            together.setdefault(names[key_of(site)], []).append(list(choices))
        total = sum(site.weight.numel() for site in found)
        budget = bytes_of(self.memory) * 8.0 if self.memory else self.bits * total
        taken = choose({name: _summed(several) for name, several in together.items()}, budget)
        return {layer: taken[name].name for layer, name in names.items()}

    @torch.no_grad()
    def _choices(self, site: Site, known: InputStatistics, gain: float) -> Iterator[Choice]:
        matrix, second = as_matrix(site.weight), Preparation.of(site).statistics(known).second
        for bits in BITS:
            grid = grid_of(matrix, bits, self.group, symmetric=False)
            error = relative_error(matrix, grid.nearest(matrix), second)
            yield Choice(str(bits), self._size(site, bits), gain * error)
        yield Choice(KEPT, 8.0 * site.weight.nbytes if self.memory else 16.0 * matrix.numel(), 0.0)

    def _size(self, site: Site, bits: int) -> float:
        """Bits of the codes, and of scales and zero points too where memory is what counts."""
        count, inputs = site.weight.numel(), site.weight.shape[1]
        overhead = (16 + 8) / fitting_group(inputs, self.group) if self.memory else 0
        return count * (bits + overhead)

    @torch.no_grad()
    def _quantized(self, site: Site, known: InputStatistics, chosen: str) -> Quantized | None:
        if chosen == KEPT:
            return None
        matrix = as_matrix(site.weight)
        grid = grid_of(matrix, int(chosen), self.group, symmetric=False)
        if self.rounding == "gptq":
            matrix = gptq(matrix, Preparation.of(site).statistics(known).second, grid)
        return quantized_layer(site, in_codes(site.weight.shape, matrix, grid))

    def solve(self, together: Sequence[Site], known: InputStatistics) -> list[Quantized]:
        """As if every layer had the mean number of bits; `quantizer` decides otherwise."""
        found = (self._quantized(site, known, str(round(min(self.bits, 8)))) for site in together)
        return [module for module in found if module is not None]

    def outline(self, site: Site) -> Quantized:
        """A layer with the mean number of bits."""
        weight = quantize_integer(site.weight, round(min(self.bits, 8)), self.group, symmetric=False, scales=SCALES)
        return quantized_layer(site, weight)


def _summed(several: Sequence[Sequence[Choice]]) -> list[Choice]:
    """The same choice for several layers."""
    return [Choice(c[0].name, sum(o.size for o in c), sum(o.error for o in c)) for c in zip(*several, strict=True)]


def places_alike(target: Target, found: Sequence[Site]) -> dict[str, str]:
    """A common name for layers in the same place of blocks that one compiled graph could serve."""
    names: dict[str, str] = {}
    for denoiser in target.denoisers:
        blocks = dict(denoiser.of_class(*denoiser.spec.repeated_blocks))
        for site in found:
            inside = [path for path in blocks if site.path.startswith(f"{path}.")]
            if site.component == denoiser.name and inside:
                path = max(inside, key=len)
                place = f"{base_class(blocks[path]).__name__}.{site.path[len(path) + 1 :]}"
                names[key_of(site)] = f"{denoiser.name} {place} {tuple(site.weight.shape)}"
    return names


def bytes_of(text: str) -> int:
    """Read an amount of memory: 6GB, 800MiB."""
    units = {"GB": 10**9, "MB": 10**6, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "KB": 10**3}
    cleaned = text.strip().upper().replace(" ", "")
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if cleaned.endswith(unit)), "")
    try:
        amount = float(cleaned.removesuffix(unit)) * units[unit]
    except (ValueError, KeyError):
        raise InvalidSetting(f"memory={text!r} is no amount of memory; write it as 6GB or 800MiB.") from None
    if not 0 < amount < 2**60:
        raise InvalidSetting(f"memory={text!r} is no amount of memory; write it as 6GB or 800MiB.")
    return int(amount)
