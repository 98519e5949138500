"""Watches what linear layers are given while a network runs; layers that are given the same tensor share statistics."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten.core.errors import HastenError
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.statistics import InputStatistics, Running, Sums


@dataclass(frozen=True)
class WatchedLayer:
    """A layer whose inputs were watched."""

    input: str
    """The layer whose statistics it shares: itself, or the first that is given the same tensor."""
    outputs: int


@dataclass
class Statistics:
    """Statistics of many layers, by `component/path`."""

    layers: dict[str, WatchedLayer]
    read: Callable[[str], InputStatistics]
    """Gives the statistics of an input by the name of its first layer."""

    def of(self, site: Site) -> InputStatistics:
        """Those of a layer; raises HastenError where there are none."""
        name = self.find(site)
        if name is None:
            raise HastenError(
                f"{key_of(site)} has not been calibrated: it was never called, or the pipeline has other layers now "
                f"than when it was calibrated."
            )
        return self.read(self.layers[name].input).to(site.weight.device)

    def find(self, site: Site) -> str | None:
        """The layer under whose name a site was watched.

        Projections that have been fused meanwhile (query, key and value) are found by their parts: layers of the
        same parent that share an input and together have as many outputs.
        """
        key = key_of(site)
        if key in self.layers:
            return key
        parent = key.rpartition(".")[0]
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            if name.rpartition(".")[0] == parent:
                groups.setdefault(layer.input, []).append(name)
        outputs = site.weight.shape[0]
        fitting = (g for g in groups.values() if sum(self.layers[name].outputs for name in g) == outputs)
        return next((group[0] for group in fitting if len(group) > 1), None)

    def groups(self, found: Sequence[Site]) -> list[list[Site]]:
        """The sites, those together that share an input within a block."""
        groups: dict[tuple[str, ...], list[Site]] = {}
        for site in found:
            name = self.find(site)
            shared = self.layers[name].input if name else key_of(site)
            groups.setdefault((shared, block_of(site.path), _preparation(site)), []).append(site)
        return list(groups.values())


def key_of(site: Site) -> str:
    """`component/path` of a layer, the same with and without adapters around it."""
    return f"{site.component}/{site.path.removesuffix('.base_layer')}"


def _preparation(site: Site) -> str:
    """What is done to an input already; layers that differ in it cannot be solved together."""
    wrapper = site.wrapper
    return "" if wrapper is None else f"{wrapper.rotation} {wrapper.smooth is None}"


def block_of(path: str) -> str:
    """The path of the innermost numbered block that a layer is in."""
    parts = path.split(".")
    numbered = [place for place, part in enumerate(parts[:-1], 1) if part.isdigit()]
    return ".".join(parts[: numbered[-1]]) if numbered else ""


class Watcher:
    """Gathers statistics of layers while it is `active`; `stop` takes its hooks off again.

    `half` (0 or 1) says to which half of the data the present picture belongs.
    """

    def __init__(self, watched: Iterable[Site]) -> None:
        self.active, self.half = True, 0
        self._sites = list(watched)
        self._outputs = {key_of(site): site.weight.shape[0] for site in self._sites}
        self._leaders: dict[str, str] = {}
        self._sums: dict[str, Running] = {}
        self._latest: dict[str, weakref.ref[torch.Tensor]] = {}
        self._hooks = [site.present.register_forward_pre_hook(self._hook(site)) for site in self._sites]

    def resume(self, layers: Mapping[str, WatchedLayer], sums: Callable[[str], Sums]) -> None:
        """Go on from what was found out before."""
        devices = {key_of(site): site.weight.device for site in self._sites}
        for name, layer in layers.items():
            self._leaders[name] = layer.input
            if name == layer.input and name in devices:
                self._sums[name] = Running.of(sums(name), devices[name])

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def layers(self) -> dict[str, WatchedLayer]:
        """The layers that were called so far."""
        return {name: WatchedLayer(leader, self._outputs[name]) for name, leader in self._leaders.items()}

    def sums(self, name: str) -> Sums:
        """What was seen of an input so far, by the name of its first layer."""
        return self._sums[name].sums()

    def statistics(self) -> Statistics:
        """What is known so far."""
        return Statistics(self.layers, lambda name: self.sums(name).statistics().check(name))

    def _hook(self, site: Site) -> Callable[[Any, tuple[Any, ...]], None]:
        name, is_conv = key_of(site), site.is_conv

        def see(_module: Any, given: tuple[Any, ...]) -> None:
            # Compiled or nested calls may hand over anything; only tensors are inputs.
            if self.active and given and isinstance(given[0], torch.Tensor):
                self._see(name, given[0], is_conv)

        return see

    def _see(self, name: str, x: torch.Tensor, is_conv: bool) -> None:
        leader = self._leaders.get(name) or self._same(x) or name
        if leader != name and not self._is(leader, x):
            # They shared an input so far, and do so no longer: from here on it has statistics of its own.
            leader = name
        self._leaders[name] = leader
        if leader == name:
            tokens = x.movedim(1, -1) if is_conv else x
            tokens = tokens.reshape(-1, tokens.shape[-1])
            running = self._sums.get(name) or Running(tokens.shape[-1], x.device)
            running.add(tokens, self.half)
            self._sums[name] = running
            self._latest[name] = weakref.ref(x)

    def _is(self, leader: str, x: torch.Tensor) -> bool:
        seen = self._latest.get(leader)
        return seen is not None and seen() is x

    def _same(self, x: torch.Tensor) -> str | None:
        return next((leader for leader in self._latest if self._is(leader, x)), None)
