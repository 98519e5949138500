"""SmoothQuant: large channels of the input are made smaller, and the weight larger, before both are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hasten.core.errors import NotEngaged, nearest
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.kernels.modules import Quantized
from hasten.kernels.prepared import PreparedLinear
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import prepared_layer
from hasten.quantize.engine.calibrated import AUTO, SYNTHETIC, Calibrated
from hasten.quantize.engine.originals import Originals, set_aside
from hasten.quantize.engine.preparation import Preparation, raw_matrix
from hasten.quantize.engine.sites import Site, chosen_components, obstacles, sites
from hasten.quantize.engine.smoothing import activation_noise, best_factors, factors, rounding_noise, weight_span
from hasten.quantize.engine.statistics import InputStatistics, quadratic

__all__ = ["SmoothQuant"]

GRID = 20
"""Exponents that `alpha="auto"` tries."""


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Technique):
    """Divides the channels of inputs by factors and multiplies the weights by them: the same result, easier to round.

    The factor of a channel is absmax(x)**alpha / absmax(w)**(1 - alpha), shared by layers that share an input. Put a
    quantizer that rounds activations, such as `Int8Linear`, into the same recipe; without one it only costs time.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.10438"

    alpha: float | Literal["auto"] = field(
        default=0.5, metadata=about("how much is moved to the weights; auto: what errs least at 8 bits", ge=0.0, le=1.0)
    )
    statistics: str = field(default=AUTO, metadata=about("as of other calibrated techniques", trial=SYNTHETIC))
    components: tuple[str, ...] = field(
        default=("transformer*", "unet", "prior", "denoiser"),
        metadata=about("components whose linears are smoothed, by name or pattern; text encoders can be named too"),
    )
    skip: tuple[str, ...] = field(
        default=(), metadata=about("layers that stay as they are, as patterns of their paths")
    )
    originals: Literal["keep", "cpu", "drop"] = field(
        default="cpu",
        metadata=about("where the original weights wait: where they are, in host memory, or nowhere (for good)"),
    )

    def claims(self) -> tuple[str, ...]:
        """The factors that inputs of its components' linears are divided by."""
        return tuple(f"linear.smooth:{pattern}" for pattern in self.components)

    def irreversible(self) -> bool:
        """Are the originals given up?"""
        return self.originals == "drop"

    def takes(self, target: Target) -> list[Site]:
        """The layers whose inputs are smoothed."""
        return sites(target, self.components, self.skip)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs linear layers with plain weights of 16 or 32 bits in blocks, and statistics of their inputs."""
        names = chosen_components(target, self.components)
        if not names:
            yield f"no component is called {' or '.join(self.components)}. {nearest('', list(target.modules))}"
        found = self.takes(target)
        for name in names:
            yield from obstacles(name, [site for site in found if site.component == name])
        yield from Calibrated(self.statistics).problems(target, self.components)

    def apply(self, target: Target, patch: Patch) -> None:
        """Put a layer that divides its input in the place of each linear."""
        state, originals, found = patch.keep(Smoothed()), Originals(self.originals), self.takes(target)
        known = Calibrated(self.statistics).known(target, found)
        for together in known.groups(found):
            smooth = self.factors(together, known.of(together[0]))
            for site in together:
                module = prepared_layer(site, smooth=smooth.clone())
                state.places.append((site, module))
                patch.swap(site.parent, site.name, module, "inputs are divided by smoothing factors")
                set_aside(site.layer, originals, patch)
        for name in chosen_components(target, self.components):
            patch.around(target.modules[name], state.count, "calls are counted")

    @torch.no_grad()
    def factors(self, together: Sequence[Site], known: InputStatistics) -> torch.Tensor:
        """What the input that these layers share is divided by, [inputs], in the layers' type."""
        matrices, kind = [raw_matrix(site) for site in together], together[0].weight.dtype
        span = weight_span(matrices)
        if self.alpha != "auto":
            return factors(known.absmax, span, self.alpha, 1 - self.alpha, kind).to(kind)
        tried = _candidates(known.absmax, span, kind)
        found = best_factors(tried, lambda smooth: _error(matrices, Preparation(smooth), known))
        return (torch.ones_like(span) if found is None else found).to(kind)

    def engaged(self, session: Session) -> Evidence:
        """The smoothing layers, or quantized ones that smooth in their stead, are in their places and have run."""
        return session.state(self, Smoothed).evidence()

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Takes no memory worth speaking of; the time depends on whether a kernel does it along with rounding."""
        return Cost()


def _candidates(span: torch.Tensor, weights: torch.Tensor, kind: torch.dtype) -> Iterator[torch.Tensor]:
    yield torch.ones_like(span)
    for step in range(GRID + 1):
        yield factors(span, weights, step / GRID, 1 - step / GRID, kind)


def _error(matrices: Sequence[torch.Tensor], given: Preparation, known: InputStatistics) -> float:
    """Of products of 8-bit integers."""
    prepared, total = given.statistics(known), 0.0
    noise = activation_noise(prepared, "int8")
    for matrix in matrices:
        scaled = given.weight(matrix)
        found = quantize_integer(scaled, 8).dequantize()
        total += float(quadratic(scaled - found, prepared.second).sum()) + rounding_noise(found, noise)
    return total


class Smoothed:
    """The smoothing layers of a session."""

    def __init__(self) -> None:
        self.places: list[tuple[Site, PreparedLinear]] = []
        self.calls = 0

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around a network."""
        result = call(*args, **kwargs)
        self.calls += 1
        return result

    def evidence(self) -> Evidence:
        """What shows that the factors took part; raises NotEngaged otherwise."""
        if not self.calls:
            raise NotEngaged("no network with smoothed layers was called.")
        if gone := sum(not _smooths(site, module) for site, module in self.places):
            raise NotEngaged(f"{gone} of {len(self.places)} smoothed layers are not in their places any more.")
        quantized = sum(isinstance(_present(site), Quantized) for site, _ in self.places)
        more = f", {quantized} of them quantized" if quantized else ""
        return Evidence(summary=f"{len(self.places)} linears{more} divided their inputs in {self.calls} calls")


def _present(site: Site) -> nn.Module | None:
    """What stands in the place now, if need be inside an adapter (PEFT)."""
    module = site.parent._modules[site.name]
    return module if module is None else module._modules.get("base_layer", module)


def _smooths(site: Site, module: PreparedLinear) -> bool:
    present = _present(site)
    if isinstance(present, PreparedLinear) and present.smooth is not None:
        return True  # itself, or with a rotation that came later
    return present is module or (isinstance(present, Quantized) and present.smooth is not None)
