"""The base of quantizers that put a quantized layer in the place of each linear layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hasten.core.errors import HastenError, NotEngaged, nearest
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.kernels.modules import Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.originals import Originals, set_aside
from hasten.quantize.engine.sites import Site, chosen_components, obstacles, sites


@dataclass(frozen=True, kw_only=True)
class LinearQuantizer(Technique):
    """Replaces layers by quantized ones. A subclass says how one layer is quantized; nothing else is needed."""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    lossy: ClassVar[bool] = True
    convolutions: ClassVar[bool] = False
    """Does it take 1 x 1 convolutions as well?"""
    uniform: ClassVar[bool] = False
    """Do layers of one shape and type take the same bytes, wherever they are? Then one of them is asked for all."""

    components: tuple[str, ...] = field(
        default=("transformer*", "unet", "prior", "denoiser"),
        metadata=about("components whose linears are quantized, by name or pattern; text encoders can be named too"),
    )
    skip: tuple[str, ...] = field(
        default=(), metadata=about("layers that stay as they are, as patterns of their paths")
    )
    finer: tuple[str, ...] = field(
        default=(), metadata=about("layers that get 8-bit integers instead, as patterns of their paths")
    )
    originals: Literal["keep", "cpu", "drop"] = field(
        default="cpu",
        metadata=about("where the original weights wait: where they are, in host memory, or nowhere (for good)"),
    )

    @abstractmethod
    def quantize(self, site: Site) -> nn.Module:
        """The quantized layer for one place; on the meta device for a weight that is there.

        Usually a `Quantized`; what another library makes of the layer will do, if its state_dict holds all it keeps.
        """

    def quantizer(self, target: Target, patch: Patch) -> Callable[[Site], nn.Module | None]:
        """What quantizes the layers of a target one by one, or leaves some (None).

        Calibrated techniques know more than a single layer.
        """
        return self.quantize

    def claims(self) -> tuple[str, ...]:
        """The weights of the linears of its components."""
        return tuple(f"linear.weight:{pattern}" for pattern in self.components)

    def irreversible(self) -> bool:
        """Are the originals given up?"""
        return self.originals == "drop"

    def takes(self, target: Target) -> list[Site]:
        """The layers that are quantized."""
        return sites(target, self.components, self.skip, self.convolutions)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs linear layers with plain weights of 16 or 32 bits in blocks."""
        names = chosen_components(target, self.components)
        if not names:
            yield f"no component is called {' or '.join(self.components)}. {nearest('', list(target.modules))}"
        found = self.takes(target)
        for name in names:
            yield from obstacles(name, [site for site in found if site.component == name])

    def apply(self, target: Target, patch: Patch) -> None:
        """Quantize layer by layer, and put the results in their places."""
        state = patch.keep(Replaced(Originals(self.originals)))
        quantize = self.quantizer(target, patch)
        for site in self.takes(target):
            if (module := _named(self._finer if self.is_finer(site) else quantize, site)) is None:
                continue
            state.add(site, module)
            patch.swap(site.parent, site.name, module, self.describe(module))
            set_aside(site.layer, state.originals, patch)
        for name in chosen_components(target, self.components):
            patch.around(target.modules[name], state.count, "calls are counted")

    def is_finer(self, site: Site) -> bool:
        """Does a layer get 8-bit integers instead of what the technique makes of others?"""
        return any(fnmatchcase(site.path, pattern) for pattern in self.finer)

    def _finer(self, site: Site) -> Quantized:
        """Rounded row by row, with inputs as they are: what costs least fidelity."""
        return quantized_layer(site, quantize_integer(site.weight, 8))

    def describe(self, module: nn.Module) -> str:
        """What stands in the session's log for a replaced layer."""
        if not isinstance(module, Quantized):
            return f"weight is kept by {type(module).__name__}"
        activations = f", activations {module.activations}" if module.activations != "none" else ""
        return f"weight is kept as {module.number}{activations}"

    def engaged(self, session: Session) -> Evidence:
        """The quantized layers are in their places, take less memory, and the network has run with them."""
        return session.state(self, Replaced).evidence()

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory is that of codes and scales; what it does to time depends on the kernels of the machine."""
        held = {name: _bytes(target.modules[name]) for name in chosen_components(target, self.components)}
        sizes: dict[object, int] = {}
        for site in self.takes(target):
            key = _kind(site) if self.uniform else site
            if key not in sizes:
                sizes[key] = self.stored(site)
            held[site.component] += sizes[key] - site.weight.nbytes
        return Cost(held=held, basis="formula")

    def stored(self, site: Site) -> int:
        """Bytes that the layer will take in place of its weight."""
        quantize = self._finer if self.is_finer(site) else self.quantize
        layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.empty_like(site.weight, device="meta"), requires_grad=False)
        return kept_bytes(quantize(replace(site, layer=layer)))


class Replaced:
    """The quantized layers of a session and their originals."""

    def __init__(self, originals: Originals) -> None:
        self.originals, self.calls = originals, 0
        self.places: list[tuple[Site, nn.Module]] = []
        self.bytes_before = self.bytes_after = self.elements = 0

    def add(self, site: Site, module: nn.Module) -> None:
        """Note a replaced layer."""
        self.places.append((site, module))
        self.bytes_before += site.weight.nbytes
        self.elements += site.weight.numel()
        # Counted now: adapters may be given room in the same buffers later.
        self.bytes_after += kept_bytes(module)

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around a network."""
        result = call(*args, **kwargs)
        self.calls += 1
        return result

    def evidence(self) -> Evidence:
        """What shows that the layers took part; raises NotEngaged otherwise."""
        if not self.calls:
            raise NotEngaged("no network with quantized layers was called.")
        if gone := sum(not in_place(site, module) for site, module in self.places):
            raise NotEngaged(f"{gone} of {len(self.places)} quantized layers are not in their places any more.")
        now = self.bytes_after
        if now >= self.bytes_before:
            raise NotEngaged(f"the codes take {now / 2**20:.2f} MiB, and the weights took less.")
        bits = 8 * now / self.elements
        return Evidence(
            summary=f"{len(self.places)} weights of {self.bytes_before / 2**20:.2f} MiB are stored in "
            f"{now / 2**20:.2f} MiB ({bits:.2f} bits a weight) and took part in {self.calls} calls"
        )


def _named(quantize: Callable[[Site], nn.Module | None], site: Site) -> nn.Module | None:
    try:
        return quantize(site)
    except HastenError as error:
        raise HastenError(f"{site.component}.{site.path}: {error}") from error


def _kind(site: Site) -> object:
    smoothed = site.wrapper is not None and site.wrapper.smooth is not None
    return (*site.weight.shape, site.weight.dtype, smoothed)


def in_place(site: Site, module: nn.Module) -> bool:
    """Is a module where the layer was, if need be inside an adapter (PEFT)?"""
    present = site.parent._modules[site.name]
    return module is present or (present is not None and present._modules.get("base_layer") is module)


def kept_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that a layer keeps instead of its weight."""
    return sum(tensor.nbytes for name, tensor in module.state_dict().items() if name != "bias")


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
