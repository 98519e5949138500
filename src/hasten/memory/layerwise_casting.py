"""Stores weights in 8 bits and casts them to the type of computation when their layer is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
from hasten.memory.engine.casting import CASTABLE, CastWeight, castable_layers, casting
from hasten.memory.engine.moving import chosen_components
from hasten.memory.engine.sizes import in_words
from hasten.memory.engine.weights import size_of

STORED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class LayerwiseCasting(Technique):
    """Stores the weights of blocks in float8 and casts each to its input's type when its layer is called.

    Halves the memory of 16-bit weights and computes in the same precision as before, so it works on any device and
    gains no speed: each call reads the 8 bits and writes the wider weight once more. What is lost is the weights'
    precision (e4m3 keeps 3 bits of mantissa, e5m2 2). Norms, embeddings and the first and last projections stay as
    they are. The originals wait in host memory and come back bit for bit; `originals="drop"` lets them go, which
    cannot be taken back and is therefore only for `hasten.apply_permanently`.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    lossy: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2209.05433"

    storage: Literal["e4m3", "e5m2"] = field(
        default="e4m3", metadata=about("the 8-bit type: e4m3 (finer, up to 448) or e5m2 (coarser, up to 57344)")
    )
    skip: tuple[str, ...] = field(
        default=("*norm*", "*embed*"), metadata=about("layers that keep their type, as patterns of their paths")
    )
    components: tuple[str, ...] = field(
        default=("transformer*", "unet", "prior", "denoiser"),
        metadata=about("the components whose weights are cast, by name or pattern; text encoders can be named too"),
    )
    originals: Literal["cpu", "drop"] = field(
        default="cpu", metadata=about("where the original weights wait: host memory, or nowhere (cannot be undone)")
    )

    def claims(self) -> tuple[str, ...]:
        """The weights of linears and convolutions."""
        return ("linear.weight",)

    def irreversible(self) -> bool:
        """Are the originals given up?"""
        return self.originals == "drop"

    def problems(self, target: Target) -> Iterable[str]:
        """Needs layers with plain weights of 16 or 32 bits, which no other code moves or casts."""
        names = chosen_components(target, self.components)
        if not names:
            yield f"no component is called {' or '.join(self.components)}. {nearest('', list(target.modules))}"
        for name in names:
            yield from self._obstacles(name, target.modules[name])

    def apply(self, target: Target, patch: Patch) -> None:
        """Store the weights in 8 bits, and let each layer cast its own."""
        state = patch.keep(_Cast())
        for name in chosen_components(target, self.components):
            network = target.modules[name]
            for _, layer in castable_layers(network, self.skip):
                state.weights.append(self._cast(layer, patch))
            patch.around(network, state.count, "calls are counted")

    def engaged(self, session: Session) -> Evidence:
        """The weights are stored in fewer bytes, and the network has run with them."""
        state = session.state(self, _Cast)
        if not state.calls:
            raise NotEngaged("no network with cast weights was called.")
        if other := sum(not weight.is_cast for weight in state.weights):
            raise NotEngaged(f"{other} of {len(state.weights)} weights are not stored in {self.storage} any more.")
        before = sum(weight.bytes_before for weight in state.weights)
        now = sum(weight.bytes_stored for weight in state.weights)
        if now >= before:
            raise NotEngaged(f"the weights take {in_words(now)}, and took {in_words(before)} before.")
        return Evidence(
            summary=f"{len(state.weights)} weights of {in_words(before)} are stored in {in_words(now)} "
            f"({self.storage}) and were cast in {state.calls} calls"
        )

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory: a byte for each number. Time: each call reads that byte and writes the number once more."""
        held: dict[str, int] = {}
        traffic: dict[str, int] = {}
        for name in chosen_components(target, self.components):
            network = target.modules[name]
            weights: list[Any] = [layer.weight for _, layer in castable_layers(network, self.skip)]
            held[name] = size_of(network) - sum(w.numel() * (w.element_size() - 1) for w in weights)
            traffic[name] = sum(w.numel() * (w.element_size() + 1) for w in weights)
        return Cost(held=held, traffic=traffic)

    def _obstacles(self, name: str, network: nn.Module) -> Iterator[str]:
        layers = list(castable_layers(network, self.skip))
        if not layers:
            yield f"the {name} has no linear layers or convolutions in blocks that could be cast."
        kinds = {str(layer.weight.dtype) for _, layer in layers if layer.weight.dtype not in CASTABLE}
        kinds |= {type(layer.weight.data).__name__ for _, layer in layers} - {"Tensor"}
        if kinds:
            yield f"weights of the {name} are of type {' and '.join(sorted(kinds))} and cannot be cast to 8 bits."
        if any(hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook") for _, layer in layers):
            yield f"the layers of the {name} carry hooks of accelerate or diffusers; take those off first."

    def _cast(self, layer: nn.Module, patch: Patch) -> CastWeight:
        weight, what = CastWeight(layer, STORED[self.storage]), f"weight is stored in {self.storage}"
        rounded = weight.rounded()
        if self.originals == "cpu":
            patch.undo(layer, "original weight is kept in host memory", weight.keep_original())
            patch.hold(weight.parameter, rounded, what, owner=layer)
        else:
            weight.parameter.data = rounded
            patch.undo(layer, f"{what}, and the original dropped", weight.widen)
        # PEFT asks for it when it makes adapters for a layer whose weight it cannot compute with.
        patch.set(layer, "compute_dtype", weight.compute, "tells adapters the type of computation")
        patch.around(layer, casting(layer), "casts its weight in each call", method="forward")
        return weight


class _Cast:
    """The cast weights of a session, and the calls of the networks that use them."""

    def __init__(self) -> None:
        self.weights: list[CastWeight] = []
        self.calls = 0

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around a network."""
        result = call(*args, **kwargs)
        self.calls += 1
        return result
