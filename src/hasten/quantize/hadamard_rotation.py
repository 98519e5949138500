"""Rotates the inputs of linear layers, and their weights with them, so that large channels are spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from hasten.core.errors import NotEngaged, nearest
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.kernels.hadamard import rotation_group
from hasten.kernels.modules import Quantized
from hasten.kernels.prepared import PreparedLinear
from hasten.quantize.engine.build import prepared_layer
from hasten.quantize.engine.originals import Originals, set_aside
from hasten.quantize.engine.sites import Site, chosen_components, obstacles, sites


@dataclass(frozen=True, kw_only=True)
class HadamardRotation(Technique):
    """Rotates inputs and weights of linear layers by Hadamard matrices: the same result, easier to quantize.

    A channel that is far larger than the others is spread over its group, so that activations and weights lose less
    when they are rounded: with five channels 50 times as large, int8 loses a tenth. Without a quantizer in the same
    recipe it only costs time.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.03673"

    largest: int = field(
        default=256, metadata=about("channels that are rotated together at most; a power of two", ge=2, le=4096)
    )
    components: tuple[str, ...] = field(
        default=("transformer*", "unet", "prior", "denoiser"),
        metadata=about("components whose linears are rotated, by name or pattern; text encoders can be named too"),
    )
    skip: tuple[str, ...] = field(
        default=(), metadata=about("layers that stay as they are, as patterns of their paths")
    )
    originals: Literal["keep", "cpu", "drop"] = field(
        default="cpu",
        metadata=about("where the original weights wait: where they are, in host memory, or nowhere (for good)"),
    )

    def claims(self) -> tuple[str, ...]:
        """The inputs of the linears of its components."""
        return tuple(f"linear.input:{pattern}" for pattern in self.components)

    def irreversible(self) -> bool:
        """Are the originals given up?"""
        return self.originals == "drop"

    def takes(self, target: Target) -> list[Site]:
        """The layers whose inputs are rotated: those with channels in groups of two or more."""
        found = sites(target, self.components, self.skip)
        return [site for site in found if site.wrapper is None or site.wrapper.rotation == 1]

    def problems(self, target: Target) -> Iterable[str]:
        """Needs linear layers with plain weights of 16 or 32 bits in blocks."""
        names = chosen_components(target, self.components)
        if not names:
            yield f"no component is called {' or '.join(self.components)}. {nearest('', list(target.modules))}"
        found = self.takes(target)
        for name in names:
            yield from obstacles(name, [site for site in found if site.component == name])

    def apply(self, target: Target, patch: Patch) -> None:
        """Put a layer that rotates its input in the place of each linear."""
        state, originals = patch.keep(Rotated()), Originals(self.originals)
        for site in self.takes(target):
            group = rotation_group(site.weight.shape[1], self.largest)
            module = prepared_layer(site, rotation=group)
            state.places.append((site, module))
            patch.swap(site.parent, site.name, module, f"inputs are rotated in groups of {group}")
            set_aside(site.layer, originals, patch)
        for name in chosen_components(target, self.components):
            patch.around(target.modules[name], state.count, "calls are counted")

    def engaged(self, session: Session) -> Evidence:
        """The rotating layers, or quantized ones that rotate in their stead, are in their places and have run."""
        return session.state(self, Rotated).evidence()

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Takes no memory worth speaking of; the time depends on whether a kernel does it along with rounding."""
        return Cost()


class Rotated:
    """The rotating layers of a session."""

    def __init__(self) -> None:
        self.places: list[tuple[Site, PreparedLinear]] = []
        self.calls = 0

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around a network."""
        result = call(*args, **kwargs)
        self.calls += 1
        return result

    def evidence(self) -> Evidence:
        """What shows that the rotations took part; raises NotEngaged otherwise."""
        if not self.calls:
            raise NotEngaged("no network with rotated layers was called.")
        if gone := sum(not _rotates(site, module) for site, module in self.places):
            raise NotEngaged(f"{gone} of {len(self.places)} rotated layers are not in their places any more.")
        quantized = sum(_present(site) is not module for site, module in self.places)
        more = f", {quantized} of them quantized" if quantized else ""
        return Evidence(summary=f"{len(self.places)} linears{more} rotated their inputs in {self.calls} calls")


def _present(site: Site) -> nn.Module | None:
    """What stands in the place now, if need be inside an adapter (PEFT)."""
    module = site.parent._modules[site.name]
    return module if module is None else module._modules.get("base_layer", module)


def _rotates(site: Site, module: PreparedLinear) -> bool:
    present = _present(site)
    return isinstance(present, Quantized | PreparedLinear) and present.rotation == module.rotation
